"""Embeddings of whole networks: the mean of their nodes' final states (paper § 5.2)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import jraph
import numpy as np

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.padding import next_power_of_two, pad_graphs

WINDOW = 16  # batches that are read ahead, to find graphs of about the same size
WIDTH = 2  # of sweeps: a single graph's levels have less than two nodes on average


@functools.partial(jax.jit, static_argnums=0)
def _means(ghn: GHN, variables, graphs: jraph.GraphsTuple) -> jax.Array:
    """(B, d) mean state of the nodes of each of B graphs that were padded one by one."""

    def mean(graph: jraph.GraphsTuple) -> jax.Array:
        states, n = cast(jax.Array, ghn.apply(variables, graph)), graph.n_node[0]
        real = jnp.arange(len(states)) < n
        return jnp.where(real[:, None], states, 0).sum(0) / n

    # A CPU has no use for more work at once, and walks a graph's levels only as far as they go.
    over_graphs = jax.lax.map if jax.default_backend() == "cpu" else lambda f, x: jax.vmap(f)(x)
    return over_graphs(mean, graphs)


def _rounded_up(n: int) -> int:
    """The next power of two, or three quarters of it."""
    size = next_power_of_two(n)
    return size * 3 // 4 if n <= size * 3 // 4 else size


def _stack(graphs: Sequence[Graph], size: int) -> jraph.GraphsTuple:
    """Up to `size` graphs, each padded to the same size; the last again where there are fewer."""
    n_node = _rounded_up(max(len(g) for g in graphs) + 1)
    n_edge = next_power_of_two(max(len(g.edges) for g in graphs))
    padded = [pad_graphs([g], n_node, n_edge, n_step=n_node, width=WIDTH) for g in graphs]
    padded += [padded[-1]] * (size - len(padded))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *padded)


def embed_graphs(
    ghn: GHN, variables, graphs: Iterable[Graph], *, batch_size: int = 32
) -> np.ndarray:
    """Embeds any number of networks.

    A program is compiled for each of a few sizes of graphs. Graphs are read as they are needed, so
    that not all have to be in memory.

    Args:
      ghn: the hypernetwork.
      variables: of it.
      graphs: of the networks, with the hypernetwork's virtual edges (`GHN.graph`).
      batch_size: graphs in a batch.

    Returns:
      (N, d) float32, the mean of `GHN.embed` over each network's nodes.
    """
    graphs = iter(graphs)
    found = []
    while window := list(itertools.islice(graphs, WINDOW * batch_size)):
        order = np.argsort([len(g) for g in window], kind="stable")
        computed = []  # the device computes while the next graphs are padded
        for start in range(0, len(window), batch_size):
            rows = order[start : start + batch_size]
            batch = _stack([window[i] for i in rows], batch_size)
            computed.append((rows, _means(ghn, variables, batch)))
        means = np.zeros((len(window), ghn.features), np.float32)
        for rows, some in computed:
            means[rows] = some[: len(rows)]
        found.append(means)
    return np.concatenate(found) if found else np.zeros((0, ghn.features), np.float32)
