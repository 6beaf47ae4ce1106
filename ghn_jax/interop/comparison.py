"""How far our numbers are from the authors', and which of our nodes is which of theirs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph


def relative_error(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||; infinite where shapes differ or a number is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    norm = np.linalg.norm(theirs)
    return float(np.linalg.norm(ours - theirs) / (norm or 1.0))


def _mix(x: np.ndarray) -> np.ndarray:
    """Uint64 numbers in which every bit depends on every bit of `x` (SplitMix64's last steps)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _colours(labels: list, edges: np.ndarray, rounds: int = 4) -> list[int]:
    """Weisfeiler-Lehman colours: what a node is, and what is at which distance from it."""
    colours = _mix(np.array([hash(label) for label in labels], np.int64).astype(np.uint64))
    source, target, distance = np.asarray(edges, np.int64).T
    to, back = (_mix((2 * distance + way).astype(np.uint64)) for way in (1, 2))
    for _ in range(rounds):
        # A sum, as neighbours have no order.
        around = np.zeros_like(colours)
        np.add.at(around, target, _mix(colours[source] + to))
        np.add.at(around, source, _mix(colours[target] + back))
        colours = _mix(colours + _mix(around))
    return colours.tolist()


def compare_graphs(ours: tuple[list, np.ndarray], theirs: tuple[list, np.ndarray]):
    """(number of nodes that match none of the other's, our nodes in their order).

    Args:
      ours, theirs: a label for each node, and (M, 3) edges with distances.
    """
    a, b = _colours(*ours), _colours(*theirs)
    places: dict[int, list[int]] = {}
    for node, colour in enumerate(a):
        places.setdefault(colour, []).append(node)
    order = [places[c].pop(0) if places.get(c) else -1 for c in b]
    return abs(len(a) - len(b)) + order.count(-1), order


def labels(primitives, shapes) -> list[tuple]:
    """What `compare_graphs` is to know about each node: primitive and shape of its parameter."""
    pools = ("max_pool", "avg_pool")  # their kernel is no parameter
    return [
        (name, None if name in pools or shape is None else tuple(shape))
        for name, shape in zip(primitives, shapes, strict=True)
    ]


def match_nodes(entry: Mapping, file: Mapping, graph: Graph) -> tuple[int, list[int]]:
    """(number of nodes and edges that differ, our nodes in their order).

    Args:
      entry: of the network in `index.json`.
      file: the network's file.
      graph: ours.
    """
    names = entry.get("primitives", PRIMITIVES)
    theirs = [names[p] for p in file["node_primitive"]]
    ours = [PRIMITIVES[p] for p in graph.primitives]
    wrong, order = compare_graphs(
        (labels(ours, graph.param_shapes), graph.edges),
        (labels(theirs, entry["node_param_shapes"]), file["edges"]),
    )
    return wrong + abs(len(graph.edges) - len(file["edges"])), order
