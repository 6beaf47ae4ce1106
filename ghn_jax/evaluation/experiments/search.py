r"""Architecture search by predicted properties (paper C.2.4, Table 9).

    ghn-paper search --ghn runs/ghn2 --trained runs/sgd-val runs/sgd-test --out runs/search
    ghn-paper search --quick

A regression from embeddings to a property of trained networks (§ 5.2) is asked about networks of
the `search` split; the best are kept, with their costs. `--trained` are folders that
`ghn-paper trained-networks` has written. Train what was found with

    ghn-paper trained-networks --nets runs/search/best.json --cutout 16 --auxiliary 0.4 \\
        --drop-path 0.2 --epochs 600
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.counts import count_flops, count_parameters
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.evaluation.experiments.records import Records, describe, read_records, write_beside
from ghn_jax.evaluation.experiments.regression import fit
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.hypernet.ghn import GHN

CHUNK = 512  # networks whose scores are written together


class Found(NamedTuple):
    """A network and what was predicted of it.

    Attributes:
      index: in the split.
      arch: the architecture.
      score: the objective.
      parameters, flops: its costs (multiply-adds for one image).
    """

    index: int
    arch: Architecture
    score: float
    parameters: int
    flops: int


def costs(arch: Architecture, task: Task) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image."""
    options = {"num_classes": task.num_classes, "image_size": task.image_size}
    return count_parameters(arch, **options), count_flops(arch, **options)


def within(
    task: Task, *, max_parameters: float | None = None, max_flops: float | None = None
) -> Callable[[Architecture], bool]:
    """A constraint: no more parameters, and no more multiply-adds for an image, than these."""
    options = {"num_classes": task.num_classes, "image_size": task.image_size}

    def small(arch: Architecture) -> bool:
        # Counting takes as long as sampling: only what is limited is counted.
        if max_parameters is not None and count_parameters(arch, **options) > max_parameters:
            return False
        return max_flops is None or count_flops(arch, **options) <= max_flops

    return small


def score_networks(
    ghn: GHN,
    variables,
    objective: Callable[[np.ndarray], np.ndarray],
    *,
    start: int = 0,
    stop: int,
    constraint: Callable[[Architecture], bool] = lambda arch: True,
    seed: int = 0,
    task: Task | None = None,
) -> Iterator[list[Found]]:
    """Scores networks of the `search` split, some hundreds at a time.

    Args:
      start, stop: which networks of the split's endless stream.
      ghn, variables, objective, constraint, seed, task: see `search`.

    Yields:
      Those of the next `CHUNK` networks that satisfy the constraint.
    """
    task = task or Task()
    for first in range(start, stop, CHUNK):
        numbers = range(first, min(first + CHUNK, stop))
        archs = {i: sample_architecture("search", seed, i) for i in numbers}
        archs = {i: arch for i, arch in archs.items() if constraint(arch)}
        graphs = (ghn.graph(arch, image_size=task.image_size) for arch in archs.values())
        scores = objective(embed_graphs(ghn, variables, graphs)) if archs else ()
        yield [
            Found(i, arch, float(score), *costs(arch, task))
            for (i, arch), score in zip(archs.items(), scores, strict=True)
        ]


def search(
    ghn: GHN,
    variables,
    objective: Callable[[np.ndarray], np.ndarray],
    *,
    num: int,
    constraint: Callable[[Architecture], bool] = lambda arch: True,
    keep: int = 10,
    seed: int = 0,
    task: Task | None = None,
) -> list[Found]:
    """The networks of the `search` split with the highest objective.

    Args:
      ghn, variables: whose embeddings the objective takes.
      objective: (N, d) embeddings -> (N,) scores, as the `predict` of a fitted regression.
      num: networks that are looked at; those that miss the constraint count.
      constraint: whether a network may be chosen, for example `within`.
      keep: how many are returned at most.
      seed: of the split's networks.
      task: that costs are for; CIFAR-10 if not given.

    Returns:
      The best, the highest first.

    Raises:
      ValueError: `num` or `keep` is less than 1.
    """
    if num < 1 or keep < 1:
        raise ValueError(f"num is {num} and keep is {keep}; use 1 or more")
    best: list[Found] = []
    chunks = score_networks(
        ghn, variables, objective, stop=num, constraint=constraint, seed=seed, task=task
    )
    with tqdm(total=num, unit="network", desc="searching", disable=None) as bar:
        for some in chunks:
            best = sorted([*best, *some], key=lambda found: -found.score)[:keep]
            bar.update(min(CHUNK, num - bar.n))
    return best


# --- The experiment -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """What is searched, and by what."""

    ghn: Path | None = None  # hypernetwork whose embeddings are used; default: an untrained one
    trained: tuple[Path, ...] = ()  # folders of trained networks to fit the regression to
    property: str = "final_val_top1"  # of their records
    num: int = 100_000  # networks that are looked at
    max_parameters: float | None = None  # a network with more is not chosen
    max_flops: float | None = None  # multiply-adds for an image; one with more is not chosen
    image_size: int = 32  # of the images that costs are for, in pixels
    keep: int = 10  # networks that are written down
    seed: int = 0  # of the networks
    out: Path = Path("runs/search")  # folder for scores, the best and the figure


def quick() -> Config:
    """Some hundred networks, by what `ghn-paper trained-networks --quick` has trained."""
    return Config(
        trained=(Path("runs/quick/trained_networks"),), num=600, image_size=16,
        out=Path("runs/quick/search"),
    )  # fmt: skip


def training_set(folders: Sequence[Path], name: str) -> tuple[list[Architecture], np.ndarray]:
    """Architectures that were trained, and a property of them; what has diverged counts.

    Raises:
      ValueError: a folder has none, or they lack the property.
    """
    if not folders:
        raise ValueError("--trained is empty; give folders that ghn-paper trained-networks wrote")
    archs, values = [], []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--trained is {folder}, which is no folder; make it with ghn-paper "
                             "trained-networks")  # fmt: skip
        records = [r for r in read_records(folder).values() if isinstance(r["architecture"], dict)]
        if not records:
            raise ValueError(f"{folder} has no trained networks of the design space; train some "
                             "with ghn-paper trained-networks")  # fmt: skip
        for record in records:
            if name not in record:
                numbers = sorted(k for k, v in record.items() if isinstance(v, float))
                raise ValueError(f"{record['name']} in {folder} has no {name!r}; it has "
                                 f"{', '.join(numbers)}")  # fmt: skip
            archs.append(Architecture.from_dict(record["architecture"]))
            values.append(record[name])
    return archs, np.array(values)


def run(config: Config) -> list[Found]:
    """Searches on from where it was; writes the best, a table and a figure.

    Raises:
      ValueError: options that cannot work, too few trained networks, or results of other options.
    """
    if config.num < 1 or config.keep < 1:
        raise ValueError(f"--num is {config.num} and --keep is {config.keep}; use 1 or more")
    archs, values = training_set(config.trained, config.property)
    ghns = load_ghns([] if config.ghn is None else [config.ghn])
    ((ghn, variables),) = ghns.values()
    task = Task(ghn.num_classes, config.image_size)
    settings = describe("search", config, without=("num", "keep", "out"))
    settings["networks"] = len(archs)
    scores = Records.open(config.out, settings, ghns=ghns)

    graphs = (ghn.graph(arch, image_size=config.image_size) for arch in archs)
    # In per cent, which the grid of the regression is made for.
    regressor = fit(embed_graphs(ghn, variables, graphs), 100 * values, np.arange(len(archs)))
    seen = max((r["seen"] for r in scores.values()), default=0)
    constraint = within(task, max_parameters=config.max_parameters, max_flops=config.max_flops)
    chunks = score_networks(
        ghn, variables, regressor.predict, start=seen, stop=config.num, constraint=constraint,
        seed=config.seed, task=task,
    )  # fmt: skip
    with tqdm(total=config.num, initial=seen, unit="network", dynamic_ncols=True) as bar:
        for some in chunks:
            bar.update(min(CHUNK, config.num - bar.n))
            rows = [[f.index, round(f.score, 4), f.parameters, f.flops] for f in some]
            scores.add({"name": f"to {bar.n}", "seen": bar.n, "rows": rows})
    rows = np.array([row for r in scores.values() for row in r["rows"]])
    if not len(rows):
        raise ValueError(f"none of {config.num} networks is within the limits; raise them")
    best = [
        Found(int(i), sample_architecture("search", config.seed, int(i)), score, int(p), int(f))
        for i, score, p, f in rows[np.argsort(-rows[:, 1], kind="stable")][: config.keep]
    ]
    write_beside(
        config.out / "best.json",
        json.dumps({f"search[{f.index}]": f.arch.to_dict() for f in best}, indent=1) + "\n",
    )
    text = table(best)
    if "top1" in config.property and (told := beyond(rows[:, 1], len(archs))):
        text += f"\n{told}\n"
    write_beside(config.out / "table.md", text)
    from ghn_jax.plot.experiments import pareto_figure  # matplotlib is of an extra

    pareto_figure(rows[:, 2], rows[:, 1], config.out / "pareto.png")
    print(f"{len(rows)} networks, regression of {len(archs)} trained ones\n\n{text}")
    return best


def beyond(scores: np.ndarray, fitted: int) -> str:
    """What to say of predicted accuracies, in per cent, that cannot be; empty if there are none."""
    share = np.mean((scores < 0) | (scores > 100))
    if not share:
        return ""
    return (
        f"{share:.1%} of the predictions are below 0 or above 100%: {fitted} trained networks are "
        "few."
    )


def table(best: Sequence[Found]) -> str:
    """The best networks: Markdown."""
    lines = ["| network | predicted | parameters | multiply-adds |", "|---|---|---|---|"]
    lines += [f"| search[{f.index}] | {f.score:.1f} | {f.parameters / 1e6:.2f}M | "
              f"{f.flops / 1e6:.0f}M |" for f in best]  # fmt: skip
    return "\n".join(lines) + "\n"
