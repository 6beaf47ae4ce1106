"""Statistics of architectures and their graphs: the rows of Table 1 and what Fig. 6 shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import shortest_path

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of K architectures, a column of Table 1.

    Attributes:
      cells, channels, nodes, parameters: (K,) int; channels are their C, parameters those for 32x32
        images and 10 classes.
      without_norm: (K,) bool, whether an architecture has no batch norm.
      degree, path: (K,) average degree and shortest path of each graph, of real edges without
        direction.
      primitives: (K, 15) int, nodes of each primitive.
    """

    cells: np.ndarray
    channels: np.ndarray
    nodes: np.ndarray
    parameters: np.ndarray
    without_norm: np.ndarray
    degree: np.ndarray
    path: np.ndarray
    primitives: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)


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
    rows = []
    for arch in architectures:
        graph = build_graph(arch, virtual_edges=1)
        degree, path = degree_and_path(graph.edges, len(graph))
        primitives = np.bincount(graph.primitives, minlength=len(PRIMITIVES))
        rows.append((arch.n_cells, arch.C, len(graph), count_parameters(arch), arch.norm is None,
                     degree, path, primitives))  # fmt: skip
    if not rows:
        raise ValueError("statistics was given no architectures; give one or more")
    return Statistics(*map(np.array, zip(*rows, strict=True)))


def table(columns: dict[str, Statistics]) -> str:
    """Table 1 as text: a column for each split."""

    def whole(v: np.ndarray) -> str:
        return f"{v.min()}-{v.max()}"

    def spread(v: np.ndarray) -> str:
        return f"{v.mean():.1f}±{v.std():.1f}"

    rows = {
        "graphs": lambda c: f"{len(c):,}",
        "cells": lambda c: whole(c.cells),
        "channels": lambda c: whole(c.channels),
        "nodes": lambda c: whole(c.nodes),
        "nodes, mean": lambda c: spread(c.nodes),
        "without BN": lambda c: f"{c.without_norm.mean():.1%}",
        "params (M)": lambda c: f"{c.parameters.min() / 1e6:.2f}-{c.parameters.max() / 1e6:.1f}",
        "avg degree": lambda c: spread(c.degree),
        "avg path": lambda c: spread(c.path),
    }
    lines = [" " * 12 + "".join(f"{name:>14}" for name in columns)]
    for title, text in rows.items():
        lines.append(f"{title:<12}" + "".join(f"{text(c):>14}" for c in columns.values()))
    return "\n".join(lines)
