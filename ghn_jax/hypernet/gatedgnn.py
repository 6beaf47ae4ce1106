"""The graph hypernetwork's encoder: GatedGNN with virtual edges (paper § 2.2, § 4.2, Eqs. 3-4)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jax import lax

# PyTorch's default for linear layers: uniform in ±1/sqrt(fan in), biases too. The authors trained
# with it, and the decoders' scale at the start depends on it.
linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int):
    """Initialiser of a bias whose layer has `fan_in` inputs."""
    bound = fan_in**-0.5
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def dense_params(module: nn.Module, name: str, n_in: int, n_out: int, fan_in: int | None = None):
    """Creates the parameters {'kernel': (n_in, n_out), 'bias': (n_out,)} of a linear layer."""
    fan_in = fan_in or n_in
    return module.param(
        name,
        lambda key: {
            "kernel": jax.random.uniform(
                key, (n_in, n_out), minval=-(fan_in**-0.5), maxval=fan_in**-0.5
            ),
            "bias": bias_init(fan_in)(jax.random.fold_in(key, 1), (n_out,)),
        },
    )


def dense(params, x):
    """Applies a linear layer to (..., n_in)."""
    return x @ params["kernel"] + params["bias"]


def mlp(params, x):
    """Linear, ReLU, Linear, ReLU; the last ReLU is the authors'."""
    return nn.relu(dense(params[1], nn.relu(dense(params[0], x))))


def gru(params, message, hidden):
    """One GRU update (W, d), (W, d) -> (W, d) in PyTorch's convention.

    The reset gate acts on the hidden part of the candidate after its bias.
    """
    ri, zi, ni = jnp.split(dense(params["input"], message), 3, axis=-1)
    rh, zh, nh = jnp.split(dense(params["hidden"], hidden), 3, axis=-1)
    reset, update = nn.sigmoid(ri + rh), nn.sigmoid(zi + zh)
    candidate = jnp.tanh(ni + reset * nh)
    return (1 - update) * candidate + update * hidden


class _Layers(NamedTuple):
    """Parameters of the encoder: MLPs of real and (if there are) virtual edges, and the GRU."""

    mlps: tuple
    cell: dict


def _weights(rows: jax.Array, layers: _Layers, virtual_includes_real: bool) -> list[jax.Array]:
    """(W, N) rows of a matrix of edge weights -> for each MLP, how much each edge counts."""
    real = (rows == 1).astype(rows.dtype)
    if len(layers.mlps) == 1:
        return [real]
    return [real, rows if virtual_includes_real else rows - real]


def _take(array: jax.Array, nodes: jax.Array) -> jax.Array:
    """Rows of some nodes; zeros for those that pad a schedule."""
    return array.at[nodes].get(mode="fill", fill_value=0)


def _put(array: jax.Array, nodes: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[nodes].set(rows, mode="drop")


def _walk(schedule: jax.Array, step: Callable, carry, *, reverse: bool = False):
    """`step(carry, nodes) -> carry` for every row of a schedule.

    The last rows may be empty. CPUs leave them out; accelerators do them, as a loop whose length
    is known does not make the host wait for the device in every step.
    """
    schedule = jnp.asarray(schedule)
    count = len(schedule)
    if jax.default_backend() == "cpu":
        count = (schedule != len(jax.tree.leaves(carry)[0])).any(1).sum()

    def one(i, carry):
        return step(carry, schedule[count - 1 - i if reverse else i])

    return lax.fori_loop(0, count, one, carry)


def _say(layers: _Layers, state: jax.Array) -> list[jax.Array]:
    return [mlp(p, state) for p in layers.mlps]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sweep(
    virtual_includes_real: bool,
    layers: _Layers,
    x: jax.Array,
    matrix: jax.Array,
    schedule: jax.Array,
) -> jax.Array:
    """Updates (N, d) states once, in the order of a schedule (Eq. 3 or 4 in one direction).

    Args:
      virtual_includes_real: see `GatedGNN`.
      layers: the parameters.
      x: the states.
      matrix: (N, N) weights of edges, [receiver, sender].
      schedule: (S, W) nodes to update together; N for none.
    """
    return _sweep_forward(virtual_includes_real, layers, x, matrix, schedule)[0]


def _sweep_forward(virtual_includes_real, layers, x, matrix, schedule):
    def step(carry, nodes):
        state, messages, said = carry
        weights = _weights(_take(matrix, nodes), layers, virtual_includes_real)
        message = sum(w @ s for w, s in zip(weights, said, strict=True))
        new = gru(layers.cell, message, _take(state, nodes))
        said = [_put(s, nodes, m) for s, m in zip(said, _say(layers, new), strict=True)]
        return _put(state, nodes, new), _put(messages, nodes, message), said

    nothing = jnp.zeros_like(x)
    carry = x, nothing, [nothing for _ in layers.mlps]
    state, messages, _ = _walk(schedule, step, carry)
    return state, (layers, x, matrix, schedule, state, messages)


def _sweep_backward(virtual_includes_real, residuals, g):
    """Nodes in reverse: what those that heard a node hand back is one product, as forwards.

    Autodiff would add to the cotangents of all nodes in every step. Parameters' gradients are taken
    of all nodes at once, after the loop.
    """
    layers, x, matrix, schedule, state, messages = residuals
    matrix = matrix.T

    def step(carry, nodes):
        dmessages, dsaid, dnew, dx = carry
        weights = _weights(_take(matrix, nodes), layers, virtual_includes_real)
        said = [w @ dmessages for w in weights]
        new = _take(g, nodes) + jax.vjp(lambda s: _say(layers, s), _take(state, nodes))[1](said)[0]
        hidden = _take(messages, nodes), _take(x, nodes)
        message, old = jax.vjp(functools.partial(gru, layers.cell), *hidden)[1](new)
        dsaid = [_put(a, nodes, b) for a, b in zip(dsaid, said, strict=True)]
        return (
            _put(dmessages, nodes, message), dsaid, _put(dnew, nodes, new), _put(dx, nodes, old),
        )  # fmt: skip

    nothing = jnp.zeros_like(x)
    carry = nothing, [nothing for _ in layers.mlps], nothing, g
    _, dsaid, dnew, dx = _walk(schedule, step, carry, reverse=True)
    dlayers = jax.vjp(lambda p: (_say(p, state), gru(p.cell, messages, x)), layers)[1]
    return dlayers((dsaid, dnew))[0], dx, None, None


sweep.defvjp(_sweep_forward, _sweep_backward)


class GatedGNN(nn.Module):
    """Sweeps once over the graph forwards and once backwards (Eqs. 3 and 4, T = 1).

    A node hears its neighbours' already updated states, so nodes are updated in topological order,
    up to `SWEEP_WIDTH` at a time (`padding._schedule`). What a node says is computed once, when it
    is updated; what it hears is one row of a dense matrix of edge weights times what all have said.
    Graphs of the DARTS space are nearly complete with virtual edges up to 50, so dense is right.

    Attributes:
      features: d, size of a node's state.
      virtual: whether virtual edges exist (GHN-2); without them their MLP has no parameters and
        the other one is twice as wide, as in the authors' models.
      virtual_includes_real: whether the sum over virtual edges includes the real ones
        (s >= 1), as the released checkpoints need; the paper's Eq. 4 has 1 < s.
    """

    features: int = 32
    virtual: bool = True
    virtual_includes_real: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """Updates node states.

        Args:
          x: (N, d) initial states.
          graph: padded batch from `padding.pad_graphs` with N nodes.

        Returns:
          (N, d) states after both sweeps.
        """
        d = self.features
        hidden = d // 2 if self.virtual else d
        names = ("mlp", "mlp_virtual") if self.virtual else ("mlp",)
        mlps = tuple(
            (
                dense_params(self, f"{name}_0", d, hidden),
                dense_params(self, f"{name}_1", hidden, d),
            )
            for name in names
        )
        cell = {
            "input": dense_params(self, "gru_input", d, 3 * d),
            "hidden": dense_params(self, "gru_hidden", d, 3 * d),
        }
        n = x.shape[0]
        distance = graph.edges["distance"]
        weight = jnp.where(distance > 0, 1 / jnp.maximum(distance, 1), 0.0).astype(x.dtype)
        matrix = jnp.zeros((n, n), x.dtype).at[graph.receivers, graph.senders].add(weight)
        run = functools.partial(sweep, self.virtual_includes_real, _Layers(mlps, cell))
        return run(run(x, matrix, graph.globals["forward"]), matrix.T, graph.globals["backward"])


class NodeMLP(nn.Module):
    """The paper's MLP baseline: node states without any message passing (§ 5.1)."""

    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """(N, d) -> (N, d); the graph's edges are ignored."""
        del graph
        d = self.features
        return mlp([dense_params(self, f"mlp_{i}", d, d) for i in range(2)], x)
