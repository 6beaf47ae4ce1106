"""All parameters of ResNet-50 (32x32) predicted by a GHN-2: warm, and the first time in a process.

    python bench/predict.py

The first time is measured in new processes whose compiled programs lie in the cache already.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from ghn_jax.engine.compilation import default_program_folder, keep_programs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.tracing.model_graph import model_graph
from ghn_jax.tracing.prediction import predict_model
from ghn_jax.zoo import resnet50


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    repeats: int = 20  # predictions, after the first
    processes: int = 3  # in which the first prediction is measured
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)
    once: bool = False  # print the seconds of one first prediction (for the processes)


SAMPLE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def time_call(function, *arguments) -> float:
    """Seconds of one call, results on the device included."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main(options: Options) -> None:
    """Prints a table and a JSON line."""
    keep_programs(options.cache_dir)
    ghn = GHN()
    variables = jax.block_until_ready(ghn.init_variables(0))
    arguments = (ghn, variables, resnet50(), SAMPLE)
    first = time_call(lambda: predict_model(*arguments)[0])
    if options.once:
        print(first)
        return
    warm = [time_call(lambda: predict_model(*arguments)[0]) for _ in range(options.repeats)]
    graph = model_graph(resnet50(), SAMPLE)
    ghn.tensors(variables, graph)
    traced = [time_call(ghn.tensors, variables, graph) for _ in range(options.repeats)]
    command = [sys.executable, __file__, "--once", "--cache-dir", str(options.cache_dir)]
    wholes, firsts = [], []
    for _ in range(options.processes):
        start = time.perf_counter()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wholes.append(time.perf_counter() - start)
        firsts.append(float(output.split()[-1]))
    result = {
        "benchmark": "predict",
        "warm_seconds": round(statistics.median(warm), 3),
        "warm_slowest": round(max(warm), 3),
        "traced_seconds": round(statistics.median(traced), 3),
        "traced_slowest": round(max(traced), 3),
        "first_seconds": round(statistics.median(firsts), 2),
        "process_seconds": round(statistics.median(wholes), 2),
    }
    rows = (
        ("warm, median and slowest", result["warm_seconds"], result["warm_slowest"]),
        (
            "the same of its graph, traced before",
            result["traced_seconds"],
            result["traced_slowest"],
        ),
        ("first in a process, programs in the cache", result["first_seconds"], ""),
        ("the whole process, imports included", result["process_seconds"], ""),
    )
    for name, seconds, more in rows:
        print(f"{name:<44}{seconds:>8}{more:>8}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
