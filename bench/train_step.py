"""One training update, ours beside the authors', on the same meta-batches in the same order.

    python bench/train_step.py                                  # ours alone
    python bench/train_step.py --reference PATH/TO/ppuda        # with the authors' code (PyTorch)

GHN-2, meta-batch 8, batch 64, 32x32 images, float32. Each meta-batch is run once for warm-up, which
is when programs are compiled, then timed here, then there: what else the machine does meets both.
The authors' code needs torch, torchvision and networkx.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from reference import Reference
from tqdm import tqdm

from ghn_jax.cli.deepnets1m import export
from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.compilation import (
    CompilationCounter,
    default_program_folder,
    keep_programs,
)
from ghn_jax.engine.memory import keep_memory
from ghn_jax.training.config import preset
from ghn_jax.training.meta_batch import make_meta_batch
from ghn_jax.training.update import MetaStep


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    updates: int = 20  # meta-batches
    reference: Path | None = None  # the authors' code, a checkout of facebookresearch/ppuda
    nets: Path | None = None  # official training file; default: one of generated networks
    seed: int = 0  # of the networks, their widths and the images
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)
    pause: float = 0.3  # seconds before each timing, for the other's threads to stop spinning


def meta_batches(nets: DeepNets1M, config, updates: int) -> list[list[int]]:
    """Indices of the file's networks, in its order; those with too many nodes are passed over."""
    size = config.space.meta_batch
    batches = [list(range(i, i + size)) for i in range(0, len(nets) - size + 1, size)]
    fit = [b for b in batches if sum(map(nets.num_nodes, b)) <= config.space.max_nodes]
    if len(fit) < updates:
        raise ValueError(f"the file has {len(fit)} meta-batches, --updates is {updates}")
    return fit[:updates]


def main(options: Options) -> None:
    """Prints a table and a JSON line."""
    keep_programs(options.cache_dir)
    keep_memory()
    config = preset("ghn2")
    with tempfile.TemporaryDirectory() as folder:
        path = options.nets
        if path is None:
            num = options.updates * config.space.meta_batch * 2
            export("train", Path(folder), num=num, seed=options.seed)
            path = Path(folder) / "deepnets1m_train.hdf5"
        nets = DeepNets1M.open(path, "train", seed=options.seed)
        run(options, config, nets, path)


def run(options: Options, config, nets: DeepNets1M, path: Path) -> None:
    """Times every meta-batch."""
    ghn = config.ghn(Task())
    step = MetaStep(ghn, config.optimiser.make(1000, 300_000), workers=config.run.workers)
    state = step.init(0)
    rng = np.random.default_rng(options.seed)
    images = rng.standard_normal((config.data.batch_size, 32, 32, 3), np.float32)
    labels = rng.integers(0, 10, config.data.batch_size).astype(np.int32)
    reference = options.reference and Reference(
        "update", options.reference, path, config.data.batch_size
    )
    counter = CompilationCounter()
    rows = []
    for indices in tqdm(meta_batches(nets, config, options.updates), unit="meta-batch"):
        architectures = [nets[i] for i in indices]
        prepared = time.perf_counter()
        batch = make_meta_batch(
            ghn, architectures, image_size=32, graph_nodes=config.space.graph_nodes
        )
        update = step.prepare(batch, len(images))
        prepared = time.perf_counter() - prepared
        first = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, update, images, labels))
        first = time.perf_counter() - first
        time.sleep(options.pause)
        start, cpu = time.perf_counter(), time.process_time()
        state, _ = jax.block_until_ready(step(state, update, images, labels))
        row = {"nodes": batch.nodes, "ours": time.perf_counter() - start,
               "cpu": time.process_time() - cpu, "first": first, "prepare": prepared,
               "programs": counter.count}  # fmt: skip
        if reference:
            time.sleep(options.pause)
            request = {"indices": indices, "C": [a.C for a in architectures],
                       "fc_dim": [a.fc_dim for a in architectures]}  # fmt: skip
            reference(**request)  # warm-up, as ours
            answer = reference(**request)
            row |= {"theirs": answer["seconds"], "their_cpu": answer["cpu_seconds"],
                    "their_memory": answer["memory_mb"]}  # fmt: skip
        rows.append(row)
        tqdm.write("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}"
                             for k, v in row.items()))  # fmt: skip
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "benchmark": "train_step",
        "updates": len(rows),
        "seconds": round(statistics.median(r["ours"] for r in rows), 2),
        "cpu_seconds": round(statistics.median(r["cpu"] for r in rows), 2),
        "slowest": round(max(r["ours"] for r in rows), 2),
        "prepare_seconds": round(statistics.median(r["prepare"] for r in rows), 3),
        "programs": counter.count,
        "compile_seconds": round(counter.seconds),
        "memory_mb": round(memory),
    }
    print(
        f"{'seconds an update, median and slowest':<44}{result['seconds']:>8}{result['slowest']:>8}"
    )
    if reference:
        ratios = [r["theirs"] / r["ours"] for r in rows]
        theirs = statistics.median(r["theirs"] for r in rows)
        result |= {
            "reference_seconds": round(theirs, 2),
            "reference_cpu_seconds": round(statistics.median(r["their_cpu"] for r in rows), 2),
            "ratio_of_medians": round(theirs / result["seconds"], 2),
            "worst_ratio": round(min(ratios), 2),
            "reference_memory_mb": round(rows[-1]["their_memory"]),
            "reference": reference.about,
        }
        print(f"{'the same, code of the authors':<44}{theirs:>8.2f}"
              f"{max(r['theirs'] for r in rows):>8.2f}")  # fmt: skip
        print(f"{'times as fast, by medians and at worst':<44}{result['ratio_of_medians']:>8}"
              f"{result['worst_ratio']:>8}")  # fmt: skip
    print(
        f"{'programs compiled, seconds':<44}{result['programs']:>8}{result['compile_seconds']:>8}"
    )
    print(f"{'most memory, MB':<44}{result['memory_mb']:>8}")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"train_step.py: {error}")
