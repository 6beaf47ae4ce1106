r"""How predicted parameters generalise (paper § C.2.2, Fig. 10).

    ghn-paper generalisation --predicted runs/predicted --trained runs/sgd --out runs/generalisation
    ghn-paper generalisation --quick

Accuracy of evaluation networks by their width, depth and number of nodes, and by depth where there
is no batch norm, with the range that hypernetworks are trained on. Networks of `test` stand beside
those of the split that goes beyond it. `--predicted` takes records of `ghn-paper
predicted-networks`, `--trained` those of `ghn-paper trained-networks`, for SGD; without
`--predicted`, networks are evaluated here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import count_nodes
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.evaluation.accuracy import summary
from ghn_jax.evaluation.experiments.predicted_networks import evaluate_missing, load_ghns_for
from ghn_jax.evaluation.experiments.records import Records, describe, read_records, write_beside
from ghn_jax.evaluation.networks import of_split

SGD = "SGD"
SPLITS = ("test", "wide", "deep", "dense", "bnfree")
# Mean top-1 on CIFAR-10 by split: Tables 3 and 4, and the authors' published results.
PAPER = {
    SGD: (0.885, 0.889, 0.845, 0.873, 0.456),
    "GHN-2": (0.669, 0.640, 0.605, 0.658, 0.368),
    "GHN-1": (0.514, 0.431, 0.483, 0.518, 0.137),
    "MLP": (0.422, 0.223, 0.379, 0.448, 0.239),
}


def _cells(arch: Architecture) -> int:
    return arch.n_cells


class Panel(NamedTuple):
    """A part of Fig. 10.

    Attributes:
      label: of its axis.
      splits: whose networks it shows.
      value: of a network.
      trained: least and most in training networks (Table 1).
      bins: least value of each; one begins where training networks end.
    """

    label: str
    splits: tuple[str, ...]
    value: Callable[[Architecture], int]
    trained: tuple[int, int]
    bins: tuple[int, ...]


_CELLS = (4, 7, 10, 13, 16, 19, 25, 31)
PANELS = {
    "width": Panel("channels", ("test", "wide"), lambda arch: arch.C, (16, 128),
                   (32, 64, 96, 129, 208, 272, 528)),
    "depth": Panel("cells", ("test", "deep"), _cells, (4, 18), _CELLS),
    "nodes": Panel("nodes", ("test", "dense"), lambda arch: count_nodes(wire(arch, Task())),
                   (21, 827), (21, 100, 200, 300, 400, 600, 828)),
    "depth without batch norm": Panel("cells", ("bnfree",), _cells, (4, 18), _CELLS[:5]),
}  # fmt: skip


class Group(NamedTuple):
    """Networks of a panel and a method whose values are in one bin.

    Attributes:
      panel, method: names of them.
      value: mean over the networks.
      least, most: of the values.
      networks: how many.
      top1, error: mean and its standard error.
    """

    panel: str
    method: str
    value: float
    least: int
    most: int
    networks: int
    top1: float
    error: float


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks are compared, with whose parameters, and on what."""

    predicted: tuple[Path, ...] = ()  # folders of `predicted-networks`, in place of what follows
    trained: tuple[Path, ...] = ()  # folders of `trained-networks`: SGD
    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    networks: int | None = None  # of each split; default: all
    batch_size: int = 64  # images in a batch, whose statistics batch norm uses
    out: Path = Path("runs/generalisation")  # folder for records, table and figure


def quick() -> Config:
    """Two networks of each split on digits of 8 pixels: some minutes on two cores."""
    return Config(dataset="digits", image_size=8, networks=2, out=Path("runs/quick/generalisation"))


def _evaluated(config: Config) -> list[dict]:
    """Records of networks with predicted parameters, made here where they are missing."""
    images = load_images(
        config.dataset, "test", data_dir=config.data_dir, image_size=config.image_size
    )
    ghns = load_ghns_for(config.ghn, images)
    size = images.image_size
    nets = [n for split in SPLITS for n in of_split(split, 0, config.networks, image_size=size)]
    without = ("predicted", "trained", "ghn", "data_dir", "networks", "out")
    records = Records.open(
        config.out, describe("generalisation", config, without=without), ghns=ghns
    )
    return evaluate_missing(records, ghns, nets, images, config.batch_size)


def _of_folders(folders: Iterable[Path], key: str) -> list[dict]:
    """Records of other experiments.

    Raises:
      ValueError: a folder has none, or those of an experiment that does not take accuracies.
    """
    found = []
    for folder in folders:
        records = list(read_records(folder).values())
        if not records or any(not {key, "architecture"} <= r.keys() for r in records):
            raise ValueError(f"{folder} has no records with {key!r}; give a folder of ghn-paper "
                             "predicted-networks or trained-networks")  # fmt: skip
        found += records
    return found


def rows(predicted: Iterable[Mapping], trained: Iterable[Mapping]) -> list[dict]:
    """Records of both kinds as (method, split, arch, top1), of networks of the design space."""
    found = [(r["method"], r["split"], r["architecture"], r["top1"]) for r in predicted]
    found += [(SGD, r["name"].split("[")[0], r["architecture"], r["final_test_top1"])
              for r in trained]  # fmt: skip
    return [
        {"method": method, "split": split, "arch": Architecture.from_dict(arch), "top1": top1}
        for method, split, arch, top1 in found
        if split in SPLITS and not isinstance(arch, str)
    ]


def groups(some: Sequence[Mapping]) -> list[Group]:
    """The points of Fig. 10.

    Args:
      some: from `rows`.
    """
    found = []
    for name, panel in PANELS.items():
        for method in dict.fromkeys(row["method"] for row in some):
            mine = [r for r in some if r["method"] == method and r["split"] in panel.splits]
            values = np.array([panel.value(row["arch"]) for row in mine], int)
            which = np.maximum(np.digitize(values, panel.bins), 1)
            for i in np.unique(which):
                inside = values[which == i]
                mean, error, _ = summary([r for r, j in zip(mine, which, strict=True) if i == j])
                found.append(Group(name, method, float(inside.mean()), int(inside.min()),
                                   int(inside.max()), len(inside), mean, error))  # fmt: skip
    return found


def run(config: Config) -> list[dict]:
    """Evaluates what has no record yet; writes the table and the figure; returns the points.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    if config.networks is not None and config.networks < 1:
        raise ValueError(f"--networks is {config.networks}; allowed: 1 or more")
    if config.predicted and config.ghn:
        raise ValueError("--predicted and --ghn were both given; networks are either evaluated "
                         "here or were before: give one of them")  # fmt: skip
    trained = _of_folders(config.trained, "final_test_top1")
    if config.predicted:
        predicted = _of_folders(config.predicted, "method")
        config.out.mkdir(parents=True, exist_ok=True)
    else:
        predicted = _evaluated(config)
    some = rows(predicted, trained)
    if not some:
        raise ValueError(f"there is no network of {', '.join(SPLITS)} among the records")
    points = groups(some)
    text = f"{table(points)}\n{split_table(some)}\n{claims(points)}"
    write_beside(config.out / "table.md", text)
    from ghn_jax.plot.generalisation import generalisation_figure  # matplotlib is of an extra

    generalisation_figure(points, PANELS, config.out / "generalisation.png")
    print(text)
    return [point._asdict() for point in points]


def _regime(point: Group) -> bool:
    """Whether a point is of networks as hypernetworks are trained on."""
    low, high = PANELS[point.panel].trained
    return low <= point.value <= high


def table(points: Sequence[Group]) -> str:
    """Markdown: a line for each point of the figure."""
    lines = ["| by | networks with | as in training | parameters | networks | top-1 |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for p in points:
        span = str(p.least) if p.least == p.most else f"{p.least}-{p.most}"
        lines.append(f"| {p.panel} | {span} {PANELS[p.panel].label} | "
                     f"{'yes' if _regime(p) else 'no'} | {p.method} | {p.networks} | "
                     f"{p.top1:.1%} ± {p.error:.1%} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def split_table(some: Sequence[Mapping]) -> str:
    """Markdown: the mean of each split, the paper's for CIFAR-10 below ours."""
    lines = [f"| parameters | {' | '.join(SPLITS)} |", "|---" * (1 + len(SPLITS)) + "|"]
    for method in dict.fromkeys(row["method"] for row in some):
        found = ([r for r in some if r["method"] == method and r["split"] == s] for s in SPLITS)
        cells = [f"{summary(of_one)[0]:.1%}" if of_one else "–" for of_one in found]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    for method, means in PAPER.items():
        lines.append(f"| {method}, the paper | {' | '.join(f'{m:.1%}' for m in means)} |")
    return "\n".join(lines) + "\n"


def _mean(points: Iterable[Group]) -> float:
    """The mean over all networks of some points; NaN for none."""
    weights, tops = np.array([(p.networks, p.top1) for p in points]).reshape(-1, 2).T
    return float(np.average(tops, weights=weights)) if len(tops) else float("nan")


def claims(points: Sequence[Group]) -> str:
    """Which of the paper's observations hold, a sentence each."""
    text = ""
    by = {
        key: list(group)
        for key, group in itertools.groupby(points, key=lambda p: (p.method, p.panel))
    }
    for method in dict.fromkeys(p.method for p in points):
        if method == SGD:
            continue
        width = by.get((method, "width"), [])
        inside, beyond = (_mean(p for p in width if _regime(p) is x) for x in (True, False))
        if np.isfinite([inside, beyond]).all():
            text += _claim(f"{method} degrades in networks wider than in training",
                           beyond < inside, f"{inside:.1%} there, {beyond:.1%} beyond")  # fmt: skip
        for panel in ("depth", "nodes"):
            curve = by.get((method, panel), [])
            if len(curve) > 2:
                best = max(curve, key=lambda p: p.top1)
                text += _claim(
                    f"{method} is best at some {PANELS[panel].label} in between",
                    best not in (curve[0], curve[-1]),
                    f"{best.top1:.1%} at {best.least} to {best.most}",
                )
        name = "depth without batch norm"
        free, sgd = by.get((method, name), []), by.get((SGD, name), [])
        deep, shallow = (_mean(p for p in free if (p.value >= 10) is x) for x in (True, False))
        trained = _mean(p for p in sgd if p.value >= 10)
        if np.isfinite([deep, shallow]).all():
            text += _claim(f"without batch norm, {method} is better from 10 cells on",
                           deep > shallow, f"{shallow:.1%} below, {deep:.1%} there")  # fmt: skip
        if np.isfinite([deep, trained]).all():
            text += _claim(f"there, {method} is as good as SGD", deep >= trained,
                           f"{deep:.1%} and {trained:.1%}")  # fmt: skip
    return text


def _claim(what: str, holds: bool, numbers: str) -> str:
    return f"{what}: {'holds' if holds else 'does not hold'} ({numbers}).\n"
