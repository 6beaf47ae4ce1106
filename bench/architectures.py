"""Architectures a second: sampled, with their graphs and all shortest paths, ready to pad.

    python bench/architectures.py                  # throughput, a minute
    python bench/architectures.py --num 100000     # and whether memory stays flat

One process, one core. The reference's generator makes 11 a second (measured on two cores).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import time

import tyro
from tqdm import tqdm

from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.deepnets1m.sampling import sample_architecture

REFERENCE = 11.0  # architectures a second
_WARM_UP = 200


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    num: int = 20_000  # architectures
    split: str = "train"  # whose architectures
    virtual_edges: int = 50  # longest shortest path that is listed
    chunk: int = 1000  # architectures in one timing


def _memory() -> float:
    """Most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(options: Options) -> None:
    """Prints a table and a JSON line."""
    for i in range(_WARM_UP):
        build_graph(sample_architecture(options.split, 1, i), options.virtual_edges)
    rates, sampling, memory = [], [], [_memory()]
    for start in tqdm(range(0, options.num, options.chunk), unit_scale=options.chunk):
        begin = time.perf_counter()
        architectures = [
            sample_architecture(options.split, 0, start + i) for i in range(options.chunk)
        ]
        sampled = time.perf_counter()
        for arch in architectures:
            build_graph(arch, options.virtual_edges)
        sampling.append(options.chunk / (sampled - begin))
        rates.append(options.chunk / (time.perf_counter() - begin))
        memory.append(_memory())
    result = {
        "benchmark": "architectures",
        "split": options.split,
        "num": options.num,
        "per_second": round(statistics.median(rates)),
        "slowest": round(min(rates)),
        "fastest": round(max(rates)),
        "sampled_per_second": round(statistics.median(sampling)),
        "reference_per_second": REFERENCE,
        "ratio": round(statistics.median(rates) / REFERENCE, 1),
        "memory_mb_start": round(memory[1]),
        "memory_mb_end": round(memory[-1]),
    }
    print(f"{'architectures a second, median':<40}{result['per_second']:>8,}")
    print(f"{'  slowest and fastest ' + format(options.chunk, ','):<40}"
          f"{result['slowest']:>8,}{result['fastest']:>8,}")  # fmt: skip
    print(f"{'  sampling alone':<40}{result['sampled_per_second']:>8,}")
    print(f"{'times the reference (11 a second)':<40}{result['ratio']:>8,}")
    print(f"{'memory after the first and the last, MB':<40}"
          f"{result['memory_mb_start']:>8,}{result['memory_mb_end']:>8,}")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
