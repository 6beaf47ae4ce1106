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
import tyro

from ghn_jax.compilation import keep_programs
from ghn_jax.ghn import GHN
from ghn_jax.resnet import resnet50_graph


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    repeats: int = 20  # predictions, after the first
    processes: int = 3  # in which the first prediction is measured
    cache_dir: Path = Path("~/.cache/ghn_jax")  # compiled programs
    once: bool = False  # print the seconds of one first prediction (for the processes)


def predict(ghn: GHN, variables) -> float:
    """Seconds of one prediction, the graph included."""
    start = time.perf_counter()
    graph = resnet50_graph(ghn.virtual_edges)
    jax.block_until_ready(ghn.predict(variables, graph))
    return time.perf_counter() - start


def main(options: Options) -> None:
    """Prints a table and a JSON line."""
    keep_programs(options.cache_dir)
    ghn = GHN()
    variables = jax.block_until_ready(ghn.init_variables(0))
    first = predict(ghn, variables)
    if options.once:
        print(first)
        return
    warm = [predict(ghn, variables) for _ in range(options.repeats)]
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
        "first_seconds": round(statistics.median(firsts), 2),
        "process_seconds": round(statistics.median(wholes), 2),
    }
    rows = (
        ("warm, median and slowest", result["warm_seconds"], result["warm_slowest"]),
        ("first in a process, programs in the cache", result["first_seconds"], ""),
        ("the whole process, imports included", result["process_seconds"], ""),
    )
    for name, seconds, more in rows:
        print(f"{name:<44}{seconds:>8}{more:>8}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
