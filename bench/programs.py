"""How many XLA programs training needs, and how long they take: compiled, and from the cache.

    python bench/programs.py

Every program that the meta-batches of 1,000 distinct training architectures need (GHN-2, meta-batch
8, batch 64, 32x32 images), in a process with an empty cache and in one that finds them there. The
first meta-batch is run, then the others' programs are compiled, none of them run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.compilation import CompilationCounter, keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.training.config import preset
from ghn_jax.training.meta_batch import Stream
from ghn_jax.training.update import MetaStep


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    num: int = 1000  # training architectures
    cache_dir: Path | None = None  # run once with this cache (for the processes)


def run(options: Options) -> None:
    """Compiles every program; prints their number and the seconds as a JSON line.

    Seconds are of the whole process but for imports; XLA's of compiling and loading alone, several
    at a time, so that they may add up to more.
    """
    start = time.perf_counter()
    keep_programs(options.cache_dir)
    keep_memory()
    config = preset("ghn2")
    ghn, rules = config.ghn(Task()), config.space.rules(32)
    counter = CompilationCounter()
    step = MetaStep(ghn, config.optimiser.make(1000, 300_000), workers=config.run.workers)
    stream = Stream(
        ghn, lambda i: sample_architecture("train", 0, i, rules=rules), config.space.meta_batch, 32,
        graph_nodes=config.space.graph_nodes,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.standard_normal((config.data.batch_size, 32, 32, 3), np.float32)
    labels = rng.integers(0, 10, config.data.batch_size).astype(np.int32)
    batches = itertools.islice(stream.batches(0), options.num // config.space.meta_batch)
    update = step.prepare(next(batches), config.data.batch_size)
    jax.block_until_ready(step(step.init(0), update, images, labels))
    first = time.perf_counter() - start
    for batch in batches:
        step.prepare(batch, config.data.batch_size)
    programs = step.engine.programs
    with tqdm(total=len(programs), unit="program") as bar:
        while programs.made < len(programs):
            time.sleep(0.2)
            programs.make_room()
            bar.update(programs.made - bar.n)
    print(
        json.dumps(
            {
                "programs": counter.count,
                "seconds": round(time.perf_counter() - start),
                "first_update_seconds": round(first),
                "xla_seconds": round(counter.seconds),
            }
        )
    )


def main(options: Options) -> None:
    """Prints a table and a JSON line."""
    if options.cache_dir is not None:
        run(options)
        return
    result = {"benchmark": "programs", "architectures": options.num}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, "--num", str(options.num), "--cache-dir", cache]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result[name] = json.loads(output.splitlines()[-1])
    print(f"{'':<10}{'programs':>14}{'seconds':>14}{'first update':>14}{'in XLA':>14}")
    for name in ("cold", "warm"):
        print(f"{name:<10}" + "".join(f"{n:>14}" for n in result[name].values()))
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
