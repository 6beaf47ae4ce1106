"""Statistics of architectures and their graphs: the rows of Table 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from ghn_jax.architecture import Architecture
from ghn_jax.counts import count_parameters
from ghn_jax.graph import build_graph


@dataclasses.dataclass(frozen=True)
class Spread:
    """A quantity over the architectures of a split."""

    low: float
    high: float
    mean: float
    std: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of one value or more."""
        return cls(min(values), max(values), float(np.mean(values)), float(np.std(values)))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A column of Table 1.

    Attributes:
      graphs: number of architectures.
      cells, channels, nodes: of each architecture; `channels` is its C.
      without_norm: fraction of the architectures without batch norm.
      millions: of parameters, for 32x32 images and 10 classes.
      degree, path: average degree and shortest path of each graph, of real edges without direction.
    """

    graphs: int
    cells: Spread
    channels: Spread
    nodes: Spread
    without_norm: float
    millions: Spread
    degree: Spread
    path: Spread


def degree_and_path(edges: np.ndarray, n_node: int) -> tuple[float, float]:
    """A graph's average degree and average shortest path length, without direction (Table 1).

    Args:
      edges: (M, 2) or (M, 3) real edges, source and target first.
      n_node: number of nodes.
    """
    source, target = edges[:, 0], edges[:, 1]
    adjacency = coo_array((np.ones(len(edges)), (source, target)), shape=(n_node, n_node))
    lengths = shortest_path(adjacency.tocsr(), directed=False, unweighted=True)
    return 2 * len(edges) / n_node, float(lengths.sum() / (n_node * (n_node - 1)))


def statistics(architectures: Iterable[Architecture]) -> Statistics:
    """Statistics of one architecture or more.

    Raises:
      ValueError: there is none.
    """
    columns: dict[str, list] = {
        k: [] for k in ("cells", "channels", "nodes", "norm", "millions", "degree", "path")
    }
    for arch in architectures:
        graph = build_graph(arch, virtual_edges=1)
        degree, path = degree_and_path(graph.edges, len(graph))
        values = (arch.n_cells, arch.C, len(graph), arch.norm is None,
                  count_parameters(arch) / 1e6, degree, path)  # fmt: skip
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    if not columns["nodes"]:
        raise ValueError("statistics was given no architectures; give one or more")
    without_norm = float(np.mean(columns.pop("norm")))
    spreads = {name: Spread.of(values) for name, values in columns.items()}
    return Statistics(len(columns["nodes"]), without_norm=without_norm, **spreads)


def table(columns: dict[str, Statistics]) -> str:
    """Table 1 as text: a column for each split."""

    def whole(s: Spread) -> str:
        return f"{s.low:.0f}-{s.high:.0f}"

    def spread(s: Spread) -> str:
        return f"{s.mean:.1f}±{s.std:.1f}"

    rows = {
        "graphs": lambda c: str(c.graphs),
        "cells": lambda c: whole(c.cells),
        "channels": lambda c: whole(c.channels),
        "nodes": lambda c: whole(c.nodes),
        "nodes, mean": lambda c: spread(c.nodes),
        "without BN": lambda c: f"{c.without_norm:.1%}",
        "params (M)": lambda c: f"{c.millions.low:.2f}-{c.millions.high:.1f}",
        "avg degree": lambda c: spread(c.degree),
        "avg path": lambda c: spread(c.path),
    }
    lines = [" " * 12 + "".join(f"{name:>14}" for name in columns)]
    for title, text in rows.items():
        lines.append(f"{title:<12}" + "".join(f"{text(c):>14}" for c in columns.values()))
    return "\n".join(lines)
