r"""Predicts parameters for unseen architectures and evaluates them (paper § 5.1).

    ghn-eval --ghn runs/x --dataset cifar10 --data-dir DIR --split test --num 20 --out results.json

Writes one record for each architecture, as it comes, and prints the mean with its standard error,
and the best. The same command again computes what is missing in `--out`. Batch norm uses the
statistics of batches of 64 images, as in the paper.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

from ghn_jax.cli import command
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES
from ghn_jax.deepnets1m.sampling import SPLITS
from ghn_jax.engine.compilation import default_program_folder, keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.accuracy import evaluate_ghn, summary
from ghn_jax.evaluation.experiments.records import check_settings
from ghn_jax.evaluation.networks import by_name, of_split
from ghn_jax.files.digest import digest_of_arrays, with_digest, without_digest
from ghn_jax.files.json_file import read_json
from ghn_jax.files.replace import write_beside
from ghn_jax.interop.pretrained import from_pretrained, training_options

PROG = "ghn-eval"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, on what."""

    ghn: Annotated[str, tyro.conf.arg(aliases=["--ckpt"])]  # a folder or file, or a name
    # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH; default: the one that it
    # was trained on, and cifar10 where it does not say
    dataset: str | None = None
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: as it was trained
    # val, test, wide, deep, dense, bnfree; predefined: ResNet-50 and ViT; named: DARTS, PDARTS and
    # ViT at a small width
    split: str = "test"
    num: int = 20  # architectures of the split, from its first
    nets: Path | None = None  # official DeepNets-1M HDF5 to take the split from
    width: int | None = None  # initial channels; default: each architecture's own (named: 32)
    batch_size: int = 64  # images in a batch, whose statistics batch norm uses
    random: bool = False  # evaluate the same networks with random (He) parameters too
    seed: int | None = None  # generate the split with this seed; default: the frozen sets
    out: Path | None = None  # JSON file for the records; those that are there are not made again
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)


def architectures(config: EvalConfig, image_size: int):
    """Names and architectures of the split."""
    if config.split == "named":
        return by_name(["DARTS", "PDARTS", "ViT"], config.width)[: config.num]
    found = of_split(
        config.split, 0, config.num,
        image_size=image_size, width=config.width, nets=config.nets, seed=config.seed,
    )  # fmt: skip
    if config.split == "predefined":
        return list(zip(("ResNet-50", "ViT"), (network for _, network in found), strict=False))
    return found


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


def as_trained(config: EvalConfig) -> EvalConfig:
    """The options with a dataset, and its images as large as the hypernetwork was trained on."""
    trained = training_options(config.ghn)
    if trained is None:
        return dataclasses.replace(config, dataset=config.dataset or "cifar10")
    data, dataset, size = trained.data, config.dataset or trained.data.dataset, config.image_size
    if dataset != data.dataset:
        print(f"{config.ghn} was trained on {data.dataset}, and is evaluated on {dataset}")
    elif size is None:
        size = data.image_size
    return dataclasses.replace(config, dataset=dataset, image_size=size)


def settings(config: EvalConfig, variables) -> dict[str, Any]:
    """What records depend on, JSON-ready; they say so themselves."""
    names = ("dataset", "image_size", "split", "nets", "width", "batch_size", "random", "seed")
    options = {name: getattr(config, name) for name in names}
    hypernetwork = digest_of_arrays(jax.tree.leaves(variables), "")
    return json.loads(json.dumps({**options, "hypernetwork": hypernetwork}, default=str))


def read_results(path: Path, settings: Mapping[str, Any]) -> dict[str, dict]:
    """The records of a file by name; none if there is no file.

    Raises:
      ValueError: it is damaged, something else, or has records of other settings.
    """
    if not path.exists():
        return {}
    advice = "give another --out"
    records = read_json(path, advice)
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and {"name", "settings"} <= set(r) for r in records
    ):
        raise ValueError(f"{path} exists, and is no file of this program's records; {advice}")
    for i, record in enumerate(records):
        without_digest(record, f"{path}, record {i},")
        check_settings(settings, record["settings"], path, "another --out")
    return {record["name"]: record for record in records}


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    config = tyro.cli(EvalConfig, prog=PROG, args=arguments, description=__doc__)
    check(config)
    keep_programs(config.cache_dir)
    keep_memory()
    ghn, variables = from_pretrained(config.ghn)
    config = as_trained(config)
    # Hyperparameters are chosen on held-out training images, the rest is tested on test images.
    part = "val" if config.split == "val" else "test"
    images = load_images(
        config.dataset, part, data_dir=config.data_dir, image_size=config.image_size
    )
    if images.num_classes != ghn.num_classes:
        raise ValueError(
            f"{config.dataset} has {images.num_classes} classes, but the hypernetwork in "
            f"{config.ghn} predicts classifiers for {ghn.num_classes}; give the dataset that it "
            "was trained on"
        )
    nets = architectures(config, images.image_size)
    of = settings(config, variables)
    results = {} if config.out is None else read_results(config.out, of)
    there = sum(name in results for name, _ in nets)
    with tqdm(total=len(nets), initial=there, unit="network", dynamic_ncols=True) as bar:

        def report(record):
            results[record["name"]] = with_digest({**record, "settings": of})
            if config.out is not None:
                write_beside(config.out, json.dumps([*results.values()], indent=1) + "\n")
            bar.update()
            bar.write(f"{record['name']:>12}  {record['top1']:6.1%}  "
                      f"{record['parameters'] / 1e6:6.2f}M parameters")  # fmt: skip

        records = evaluate_ghn(
            ghn, variables, nets, images,
            batch_size=config.batch_size, compare_random=config.random, found=dict(results),
            report=report,
        )  # fmt: skip
    mean, error, best = summary(records)
    print(f"{len(records)} networks of {config.split} on {config.dataset} ({part}): "
          f"top-1 {mean:.2%} ± {error:.2%} (standard error), best {best:.2%}")  # fmt: skip
    if config.random:
        print(
            "with random parameters: top-1 {:.2%} ± {:.2%}".format(*summary(records, "top1_random"))
        )


run = command(PROG, main)

if __name__ == "__main__":
    run()
