r"""Architectures compared by their embeddings (paper § C.2.4; Tables 10 and 11, Fig. 12).

    ghn-paper compared-architectures --ghn runs/ghn2 runs/ghn1 runs/mlp --out runs/compared
    ghn-paper compared-architectures --quick

How far ResNet-50 is from three others, how far each evaluation set is from training networks, and
which two networks of `test` are most and least alike. Beside the hypernetworks stands the Hungarian
distance of graphs (§ A.2), which knows nothing of training. Its costs are not published, so that
only the order of its distances can be compared with the paper's.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.distance import hungarian_distance
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set
from ghn_jax.deepnets1m.graph import Graph, build_graph
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.networks import module_of
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.tracing.model_graph import model_graph
from ghn_jax.zoo.resnet import PlainBottleneck, ResNet

HUNGARIAN = "Hungarian"
TRAIN, SPLITS = "train", ("test", "wide", "deep", "dense", "bnfree")
RESNET50, OTHERS = "ResNet-50", ("ResNet-34", "ResNet-50 without skips", "ViT")
# Method -> the paper's distances, from RESNET50 to OTHERS (Table 10) and TRAIN to SPLITS (11).
PAPER = {
    "GHN-2": ((1.0, 1.3, 3.1), (0.30, 0.80, 1.11, 0.59, 3.64)),
    "GHN-1": ((0.6, 0.5, 1.7), (0.15, 0.45, 0.16, 0.21, 5.45)),
    "MLP": ((0.4, 0.2, 1.0), (0.50, 1.04, 0.37, 0.39, 1.10)),
    HUNGARIAN: ((118.0, 134.0, 207.5), (208.7, 199.9, 365.6, 340.7, 193.1)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared, and by whom."""

    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    training: int = 5000  # training networks that evaluation sets are compared with
    networks: int | None = None  # of each evaluation set; default: all
    pairs: int = 500  # of graphs, whose Hungarian distances are averaged for each set
    image_size: int = 32  # of the images, in pixels
    out: Path = Path("runs/compared_architectures")  # folder for records, tables and pictures


def quick() -> Config:
    """100 training networks and 40 of each set: a minute on two cores."""
    return Config(training=100, networks=40, pairs=20,
                  out=Path("runs/quick/compared_architectures"))  # fmt: skip


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between the normal distributions of two sets of embeddings (Heusel et al. 2017).

    Args:
      a, b: (N, d) and (M, d).

    Raises:
      ValueError: a set has fewer than two, or they have different sizes.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"embeddings of shapes {a.shape} and {b.shape}; allowed: two or more of "
                         "each, of one size")  # fmt: skip
    between = np.square(a.mean(0) - b.mean(0)).sum()
    first, second = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (a, b))
    # The trace of the root of a product of covariances: its eigenvalues are real and not negative.
    root = np.sqrt(np.maximum(np.linalg.eigvals(first @ second).real, 0)).sum()
    return float(between + np.trace(first) + np.trace(second) - 2 * root)


def _named_graphs(virtual_edges: int, image_size: int) -> list[Graph]:
    """Of RESNET50 and OTHERS."""
    (vit,) = [a for a in evaluation_set("predefined") if isinstance(a, Architecture)]
    sample = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    plain = ResNet(PlainBottleneck, (3, 4, 6, 3), image_size=image_size)
    task = Task(image_size=image_size)
    models = [module_of("resnet50", task), module_of("resnet34", task), plain]
    graphs = [model_graph(model, sample, virtual_edges) for model in models]
    return [*graphs, build_graph(vit, virtual_edges, image_size=image_size)]


def _sets(config: Config) -> dict[str, Sequence[Architecture]]:
    """Training networks and those of the evaluation sets."""
    count = config.training
    sets: dict[str, Sequence[Architecture]] = {
        TRAIN: [sample_architecture("train", 0, i) for i in range(count)]
    }
    for split in SPLITS:
        found = evaluation_set(split)[: config.networks]
        sets[split] = [a for a in found if isinstance(a, Architecture)]
    return sets


def _mean_distance(
    a: Sequence[Architecture], b: Sequence[Architecture], config: Config, what: str
) -> float:
    """The mean Hungarian distance of pairs that are drawn from two sets."""
    rng = np.random.default_rng(0)
    pairs = list(zip(*(rng.integers(len(some), size=config.pairs) for some in (a, b)), strict=True))

    def graph(arch: Architecture) -> Graph:
        return build_graph(arch, 1, image_size=config.image_size)

    bar = tqdm(pairs, desc=f"{HUNGARIAN}, {what}", leave=False, dynamic_ncols=True)
    return float(np.mean([hungarian_distance(graph(a[i]), graph(b[j])) for i, j in bar]))


def check(config: Config) -> None:
    """Raises ValueError for options that cannot work, before any long work."""
    least = {"training": 2, "pairs": 1, "image_size": 8}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; allowed: "
                             f"{value} or more")  # fmt: skip
    if config.networks is not None and config.networks < 2:
        raise ValueError(f"--networks is {config.networks}; allowed: 2 to "
                         f"{max(EVALUATION_SIZES.values())}")  # fmt: skip


def run(config: Config) -> list[dict]:
    """Computes what has no record yet; writes tables and pictures; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    check(config)
    ghns = load_ghns(config.ghn)
    settings = describe("compared_architectures", config, without=("ghn", "out"))
    records = Records.open(config.out, settings, ghns=ghns)
    sets = _sets(config)
    for method, (ghn, variables) in ghns.items():
        if method in records:
            continue

        def embed(items, graph: Callable, what: str, ghn=ghn, variables=variables, method=method):
            bar = tqdm(items, desc=f"{method}, {what}", leave=False, dynamic_ncols=True)
            return embed_graphs(ghn, variables, map(graph, bar))

        # Not `ghn.graph`: no parameters are made, so that kernels and grids may be of any size.
        make = functools.partial(
            build_graph, virtual_edges=ghn.virtual_edges, num_classes=ghn.num_classes,
            image_size=config.image_size,
        )  # fmt: skip
        found = {split: embed(some, make, split) for split, some in sets.items()}
        graphs = _named_graphs(ghn.virtual_edges, config.image_size)
        first, *others = embed(graphs, lambda graph: graph, "named")
        x = found["test"]
        apart = {pair: float(np.linalg.norm(x[pair[0]] - x[pair[1]]))
                 for pair in itertools.combinations(range(len(x)), 2)}  # fmt: skip
        records.add({
            "name": method,
            "named": [float(np.linalg.norm(first - other)) for other in others],
            "sets": [frechet_distance(found[TRAIN], found[split]) for split in SPLITS],
            "closest": min(apart, key=apart.__getitem__),
            "farthest": max(apart, key=apart.__getitem__),
        })  # fmt: skip
    if HUNGARIAN not in records:
        first, *others = _named_graphs(1, config.image_size)
        records.add({
            "name": HUNGARIAN,
            "named": [hungarian_distance(first, other) for other in others],
            "sets": [_mean_distance(sets[TRAIN], sets[split], config, split) for split in SPLITS],
        })  # fmt: skip
    found = [records[name] for name in (*ghns, HUNGARIAN)]
    write_beside(config.out / "table.md", table(found))
    from ghn_jax.plot.drawing import draw_graph  # matplotlib is of an extra

    for record in found:
        for which in ("closest", "farthest"):
            for place, i in zip("ab", record.get(which, ()), strict=False):
                draw_graph(
                    build_graph(sets["test"][i], 1, image_size=config.image_size),
                    config.out / f"{record['name'].replace(' ', '_')}_{which}_{place}.png",
                    title=f"test[{i}]: of the {which} pair, by {record['name']}",
                )
    print(table(found))
    return found


def _order(names: Sequence[str], values: Sequence[float]) -> str:
    return " < ".join(names[i] for i in np.argsort(values, kind="stable"))


def table(records: Sequence[Mapping]) -> str:
    """Markdown: Tables 10 and 11, the paper's numbers, and which of its orders hold."""
    text = ""
    for key, first, names, part in (
        ("named", RESNET50, OTHERS, 0), ("sets", TRAIN, SPLITS, 1)
    ):  # fmt: skip
        text += f"| distance from {first} | {' | '.join(names)} | order |\n"
        text += "|---" * (2 + len(names)) + "|\n"
        rows = [(r["name"], r[key]) for r in records]
        rows += [(f"{name}, the paper", numbers[part]) for name, numbers in PAPER.items()]
        for name, values in rows:
            cells = " | ".join(f"{v:.3g}" for v in values)
            text += f"| {name} | {cells} | {_order(names, values)} |\n"
        text += "\n"
    for record in records:
        if record["name"] == HUNGARIAN:
            continue
        named = _order(OTHERS, record["named"]) == _order(OTHERS, PAPER["GHN-2"][0])
        nearest = SPLITS[int(np.argmin(record["sets"]))]
        text += (
            f"{record['name']}: the order from {RESNET50} is {'' if named else 'not '}the paper's "
            f"of GHN-2; nearest to {TRAIN} is {nearest}"
            f"{', as for GHN-2 in the paper' if nearest == 'test' else ''}.\n"
        )
    return text
