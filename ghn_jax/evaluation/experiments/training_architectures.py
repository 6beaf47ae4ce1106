r"""How many architectures a hypernetwork has to be trained on (paper Fig. 3, § 5.1).

    ghn-paper training-architectures --data-dir DIR --out runs/training_architectures
    ghn-paper training-architectures --quick

Trains a GHN-2 on each of several numbers of architectures, one and eight in an update, and
evaluates it on networks that it never saw. Those of a smaller number are among those of a larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ghn_jax.data.images import load_images
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import summary
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.experiments.trained_ghns import (
    evaluate,
    id_and_ood,
    mean_and_error,
    train_ghn,
    unseen_networks,
)
from ghn_jax.training.config import TrainConfig, preset

# (architectures, architectures in an update) -> ID-TEST and OOD-TEST (Tables 5 and 8), in per cent;
# Fig. 3 only draws the others.
PAPER = {(100, 8): (47.1, 30.0), (1000, 8): (65.1, 52.5), (1_000_000, 8): (66.9, 56.8),
         (1_000_000, 1): (54.3, 47.5)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained, and evaluated on which networks."""

    counts: tuple[int, ...] = (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)  # of architectures
    meta_batches: tuple[int, ...] = (1, 8)  # architectures in an update
    preset: str = "ghn2"  # how hypernetworks are trained
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    steps: int | None = None  # updates; default: the preset's
    # of DeepNets-1M, whose networks are evaluated; predefined: ResNet-50 and ViT
    splits: tuple[str, ...] = ("test", "wide", "deep", "dense", "bnfree")
    unseen: int | None = None  # evaluate on so many networks of the training rules, not on splits
    seed: int = 0  # of training
    out: Path = Path("runs/training_architectures")  # hypernetworks, records, table and picture


def quick() -> Config:
    """Small networks on digits: minutes on two cores."""
    return Config(counts=(1, 10, 100), preset="digits", dataset="digits", steps=200, unseen=5,
                  out=Path("runs/quick/training_architectures"))  # fmt: skip


def training(config: Config, count: int, meta_batch: int) -> TrainConfig:
    """How a hypernetwork is trained on so many architectures."""
    before = preset(config.preset)
    return before.replace(
        dataset=config.dataset, data_dir=config.data_dir, seed=config.seed,
        steps=before.data.steps if config.steps is None else config.steps,
        training_architectures=count, meta_batch=meta_batch,
        out=config.out / "hypernetworks" / f"{count}-bm{meta_batch}",
    )  # fmt: skip


def run(config: Config) -> list[dict]:
    """Trains and evaluates what has no record yet; writes table and picture; returns results.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    from ghn_jax.plot.experiments import architecture_curves

    images, test = (load_images(config.dataset, split, data_dir=config.data_dir)
                    for split in ("train", "test"))  # fmt: skip
    networks = unseen_networks(
        preset(config.preset), config.unseen, config.splits, images.image_size
    )
    without = ("counts", "meta_batches", "data_dir", "splits", "unseen", "out")
    records, engine = (
        Records.open(config.out, describe("training_architectures", config, without=without)),
        Engine(),
    )
    results = []
    runs = [(count, size) for size in config.meta_batches for count in config.counts]
    bar = tqdm(runs, unit="hypernetwork", dynamic_ncols=True)
    for count, size in bar:
        name, how = f"{count} architectures, {size} in an update", training(config, count, size)
        bar.set_postfix_str(name)
        if name not in records:
            trained = train_ghn(how, images, engine.programs)
            records.add({"name": name, "count": count, "meta_batch": size, **trained})

        def report(record: dict, name=name):
            records.add({**record, "name": f"{name}: {record['name']}"})

        missing = [(s, named) for s, named in networks if f"{name}: {named[0]}" not in records]
        evaluate(how, missing, test, engine, report)
        found = id_and_ood(records[f"{name}: {network}"] for _, (network, _) in networks)
        accuracies = {kind: summary(some)[0] for kind, some in
                      zip(("id", "ood"), found, strict=True) if some}  # fmt: skip
        shown = [mean_and_error(some) for some in found]
        results.append({**records[name], **accuracies, "shown": shown})
    write_beside(config.out / "table.md", table(results))
    print(table(results))
    architecture_curves(results, config.out / "figure3.png")
    return results


def table(results: Sequence[dict]) -> str:
    """Markdown: accuracies in per cent, by number of architectures."""
    lines = ["| architectures | in an update | training | ID | OOD | ID, OOD in the paper |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        paper = ", ".join(map(str, PAPER.get((r["count"], r["meta_batch"]), ["drawn in Fig. 3"])))
        lines.append(f"| {r['count']} | {r['meta_batch']} | {100 * r['train_top1']:.1f} | "
                     f"{r['shown'][0]} | {r['shown'][1]} | {paper} |")  # fmt: skip
    return "\n".join(lines) + "\n"
