r"""Predicts parameters for unseen architectures and evaluates them (paper § 5.1).

    ghn-eval --ckpt runs/x --dataset cifar10 --data-dir DIR --split test --num 20 --out results.json

Writes one record for each architecture and prints the mean with its standard error, and the best.
Batch norm uses the statistics of batches of 64 images, as in the paper.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import tyro
from tqdm import tqdm

from ghn_jax.cli import command
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set
from ghn_jax.deepnets1m.sampling import SPLITS, sample_architecture
from ghn_jax.engine.compilation import keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.accuracy import evaluate_ghn, named_architectures, summary
from ghn_jax.hypernet.checkpoint import load_ghn

PROG = "ghn-eval"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, on what."""

    ckpt: Path  # folder of a training run, or one written by save_ghn
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    split: str = "test"  # val, test, wide, deep, dense, bnfree; predefined: ResNet-50 and ViT;
    # named: DARTS, PDARTS and ViT at a small width
    num: int = 20  # architectures of the split, from its first
    nets: Path | None = None  # official DeepNets-1M HDF5 to take the split from
    width: int | None = None  # initial channels; default: each architecture's own (named: 32)
    batch_size: int = 64  # images in a batch, whose statistics batch norm uses
    random: bool = False  # evaluate the same networks with random (He) parameters too
    seed: int | None = None  # generate the split with this seed; default: the frozen sets
    out: Path | None = None  # JSON file for the records
    cache_dir: Path = Path("~/.cache/ghn_jax")  # compiled programs are kept here between runs


def architectures(config: EvalConfig, image_size: int):
    """Names and architectures of the split."""
    if config.split == "named":
        return list(named_architectures(config.width or 32).items())[: config.num]
    if config.split == "predefined":
        found = evaluation_set("predefined", image_size=image_size)[: config.num]
        return list(zip(("ResNet-50", "ViT"), found, strict=False))
    if config.nets is not None:
        nets = DeepNets1M.open(config.nets, config.split, image_size=image_size)
        found = [nets[i] for i in range(min(config.num, len(nets)))]
    elif config.seed is None:
        found = evaluation_set(config.split, image_size=image_size)[: config.num]
    else:
        found = [sample_architecture(config.split, config.seed, i) for i in range(config.num)]
    if config.width is not None:
        found = [arch.replace(C=config.width) for arch in found]
    return [(f"{config.split}[{i}]", arch) for i, arch in enumerate(found)]


def check(config: EvalConfig) -> None:
    """Raises ValueError for options that cannot work, before any long work."""
    generated = config.seed is not None
    splits = [*(SPLITS if generated else EVALUATION_SIZES), "predefined", "named"]
    if config.nets is None and config.split not in splits:
        raise ValueError(
            f"--split is {config.split!r}; allowed: {', '.join(splits)}"
            + ("" if generated else "; others are generated with --seed")
        )
    if config.split == "predefined" and config.width is not None:
        raise ValueError("--width is given, but predefined networks have their own")
    for field in ("num", "batch_size"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} is {getattr(config, field)}; allowed: "
                             "1 or more")  # fmt: skip
    if config.out is not None and not config.out.absolute().parent.is_dir():
        raise ValueError(f"--out is {config.out}, but its folder does not exist; make it first")


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    config = tyro.cli(EvalConfig, prog=PROG, args=arguments, description=__doc__)
    check(config)
    keep_programs(os.environ.get("JAX_COMPILATION_CACHE_DIR", config.cache_dir))
    keep_memory()
    ghn, variables = load_ghn(config.ckpt)
    # Hyperparameters are chosen on held-out training images, the rest is tested on test images.
    part = "val" if config.split == "val" else "test"
    images = load_images(
        config.dataset, part, data_dir=config.data_dir, image_size=config.image_size
    )
    if images.num_classes != ghn.num_classes:
        raise ValueError(
            f"{config.dataset} has {images.num_classes} classes, but the hypernetwork in "
            f"{config.ckpt} predicts classifiers for {ghn.num_classes}; give the dataset that it "
            "was trained on"
        )
    nets = architectures(config, images.image_size)
    with tqdm(total=len(nets), unit="network", dynamic_ncols=True) as bar:

        def report(record):
            bar.update()
            bar.write(f"{record['name']:>12}  {record['top1']:6.1%}  "
                      f"{record['parameters'] / 1e6:6.2f}M parameters")  # fmt: skip

        records = evaluate_ghn(
            ghn, variables, nets, images,
            batch_size=config.batch_size, compare_random=config.random, report=report,
        )  # fmt: skip
    mean, error, best = summary(records)
    print(f"{len(records)} networks of {config.split} on {config.dataset} ({part}): "
          f"top-1 {mean:.2%} ± {error:.2%} (standard error), best {best:.2%}")  # fmt: skip
    if config.random:
        print(
            "with random parameters: top-1 {:.2%} ± {:.2%}".format(*summary(records, "top1_random"))
        )
    if config.out is not None:
        config.out.write_text(json.dumps(records, indent=1) + "\n")


run = command(PROG, main)

if __name__ == "__main__":
    run()
