"""How long training updates wait for architectures and images, as a share of their time.

    python bench/pipeline.py

The streams that `train/train_ghn.py` trains on (GHN-2, meta-batch 8, batch 64, 32x32 images of
noise, augmented as CIFAR-10's), prepared in threads while updates run. The first update is left
out.
"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import closing
from pathlib import Path

import jax
import tyro
from evaluate import random_images
from tqdm import tqdm

from ghn_jax.data.images import prefetch, train_batches
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.compilation import default_program_folder, keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.training.config import preset
from ghn_jax.training.meta_batch import Stream
from ghn_jax.training.update import MetaStep


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    updates: int = 30
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)


def main(options: Options) -> None:
    """Prints a table and a JSON line."""
    keep_programs(options.cache_dir)
    keep_memory()
    config = preset("ghn2")
    ghn, rules = config.ghn(Task()), config.space.rules(32)
    step = MetaStep(ghn, config.optimiser.make(1000, 300_000), workers=config.run.workers)
    state = step.init(0)
    stream = Stream(
        ghn, lambda i: sample_architecture("train", 0, i, rules=rules), config.space.meta_batch, 32,
        graph_nodes=config.space.graph_nodes,
    )  # fmt: skip
    images = dataclasses.replace(random_images(45_000), name="cifar10", split="train")
    waited, seconds, most, counted = 0.0, 0.0, 0.0, 0
    ahead = (step.prepare(batch, config.data.batch_size) for batch in stream.batches(0))
    with (
        closing(prefetch(ahead, size=4)) as updates,
        closing(prefetch(train_batches(images, config.data.batch_size, seed=0))) as image_batches,
    ):
        for number in tqdm(range(options.updates + 1), unit="update"):
            start = time.perf_counter()
            update, image_batch = next(updates), next(image_batches)
            wait = time.perf_counter() - start
            state, _ = jax.block_until_ready(step(state, update, *image_batch))
            if number:  # before the first one nothing could be prepared
                whole = time.perf_counter() - start
                waited, seconds, counted = waited + wait, seconds + whole, counted + 1
                most = max(most, wait / whole)
    result = {
        "benchmark": "pipeline",
        "updates": counted,
        "waiting_share": round(waited / seconds, 5),
        "most_of_one": round(most, 5),
        "update_seconds": round(seconds / counted, 2),
    }
    print(f"{'updates without new programs':<44}{counted:>10}")
    print(f"{'share of their time that they waited':<44}{waited / seconds:>10.3%}")
    print(f"{'the most of one':<44}{most:>10.3%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
