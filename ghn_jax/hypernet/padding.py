"""Padded batches of graphs: every meta-batch has the same static shape.

`pad_graphs` joins graphs to one `jraph.GraphsTuple`, and lists the order in which the GatedGNN
updates its nodes, or which nodes the Graphormer takes together.
"""

from __future__ import annotations

from collections.abc import Sequence

import jraph
import numpy as np

from ghn_jax.deepnets1m.graph import PADDING_ID, Graph, check_graph

# Nodes that one step of the GatedGNN's sweep updates at once, at most (see `_schedule`).
SWEEP_WIDTH = 16


def _shape_code(shape: tuple[int, ...] | None) -> tuple[int, int, int, int]:
    """A parameter shape as (out, in, height, width); missing dimensions are 1 (B.1)."""
    if shape is None:
        return 0, 0, 0, 0
    out, in_, height, width = (*shape, 1, 1, 1)[:4]
    return out, in_, height, width


def _levels(n_node: int, from_: np.ndarray, to: np.ndarray) -> np.ndarray:
    """(N,) length of the longest path of real edges that ends in each node."""
    order = np.argsort(to, kind="stable")
    level = np.zeros(n_node, np.int32)
    for s, t in zip(from_[order].tolist(), to[order].tolist(), strict=True):
        if level[s] >= level[t]:
            level[t] = level[s] + 1
    return level


def _schedule(levels: np.ndarray, padding: int, width: int) -> np.ndarray:
    """(steps, width) nodes to update at each step of a sweep, `padding` where there is none.

    The GatedGNN updates a node after all those it hears from. Nodes on one topological level do
    not hear each other, so they are updated together; a wide level takes several steps.
    """
    order = np.argsort(levels, kind="stable")
    sorted_levels = levels[order]
    starts = np.flatnonzero(np.r_[True, sorted_levels[1:] != sorted_levels[:-1]])
    within = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    steps_before = np.cumsum(np.r_[0, -(-np.diff(np.r_[starts, len(order)]) // width)])
    level_index = np.cumsum(np.r_[False, sorted_levels[1:] != sorted_levels[:-1]])
    step = steps_before[level_index] + within // width
    rows = np.full((int(steps_before[-1]), width), padding, np.int32)
    rows[step, within % width] = order
    return rows


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def pad_graphs(
    graphs: Sequence[Graph],
    n_node: int | None = None,
    n_edge: int | None = None,
    *,
    n_step: int | None = None,
    width: int = SWEEP_WIDTH,
    largest: int | None = None,
) -> jraph.GraphsTuple:
    """Joins graphs to one padded graph of static shape, in jraph's convention.

    The last graph of the result is the padding: it owns the nodes and edges that fill up to
    (n_node, n_edge), one node at least, so graph i of the input is graph i of the result.

    Args:
      graphs: the graphs of a meta-batch.
      n_node, n_edge: number of nodes (at least one more than the graphs have) and of edges to pad
        to; the next power of two if not given.
      n_step: number of sweep steps to pad to; the next power of two if not given.
      width: nodes that a sweep step updates at once, at most.
      largest: nodes that each graph has room for in the Graphormer; if given, there are no sweeps.

    Returns:
      GraphsTuple with
        nodes: {'primitive': (n_node,) int32, 'shape': (n_node, 4) int32 (out, in, height, width),
          zeros without parameters};
        edges: {'distance': (n_edge,) int32}, 0 for padding;
        senders, receivers: (n_edge,) int32;
        n_node, n_edge: (len(graphs) + 1,) int32;
        globals: {'forward', 'backward': (n_step, width) int32}, the nodes that each step of
          the GatedGNN's two sweeps updates; n_node stands for none. Or, with `largest`,
          {'graphs': (len(graphs), largest) int32}, the nodes of each graph.

    Raises:
      TypeError: one of them is no graph.
      ValueError: there is no graph, or the graphs do not fit.
    """
    if not graphs:
        raise ValueError("pad_graphs was given no graphs; give one or more")
    for graph in graphs:
        check_graph(graph)
    nodes = np.array([len(g) for g in graphs], np.int32)
    edges = np.array([len(g.edges) for g in graphs], np.int32)
    n_node = next_power_of_two(int(nodes.sum()) + 1) if n_node is None else n_node
    n_edge = next_power_of_two(int(edges.sum())) if n_edge is None else n_edge
    if nodes.sum() >= n_node or edges.sum() > n_edge:
        raise ValueError(
            f"{len(graphs)} graphs with {nodes.sum()} nodes and {edges.sum()} edges do not fit "
            f"n_node={n_node} (one node is kept for padding) and n_edge={n_edge}; raise them or "
            "give fewer graphs"
        )
    offsets = np.cumsum(np.r_[0, nodes[:-1]]).astype(np.int32)

    primitive = np.full(n_node, PADDING_ID, np.int32)
    shape = np.zeros((n_node, 4), np.int32)
    senders = np.full(n_edge, n_node - 1, np.int32)
    receivers = np.full(n_edge, n_node - 1, np.int32)
    distance = np.zeros(n_edge, np.int32)
    total = int(nodes.sum())
    primitive[:total] = np.concatenate([g.primitives for g in graphs])
    shape[:total] = [_shape_code(s) for g in graphs for s in g.param_shapes]
    joined = np.concatenate([g.edges[:, :2] + o for g, o in zip(graphs, offsets, strict=True)])
    lengths = np.concatenate([g.edges[:, 2] for g in graphs])
    count = len(joined)
    senders[:count], receivers[:count], distance[:count] = joined[:, 0], joined[:, 1], lengths

    if largest is None:
        globals_ = _sweeps(joined[lengths == 1], total, n_node, n_step, width)
    else:
        globals_ = {"graphs": _apart(nodes, offsets, n_node, largest)}
    return jraph.GraphsTuple(
        nodes={"primitive": primitive, "shape": shape},
        edges={"distance": distance},
        senders=senders,
        receivers=receivers,
        n_node=np.r_[nodes, n_node - total].astype(np.int32),
        n_edge=np.r_[edges, n_edge - count].astype(np.int32),
        globals=globals_,
    )


def _apart(nodes: np.ndarray, offsets: np.ndarray, n_node: int, largest: int) -> np.ndarray:
    """(graphs, largest) nodes of each graph, n_node where it has less."""
    if nodes.max() > largest:
        raise ValueError(f"a graph has {nodes.max()} nodes, more than largest={largest}; raise it")
    places = np.arange(largest)
    return np.where(places < nodes[:, None], places + offsets[:, None], n_node).astype(np.int32)


def _sweeps(
    real: np.ndarray, total: int, n_node: int, n_step: int | None, width: int
) -> dict[str, np.ndarray]:
    """The steps of the GatedGNN's two sweeps over (M, 2) real edges of so many nodes."""
    sweeps = {}
    mirror = total - 1  # numbering nodes from the end makes the backward order topological
    for name, from_, to in (
        ("forward", real[:, 0], real[:, 1]),
        ("backward", mirror - real[:, 1], mirror - real[:, 0]),
    ):
        levels = _levels(total, from_, to)
        rows = _schedule(levels if name == "forward" else levels[::-1], n_node, width)
        sweeps[name] = rows
    steps = max(len(rows) for rows in sweeps.values())
    n_step = next_power_of_two(steps) if n_step is None else n_step
    if steps > n_step:
        raise ValueError(
            f"the graphs need {steps} sweep steps, more than n_step={n_step}; raise it"
        )
    for name, rows in sweeps.items():
        padding = np.full((n_step - len(rows), width), n_node, np.int32)
        sweeps[name] = np.concatenate([rows, padding])
    return sweeps
