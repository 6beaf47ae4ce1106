r"""Networks with predicted parameters (paper Tables 3 and 4, upper halves; § 5.1).

    ghn-paper predicted-networks --ghn runs/ghn2 runs/mlp --dataset cifar10 --data-dir DIR \
        --splits test wide deep dense bnfree predefined --out runs/predicted
    ghn-paper predicted-networks --quick

Predicts the parameters of the networks of splits and evaluates them, by each hypernetwork, batch
norm on the statistics of batches. Writes one record for each network and hypernetwork; what is
there is not computed again. `ghn-eval` does it for one hypernetwork and a few networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from ghn_jax.data.images import Images, load_images
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import evaluate_ghn, summary
from ghn_jax.evaluation.experiments.cluster import ClusterConfig, run_units
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.networks import Named, of_split
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.ghn import GHN


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks are evaluated, with whose parameters, and on what."""

    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    # of DeepNets-1M, whose networks are evaluated; predefined: ResNet-50 and ViT
    splits: tuple[str, ...] = ("test", "wide", "deep", "dense", "bnfree", "predefined")
    start: int = 0  # first of all networks, split after split
    stop: int | None = None  # one behind the last; default: all
    width: int | None = None  # initial channels; default: each architecture's own
    batch_size: int = 64  # images in a batch, whose statistics batch norm uses
    cluster: ClusterConfig = ClusterConfig()
    unit: str = ""  # names the file of records, where several processes share `out`
    out: Path = Path("runs/predicted_networks")  # folder for records and the table


def quick() -> Config:
    """Four small networks on digits: a minute on two cores."""
    return Config(
        dataset="digits", splits=("test", "bnfree"), stop=4, width=8,
        out=Path("runs/quick/predicted_networks"),
    )  # fmt: skip


def networks(config: Config, image_size: int) -> list[Named]:
    """Those that are to be evaluated.

    Raises:
      ValueError: an unknown split, or no network in the range.
    """
    unknown = [s for s in config.splits if s not in (*EVALUATION_SIZES, "predefined")]
    if unknown or not config.splits:
        raise ValueError(f"--splits is {' '.join(config.splits)!r}; allowed: "
                         f"{', '.join([*EVALUATION_SIZES, 'predefined'])}")  # fmt: skip
    found = [
        named
        for split in config.splits
        for named in of_split(split, image_size=image_size, width=config.width)
    ]
    chosen = found[config.start : config.stop]
    if not chosen:
        raise ValueError(f"--start is {config.start} and --stop {config.stop}, but there are "
                         f"{len(found)} networks")  # fmt: skip
    return chosen


def settings(config: Config) -> dict:
    """What the records depend on."""
    where = ("data_dir", "splits", "start", "stop", "cluster", "unit", "out", "ghn")
    return describe("predicted_networks", config, without=where)


def load_ghns_for(paths: Iterable[Path], images: Images) -> dict[str, tuple[GHN, dict]]:
    """`load_ghns`, for the classes of a set of images.

    Raises:
      ValueError: one predicts classifiers for another number of classes.
    """
    ghns = load_ghns(paths)
    for name, (ghn, _) in ghns.items():
        if ghn.num_classes != images.num_classes:
            raise ValueError(f"{images.name} has {images.num_classes} classes, but {name} predicts "
                             f"classifiers for {ghn.num_classes}")  # fmt: skip
    return ghns


def evaluate_missing(
    records: Records,
    ghns: Mapping[str, tuple[GHN, dict]],
    nets: Sequence[Named],
    images: Images,
    batch_size: int,
) -> list[dict]:
    """Evaluates networks that have no record yet; returns the records of all of them.

    Args:
      records: get one for each hypernetwork and network, 'ghn2: test[7]'.
      ghns: hypernetworks by name.
      nets: whose parameters they predict; names begin with the split.
      images: to evaluate on.
      batch_size: images in a batch.
    """
    names = [f"{method}: {name}" for method in ghns for name, _ in nets]
    engine = Engine()
    missing = sum(name not in records for name in names)
    with tqdm(total=missing, unit="network", dynamic_ncols=True, disable=not missing) as bar:
        for method, (ghn, variables) in ghns.items():
            todo = [pair for pair in nets if f"{method}: {pair[0]}" not in records]

            def report(record: dict, method=method):
                split = record["name"].split("[")[0]
                name = f"{method}: {record['name']}"
                records.add({**record, "name": name, "method": method, "split": split})
                bar.update()
                bar.set_postfix_str(f"{name} {record['top1']:.1%}")

            evaluate_ghn(
                ghn, variables, todo, images, batch_size=batch_size, engine=engine, report=report
            )
    return [records[name] for name in names]


def run(config: Config) -> list[dict]:
    """Evaluates what has no record yet; writes a table; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    images = load_images(
        config.dataset, "test", data_dir=config.data_dir, image_size=config.image_size
    )
    ghns = load_ghns_for(config.ghn, images)
    nets = networks(config, images.image_size)
    records = Records.open(config.out, settings(config), config.unit, ghns=ghns)
    if config.cluster.cluster is not None:
        run_units(run, config, config.start, config.start + len(nets))
        records = Records.open(config.out, settings(config), ghns=ghns)
    found = evaluate_missing(records, ghns, nets, images, config.batch_size)
    if not config.unit:
        write_beside(config.out / "table.md", table(found))
        print(table(found))
    return found


def table(records: list[dict]) -> str:
    """Markdown: mean top-1 with its standard error and the best, by hypernetwork and split."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["method"], record["split"]), []).append(record)
    lines = ["| hypernetwork | split | networks | top-1 | best |", "|---|---|---|---|---|"]
    for (method, split), found in groups.items():
        mean, error, best = summary(found)
        lines.append(
            f"| {method} | {split} | {len(found)} | {mean:.1%} ± {error:.1%} | {best:.1%} |"
        )
    return "\n".join(lines) + "\n"
