"""How different two architectures are (paper Fig. 6h, Tables 10 and 11)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from ghn_jax.deepnets1m.graph import Graph


def hungarian_distance(a: Graph, b: Graph) -> float:
    """The least cost of matching the nodes of two graphs, by the Hungarian algorithm.

    Nodes of one primitive match at no cost; nodes of different primitives, and nodes left over,
    cost 1. Edges and parameter shapes do not count, as in the paper, whose costs are not published:
    its distances have another scale.
    """
    size = max(len(a), len(b))
    costs = np.ones((size, size))  # the smaller graph is filled up with nodes unlike any other
    costs[: len(a), : len(b)] = a.primitives[:, None] != b.primitives
    return float(costs[linear_sum_assignment(costs)].sum())
