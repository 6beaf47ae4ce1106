"""NeuPred, the paper's baseline of property prediction (§ 5.2): a graph network for one property.

    neupred = fit(graphs, accuracies)
    ranks = neupred.predict(other_graphs).argsort()

The Neural Predictor of Wen et al. (2020) with the settings of the implementation that the paper
uses. Graphs are joined, so what a node costs does not depend on how large the others are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ghn_jax.deepnets1m.graph import PADDING_ID, PRIMITIVES, Graph
from ghn_jax.hypernet.gatedgnn import linear_init
from ghn_jax.hypernet.padding import next_power_of_two

BATCH_SIZE = 10
WEIGHT_DECAY = 1e-3
DROPOUT = 0.1


class _Weighted(NamedTuple):
    """A graph with the weights of its edges, in one direction and in the other.

    With A[s, t] = 1 for an edge from s to t: forward weights are the rows of A + I, each divided by
    its sum; backward weights are the columns of those, each divided by its sum.

    Attributes:
      primitives: (N,) int32.
      senders, receivers: (E,) int32.
      self_weights: (N, 2) float32, of a node itself, forward and backward.
      edge_weights: (E, 2) float32.
    """

    primitives: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    self_weights: np.ndarray
    edge_weights: np.ndarray

    @classmethod
    def of(cls, graph: Graph) -> _Weighted:
        """The real edges of a graph."""
        edges = graph.edges[graph.edges[:, 2] == 1]
        n, senders, receivers = len(graph), edges[:, 0], edges[:, 1]
        forward = 1 / (1 + np.bincount(senders, minlength=n))
        total = forward + np.bincount(receivers, forward[senders], minlength=n)
        return cls(
            graph.primitives,
            senders,
            receivers,
            np.stack([forward, forward / total], 1).astype(np.float32),
            np.stack([forward[senders], forward[senders] / total[receivers]], 1).astype(np.float32),
        )


class _Batch(NamedTuple):
    """Some graphs as one, padded: of the last node and of edges from it to itself, all weights 0.

    Attributes:
      graph: the graphs side by side.
      owner: (N,) int32, the graph that a node belongs to; `len(n_node)` for padding.
      n_node: (B,) float32, nodes of each graph, at least 1.
    """

    graph: _Weighted
    owner: np.ndarray
    n_node: np.ndarray


def _rounded_up(n: int) -> int:
    """The next of few sizes, a quarter more at most: programs are compiled for each."""
    step = max(64, next_power_of_two(n) // 8)
    return -(-n // step) * step


def _join(graphs: Sequence[_Weighted], size: int) -> _Batch:
    """Joins up to `size` graphs."""
    counts = [len(g.primitives) for g in graphs]
    offsets = np.cumsum([0, *counts[:-1]]).astype(np.int32)
    joined = _Weighted(
        np.concatenate([g.primitives for g in graphs]),
        np.concatenate([g.senders + o for g, o in zip(graphs, offsets, strict=True)]),
        np.concatenate([g.receivers + o for g, o in zip(graphs, offsets, strict=True)]),
        np.concatenate([g.self_weights for g in graphs]),
        np.concatenate([g.edge_weights for g in graphs]),
    )
    n = _rounded_up(len(joined.primitives) + 1)
    m = _rounded_up(max(len(joined.senders), n * 5 // 4))  # mostly the same for all of n nodes
    padded = _Weighted(
        _pad(joined.primitives, n, PADDING_ID),
        _pad(joined.senders, m, n - 1),
        _pad(joined.receivers, m, n - 1),
        _pad(joined.self_weights, n, 0),
        _pad(joined.edge_weights, m, 0),
    )
    owner = np.repeat(np.arange(len(graphs), dtype=np.int32), counts)
    n_node = _pad(np.array(counts, np.float32), size, 1)
    return _Batch(padded, _pad(owner, n, size), n_node)


def _pad(array: np.ndarray, n: int, value) -> np.ndarray:
    padded = np.full((n, *array.shape[1:]), value, array.dtype)
    padded[: len(array)] = array
    return padded


class _DirectedConvolution(nn.Module):
    """Means over what a node leads to and over what leads to it, each with weights of its own."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, graph: _Weighted, *, train: bool) -> jax.Array:
        """(N, c) -> (N, features)."""
        ways = ("forward", graph.receivers, graph.senders), (
            "backward", graph.senders, graph.receivers)  # fmt: skip
        total = jnp.zeros((x.shape[0], self.features), x.dtype)
        for i, (name, from_, to) in enumerate(ways):
            heard = jnp.asarray(graph.self_weights[:, i, None] * x)
            heard = heard.at[to].add(graph.edge_weights[:, i, None] * x[from_])
            shape = (x.shape[1], self.features)
            total += nn.relu(heard @ self.param(name, nn.initializers.xavier_uniform(), shape))
        return nn.Dropout(DROPOUT, deterministic=not train)(total / len(ways))


class _Network(nn.Module):
    """Three directed convolutions, the mean over nodes and two linear layers; no biases."""

    @nn.compact
    def __call__(self, batch: _Batch, *, train: bool) -> jax.Array:
        """(B,) values of the graphs, with zero mean and unit variance among those fitted to."""
        x = jax.nn.one_hot(batch.graph.primitives, len(PRIMITIVES))
        for i in range(3):
            x = _DirectedConvolution(144, name=f"gcn_{i}")(x, batch.graph, train=train)
        n = len(batch.n_node)
        x = jax.ops.segment_sum(x, batch.owner, n) / batch.n_node[:, None]
        x = nn.Dense(128, use_bias=False, kernel_init=linear_init, name="fc1")(x)
        x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        return nn.Dense(1, use_bias=False, kernel_init=linear_init, name="fc2")(x)[:, 0]


_NETWORK = _Network()


# PyTorch's Adam with weight decay: of the gradient.
_OPTIMIZER = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.scale_by_adam())


@jax.jit
def _init(key, batch: _Batch):
    params = _NETWORK.init(key, batch, train=False)["params"]
    return params, _OPTIMIZER.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _update(params, opt_state, key, batch: _Batch, targets, learning_rate):
    key, dropout = jax.random.split(key)

    def loss(params):
        rngs = {"dropout": dropout}
        predicted = _NETWORK.apply({"params": params}, batch, train=True, rngs=rngs)
        return jnp.square(predicted - targets).mean()

    changes, opt_state = _OPTIMIZER.update(jax.grad(loss)(params), opt_state, params)
    params = jax.tree.map(lambda p, c: p - learning_rate * c, params, changes)
    return params, opt_state, key


@jax.jit
def _predict(params, batch: _Batch) -> jax.Array:
    return cast(jax.Array, _NETWORK.apply({"params": params}, batch, train=False))


class NeuPred(NamedTuple):
    """A fitted predictor.

    Attributes:
      params: of the network.
      mean, std: of the values that it was fitted to.
    """

    params: Any
    mean: float
    std: float

    def predict(self, graphs: Iterable[Graph]) -> np.ndarray:
        """(N,) predicted values of N graphs, which are read as they are needed."""
        found = []
        graphs = iter(graphs)
        while group := list(itertools.islice(graphs, 32)):
            batch = _join([_Weighted.of(g) for g in group], 32)
            found.append(_predict(self.params, batch)[: len(group)])
        return np.concatenate(found) * self.std + self.mean


def fit(
    graphs: Sequence[Graph],
    values: np.ndarray,
    *,
    epochs: int = 300,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: bool = False,
) -> NeuPred:
    """Trains a predictor of one property.

    Adam on the mean squared error, with L2 regularisation as PyTorch's Adam has it and a learning
    rate that falls as a cosine, changed once an epoch. An epoch's last batch is left out where it
    has fewer than ten graphs.

    Args:
      graphs: the networks'; only real edges count.
      values: (N,) the property.
      epochs: number of passes.
      learning_rate: at the start.
      seed: of parameters, order and dropout.
      progress: shows a bar.

    Raises:
      ValueError: fewer than ten graphs, not one value for each, or a value that is not finite.
    """
    y = np.asarray(values, np.float64)
    if len(graphs) < BATCH_SIZE or y.shape != (len(graphs),):
        raise ValueError(
            f"{len(graphs)} graphs and values of shape {y.shape}; allowed: {BATCH_SIZE} graphs or "
            "more, and one value for each"
        )
    if not np.isfinite(y).all():
        raise ValueError(f"{(~np.isfinite(y)).sum()} of the values are not finite")
    mean, std = float(y.mean()), float(y.std()) or 1.0
    targets = ((y - mean) / std).astype(np.float32)
    weighted = [_Weighted.of(g) for g in graphs]
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    params, opt_state = _init(key, _join(weighted[:1], BATCH_SIZE))
    for epoch in tqdm(range(epochs), desc="NeuPred", disable=not progress, leave=False):
        rate = np.float32(learning_rate * (1 + np.cos(np.pi * epoch / epochs)) / 2)
        order = rng.permutation(len(graphs))
        for i in range(0, len(graphs) - BATCH_SIZE + 1, BATCH_SIZE):
            rows = order[i : i + BATCH_SIZE]
            batch = _join([weighted[j] for j in rows], BATCH_SIZE)
            params, opt_state, key = _update(params, opt_state, key, batch, targets[rows], rate)
    return NeuPred(jax.device_get(params), mean, std)
