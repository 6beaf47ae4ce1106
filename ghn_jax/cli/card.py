r"""Measures a hypernetwork for its model card: the numbers of the card, by one command.

    ghn-card --ghn ghn2-cifar10-small --data-dir DIR
    ghn-card --ghn runs/x --out runs/x-card

Networks that it never saw, of the rules that it was trained by, and well-known ones are predicted
and tested. Batch norm uses the statistics of each batch of 64 images, as in the paper; for the
well-known ones also averages over training images. Random (He) parameters stand beside these and
the first twenty of the others. Writes a record for each network as it comes, a table and a picture;
the same command again measures what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

from ghn_jax.cli import command
from ghn_jax.data.images import load_images
from ghn_jax.engine.compilation import default_program_folder, keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.experiments.records import Records, write_beside
from ghn_jax.evaluation.model_card import Wanted, measure, table
from ghn_jax.evaluation.networks import by_name, of_rules
from ghn_jax.files.digest import digest_of_arrays
from ghn_jax.interop.pretrained import from_pretrained, training_options
from ghn_jax.zoo.adapt import SMALLEST

PROG = "ghn-card"
_BESIDE = 20  # unseen networks that random parameters stand beside


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """Which hypernetwork, and on what."""

    ghn: str  # a folder or file, or a name; see `ghn_jax.from_pretrained`
    dataset: str | None = None  # of the images; default: the one that it was trained on
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    unseen: int = 100  # networks of its training rules
    # DARTS, PDARTS, ViT, and models of ghn_jax.zoo, which are compiled, each for minutes
    networks: tuple[str, ...] = ("DARTS", "PDARTS", "ViT", "resnet18", "resnet50")
    width: int = 32  # initial channels of DARTS, PDARTS and ViT
    batches: int = 200  # of 64 training images, that batch norm's statistics are averaged over
    out: Path = Path("runs/card")  # folder for records, table and picture
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    config = tyro.cli(CardConfig, prog=PROG, args=arguments, description=__doc__)
    for name, least in (("unseen", 0), ("batches", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} is {getattr(config, name)}; allowed: {least} or more")
    known = by_name(config.networks, config.width)
    ghn, variables = from_pretrained(config.ghn)
    trained = training_options(config.ghn)
    if trained is None:
        raise ValueError(
            f"{config.ghn} does not say what rules it was trained by; ghn-eval evaluates it on the "
            "splits of DeepNets-1M"
        )
    dataset = config.dataset or trained.data.dataset
    options = {"data_dir": config.data_dir, "image_size": trained.data.image_size}
    training, test = (load_images(dataset, part, **options) for part in ("train", "test"))
    if test.num_classes != ghn.num_classes:
        raise ValueError(
            f"{dataset} has {test.num_classes} classes, but {config.ghn} predicts classifiers for "
            f"{ghn.num_classes}; give the --dataset that it was trained on"
        )
    too_large = [name for name, network in known if isinstance(network, str)]
    if too_large and test.image_size < SMALLEST:
        raise ValueError(
            f"images of {test.image_size} pixels are too small for {', '.join(too_large)}, which "
            f"need {SMALLEST} or more; leave them out of --networks"
        )
    keep_programs(config.cache_dir)
    keep_memory()
    depends = {
        "card of": digest_of_arrays(jax.tree.leaves(variables), ""),
        "dataset": dataset, "width": config.width, "batches": config.batches,
    }  # fmt: skip
    records = Records.open(config.out, depends)
    networks = [Wanted(name, network, random=True, averaged=True) for name, network in known]
    networks += [
        Wanted(name, network, random=i < _BESIDE, averaged=False)
        for i, (name, network) in enumerate(
            of_rules(trained.space.rules(test.image_size), config.unseen)
        )
    ]
    missing = [wanted for wanted in networks if wanted.name not in records]
    with tqdm(total=len(missing), unit="network", dynamic_ncols=True) as bar:
        for record in measure(ghn, variables, missing, training, test, config.batches):
            records.add(record)
            bar.update()
            bar.set_postfix_str(f"{record['name']} {record['top1']:.1%}")
    found = [records[wanted.name] for wanted in networks]
    write_beside(config.out / "table.md", table(found))
    print(table(found))
    try:
        from ghn_jax.plot.charts import accuracy_bars  # matplotlib is of an extra
    except ModuleNotFoundError:
        print("there is no picture: it needs matplotlib, pip install '.[plot]' or '.[all]'")
        return
    compared = [r for r in found if "top1_random" in r]
    if compared:
        accuracy_bars(compared, config.out / "accuracy.png", chance=1 / test.num_classes)


run = command(PROG, main)

if __name__ == "__main__":
    run()
