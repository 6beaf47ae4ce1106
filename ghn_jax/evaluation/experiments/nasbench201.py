r"""NAS-Bench-201 (Dong & Yang 2020): do embeddings tell which of 15,625 networks are good?

    ghn-paper nasbench201 --table nasbench201.npz --ghn runs/ghn2 --out runs/nasbench201
    ghn-paper nasbench201 --table nasbench201.npz --quick

Its networks have been trained, so how well a method ranks those that it was not told of is known.
The table is a .npz file of cells and accuracies. In Python:

    table = read("nasbench201.npz")
    cells = [parse_cell(text) for text in table.cells]
    embeddings = embed_cells(ghn, variables, cells)
    rows = search_curve({"GHN-2": embeddings}, table.accuracy["cifar10-val"], ...)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.evaluation.experiments import neupred, regression
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.nasbench201 import (
    Cell,
    Table,
    cell_graph,
    count_flops,
    count_parameters,
    is_connected,
    parse_cell,
    read,
)
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.hypernet.ghn import GHN


def embed_cells(
    ghn: GHN, variables, cells: Iterable[Cell], *, progress: bool = False
) -> np.ndarray:
    """(N, d) embeddings of the networks of N cells; see `embed_graphs`.

    Raises:
      DisconnectedError: a cell is not connected.
    """
    cells = tqdm(list(cells), desc="embedding", disable=not progress, leave=False)
    make = functools.partial(
        cell_graph, virtual_edges=ghn.virtual_edges, num_classes=ghn.num_classes
    )
    return embed_graphs(ghn, variables, map(make, cells))


class Row(NamedTuple):
    """What one method found after some networks had been measured.

    Attributes:
      method: its name.
      size: number of networks that it was fitted to.
      tau: Kendall's tau between predictions and validation accuracies of all others.
      accuracy: test accuracy of the network that it takes for the best of the others, per cent.
    """

    method: str
    size: int
    tau: regression.Result
    accuracy: regression.Result


RANDOM, BEST = "random", "best"

Features = np.ndarray | Sequence[Graph]


def search_curve(
    features: Mapping[str, Features],
    validation: np.ndarray,
    test: np.ndarray,
    sizes: Sequence[int] = (10, 50, 100, 500),
    seeds: int = 5,
    *,
    progress: bool = False,
) -> list[Row]:
    """How well methods rank networks when they have been told accuracies of a few.

    Args:
      features: name of a method -> what it knows of N networks. (N, d) numbers: regression from
        them (`regression.fit`); N graphs: NeuPred; (N,) numbers: they rank by themselves, and
        nothing is fitted.
      validation: (N,) validation accuracies, per cent: methods are fitted to some, and ranked by
        the others.
      test: (N,) test accuracies.
      sizes: numbers of networks to fit to.
      seeds: number of draws of them.
      progress: shows a bar.

    Returns:
      A row for each method and size. Those of `RANDOM` have the best network of the draw itself,
      by its validation accuracy, and those of `BEST` the best of all by validation accuracy; their
      taus are 0 and 1.

    Raises:
      ValueError: sizes or shapes that do not go together; see `regression.fit`, `neupred.fit`.
    """
    records = search_draws(features, validation, test, sizes, seeds, progress=progress)
    return rows_of(records)


def search_draws(
    features: Mapping[str, Features],
    validation: np.ndarray,
    test: np.ndarray,
    sizes: Sequence[int],
    seeds: int,
    *,
    progress: bool = False,
    known: Container[str] = (),
) -> Iterator[dict]:
    """The draws of `search_curve`, {'name', 'method', 'size', 'tau', 'test_accuracy'} each.

    Args:
      features, validation, test, sizes, seeds, progress: see `search_curve`, also for errors.
      known: names of records that are not computed again.
    """
    n = len(validation)
    for name, found in {**features, "test": test}.items():
        if len(found) != n:
            raise ValueError(f"{name!r} has {len(found)} networks, validation {n}; give as many")
    if max(sizes) >= n:
        raise ValueError(f"{max(sizes)} networks to fit to; allowed: fewer than all {n}")
    todo = [
        (_name(method, size, seed), method, size, seed)
        for size in sizes
        for method in (*features, RANDOM, BEST)
        for seed in range(seeds)
    ]
    todo = [draw for draw in todo if draw[0] not in known]
    for name, method, size, seed in tqdm(todo, desc="search", disable=not progress, leave=False):
        order = np.random.default_rng(seed).permutation(n)
        drawn, others = order[:size], order[size:]
        if method == RANDOM:
            tau, best = 0.0, drawn[np.argmax(validation[drawn])]
        elif method == BEST:
            tau, best = 1.0, np.argmax(validation)
        else:
            predicted = _predict(features[method], validation, drawn, others, seed)
            tau = float(regression.rank_correlation(predicted, validation[others]))
            best = others[np.argmax(predicted)]
        yield {"name": name, "method": method, "size": size, "tau": tau,
               "test_accuracy": float(test[best])}  # fmt: skip


def _name(method: str, size: int, seed: int) -> str:
    return f"{method}, {size}, {seed}"


def rows_of(records: Iterable[Mapping]) -> list[Row]:
    """Draws of `search_draws` by method and size, in the order in which those come."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for r in records:
        found.setdefault((r["method"], r["size"]), []).append((r["tau"], r["test_accuracy"]))
    return [
        Row(method, size, *map(regression.Result.of, zip(*draws, strict=True)))
        for (method, size), draws in found.items()
    ]


def _predict(known: Features, values, drawn, others, seed: int) -> np.ndarray:
    """What a method predicts of others when it has been told the values of the drawn."""
    if not isinstance(known, np.ndarray):
        fitted = neupred.fit([known[i] for i in drawn], values[drawn], seed=seed)
        return fitted.predict(known[i] for i in others)
    if known.ndim == 1:
        return known[others]
    return regression.fit(known[drawn], values[drawn], np.arange(len(drawn))).predict(known[others])


# --- The experiment -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks are ranked, and by what."""

    table: Path | None = None  # .npz file with `cell`, `columns` and `accuracy`
    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    dataset: str = "cifar10"  # of the table's columns: cifar10, cifar100 or imagenet
    cells: int | None = None  # so many, drawn at random; default: all that are connected
    sizes: tuple[int, ...] = (10, 50, 100, 500)  # numbers of networks to fit to
    draws: int = 5  # of them
    neupred: bool = True  # train the baseline too, which takes longest
    seed: int = 0  # of the cells that are drawn
    out: Path = Path("runs/nasbench201")  # folder for results, table and figure


def quick() -> Config:
    """200 cells, and no NeuPred: a minute on two cores."""
    return Config(
        cells=200, sizes=(10, 50), draws=2, neupred=False, out=Path("runs/quick/nasbench201")
    )


def _columns(table: Table, dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Validation and test accuracies of a dataset."""

    def column(part: str) -> np.ndarray:
        name = f"{dataset}-{part}"
        if name not in table.accuracy:
            raise ValueError(f"--dataset is {dataset!r}, but the table has no column {name!r}; it "
                             f"has {', '.join(table.accuracy)}")  # fmt: skip
        return table.accuracy[name]

    return column("val"), column("test")


def run(config: Config) -> list[Row]:
    """Ranks the networks; writes records, a table and a figure. What there is stays.

    Raises:
      ValueError: no table, or options that it does not go together with.
    """
    if config.table is None:
        raise ValueError("--table is missing; give a .npz file with cell, columns and accuracy")
    table = read(config.table)
    validation, test = _columns(table, config.dataset)
    cells = [parse_cell(text) for text in table.cells.tolist()]
    chosen = np.array([i for i, cell in enumerate(cells) if is_connected(cell)])
    if config.cells is not None:
        if not max(config.sizes) < config.cells <= len(chosen):
            raise ValueError(f"--cells is {config.cells}; allowed: {max(config.sizes) + 1} to "
                             f"{len(chosen)}")  # fmt: skip
        rng = np.random.default_rng(config.seed)
        chosen = np.sort(rng.choice(chosen, config.cells, replace=False))
    cells = [cells[i] for i in chosen]
    ghns = load_ghns(config.ghn)
    without = ("out", "sizes", "draws", "neupred")
    records = Records.open(config.out, describe("nasbench201", config, without=without), ghns=ghns)
    makers: dict[str, Callable[[], Features]] = {
        name: lambda loaded=loaded: embed_cells(*loaded, cells, progress=True)
        for name, loaded in ghns.items()
    }
    if config.neupred:
        makers["NeuPred"] = lambda: [cell_graph(cell, 1) for cell in cells]
    makers["parameters"] = lambda: np.array([count_parameters(cell) for cell in cells])
    makers["FLOPs"] = lambda: np.array([count_flops(cell) for cell in cells])
    draws = list(itertools.product(config.sizes, range(config.draws)))
    features = {
        method: make()
        for method, make in makers.items()
        if any(_name(method, *draw) not in records for draw in draws)
    }
    for record in search_draws(
        features, validation[chosen], test[chosen], config.sizes, config.draws, progress=True,
        known=records,
    ):  # fmt: skip
        records.add(record)
    rows = rows_of(records.values())
    lines = [{"method": r.method, "size": r.size, "tau": r.tau.taus.tolist(),
              "test_accuracy": r.accuracy.taus.tolist()} for r in rows]  # fmt: skip
    write_beside(config.out / "table.md", table_of(rows))
    from ghn_jax.plot.experiments import search_curves  # matplotlib is of an extra

    search_curves(lines, config.out / "nasbench201.png")
    print(f"{len(cells)} networks, {config.dataset}\n\n{table_of(rows)}")
    return rows


def table_of(rows: Sequence[Row]) -> str:
    """Markdown: Kendall's tau, and the test accuracy of the network that is taken for the best."""
    lines = ["| method | fitted to | Kendall's τ | test accuracy of the best found, % |",
             "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {r.method} | {r.size} | {r.tau.mean:.3f} ± {r.tau.std:.3f} | "
              f"{r.accuracy.mean:.2f} ± {r.accuracy.std:.2f} |" for r in rows]  # fmt: skip
    return "\n".join(lines) + "\n"
