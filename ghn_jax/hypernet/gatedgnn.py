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


def dense_params(
    module: nn.Module,
    name: str,
    n_in: int,
    n_out: int,
    fan_in: int | None = None,
    *,
    small: bool = False,
):
    """Creates the parameters {'kernel': (n_in, n_out), 'bias': (n_out,)} of a linear layer.

    A small one begins with a fifth of the weights, and biases of zero.
    """
    if module.has_variable("params", name):
        # `param` would trace the function below again, to compare shapes, in every program.
        return module.get_variable("params", name)
    fan_in = fan_in or n_in
    bound = fan_in**-0.5 / (5 if small else 1)
    return module.param(
        name,
        lambda key: {
            "kernel": jax.random.uniform(key, (n_in, n_out), minval=-bound, maxval=bound),
            "bias": jnp.zeros(n_out)
            if small
            else bias_init(fan_in)(jax.random.fold_in(key, 1), (n_out,)),
        },
    )


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """(..., n) + (n,), broadcast in so many words, as `jax_numpy_rank_promotion` may demand."""
    return x + jnp.broadcast_to(bias, x.shape)


def dense(params, x):
    """Applies a linear layer to (..., n_in)."""
    return add_bias(x @ params["kernel"], params["bias"])


def mlp(params, x):
    """Linear, ReLU, Linear, ReLU; the last ReLU is the authors'."""
    return nn.relu(dense(params[1], nn.relu(dense(params[0], x))))


class _Layers(NamedTuple):
    """Parameters of the encoder: MLPs of real and (if there are) virtual edges, and the GRU."""

    mlps: tuple
    cell: dict


class _Joined(NamedTuple):
    """The same parameters, joined so that a step is few products: on a GPU each costs a launch.

    Attributes:
      first: (d, K h) kernel and bias of the K MLPs' first layers, side by side.
      second: (K, h, d) kernels and (K, 1, d) biases of their second layers.
      cell: (2 d, 4 d) kernel and bias of the GRU, from message and hidden state to reset gate,
        update gate, and the two parts of the candidate.
    """

    first: tuple[jax.Array, jax.Array]
    second: tuple[jax.Array, jax.Array]
    cell: tuple[jax.Array, jax.Array]


def _join(layers: _Layers) -> _Joined:
    firsts, seconds = zip(*layers.mlps, strict=True)
    names = ("kernel", "bias")

    def cell(name: str) -> tuple[jax.Array, jax.Array]:
        given, held = (jnp.split(layers.cell[part][name], 3, -1) for part in ("input", "hidden"))
        none = jnp.zeros_like(given[2])
        return jnp.concatenate([*given, none], -1), jnp.concatenate([*held[:2], none, held[2]], -1)

    kernels, biases = (jnp.stack([p[name] for p in seconds]) for name in names)
    return _Joined(
        first=tuple(jnp.concatenate([p[name] for p in firsts], -1) for name in names),
        second=(kernels, biases[:, None]),
        cell=(jnp.concatenate(cell("kernel")), sum(cell("bias"))),
    )


def _say(joined: _Joined, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(W, d) states -> (W, K h) hidden layers, and (K, W, d) what the nodes say."""
    (kernel, bias), (kernels, biases) = joined.first, joined.second
    hidden = nn.relu(add_bias(state @ kernel, bias))
    apart = hidden.reshape(len(state), len(kernels), -1)
    return hidden, nn.relu(jnp.einsum("wkh,khd->kwd", apart, kernels) + biases)


def _gates(joined: _Joined, message: jax.Array, state: jax.Array) -> tuple[jax.Array, ...]:
    """(W, d) reset and update gates, candidate, and the candidate's part of the hidden state."""
    kernel, bias = joined.cell
    both = jnp.concatenate([message, state], -1)
    reset, update, given, held = jnp.split(add_bias(both @ kernel, bias), 4, axis=-1)
    reset, update = nn.sigmoid(reset), nn.sigmoid(update)
    return reset, update, jnp.tanh(given + reset * held), held


def _gru(joined: _Joined, message: jax.Array, state: jax.Array) -> jax.Array:
    """One GRU update (W, d), (W, d) -> (W, d) in PyTorch's convention.

    The reset gate acts on the hidden part of the candidate after its bias.
    """
    _, update, candidate, _ = _gates(joined, message, state)
    return (1 - update) * candidate + update * state


def _weights(rows: jax.Array, count: int, virtual_includes_real: bool) -> list[jax.Array]:
    """(W, N) rows of a matrix of edge weights -> for each MLP, how much each edge counts."""
    real = (rows == 1).astype(rows.dtype)
    return [real, rows if virtual_includes_real else rows - real][:count]


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
    joined, count = _join(layers), len(layers.mlps)

    def step(carry, nodes):
        found, said = carry
        weights = _weights(_take(matrix, nodes), count, virtual_includes_real)
        message = sum(w @ s for w, s in zip(weights, said, strict=True))
        new = _gru(joined, message, _take(x, nodes))
        found = _put(found, nodes, jnp.concatenate([new, message], -1))
        return found, [_put(s, nodes, m) for s, m in zip(said, _say(joined, new)[1], strict=True)]

    carry = jnp.concatenate([x, jnp.zeros_like(x)], -1), [jnp.zeros_like(x)] * count
    found, said = _walk(schedule, step, carry)
    state, messages = jnp.split(found, 2, -1)
    return state, (layers, x, matrix, schedule, state, messages, said)


def _sweep_backward(virtual_includes_real, residuals, g):
    """Nodes in reverse: what those that heard a node hand back is one product, as forwards.

    Autodiff would add to the cotangents of all nodes in every step. What does not depend on
    cotangents is computed of all nodes at once, before the loop, and parameters' gradients after.
    """
    layers, x, matrix, schedule, state, messages, said = residuals
    joined, count, d = _join(layers), len(layers.mlps), x.shape[1]
    (first, _), (second, _), (cell, _) = joined
    reset, update, candidate, held = _gates(joined, messages, x)
    # Of a step's GRU: the derivatives of its state by what goes into gates and candidate.
    given = (1 - update) * (1 - candidate**2)
    inner = jnp.stack(
        [
            given * held * reset * (1 - reset), (x - candidate) * update * (1 - update),
            given, given * reset,
        ],
        axis=1,
    )  # fmt: skip
    # And of its MLPs: which units are on.
    on = _say(joined, state)[0] > 0, jnp.stack(said, 1) > 0
    matrix = matrix.T

    def step(carry, nodes):
        dmessages, found = carry
        weights = _weights(_take(matrix, nodes), count, virtual_includes_real)
        dsaid = jnp.stack([w @ dmessages for w in weights], 1)
        heard = jnp.where(_take(on[1], nodes), dsaid, 0)
        heard = jnp.einsum("wkd,khd->wkh", heard, second).reshape(len(nodes), -1)
        new = _take(g, nodes) + jnp.where(_take(on[0], nodes), heard, 0) @ first.T
        dmessage = (new[:, None] * _take(inner, nodes)).reshape(len(nodes), -1) @ cell[:d].T
        rows = jnp.concatenate([new[:, None], dsaid], 1)
        return _put(dmessages, nodes, dmessage), _put(found, nodes, rows)

    carry = jnp.zeros_like(x), jnp.zeros((len(x), 1 + count, d), x.dtype)
    _, found = _walk(schedule, step, carry, reverse=True)
    dnew, dsaid = found[:, 0], jnp.moveaxis(found[:, 1:], 1, 0)
    dx = dnew * update + (dnew[:, None] * inner).reshape(len(x), -1) @ cell[d:].T
    updated = jnp.zeros(len(x), bool).at[schedule].set(True, mode="drop")

    def of_all(layers):
        joined = _join(layers)
        return _say(joined, state)[1], _gru(joined, messages, x)

    dlayers = jax.vjp(of_all, layers)[1]
    return dlayers((dsaid, dnew))[0], jnp.where(updated[:, None], dx, g), None, None


sweep.defvjp(_sweep_forward, _sweep_backward)


class GatedGNN(nn.Module):
    """Sweeps over the graph forwards and backwards (Eqs. 3 and 4), once unless told otherwise.

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
      rounds: T of Eq. 3, how often both sweeps are made, with the same parameters.
      forward_only: leave the backward sweeps out (Table 8, "π = only fw").
    """

    features: int = 32
    virtual: bool = True
    virtual_includes_real: bool = False
    rounds: int = 1
    forward_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """Updates node states.

        Args:
          x: (N, d) initial states.
          graph: padded batch from `padding.pad_graphs` with N nodes.

        Returns:
          (N, d) states after the last sweep.
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

        def once(x: jax.Array) -> jax.Array:
            x = run(x, matrix, graph.globals["forward"])
            return x if self.forward_only else run(x, matrix.T, graph.globals["backward"])

        if self.rounds == 1:
            return once(x)
        return lax.scan(lambda x, _: (once(x), None), x, length=self.rounds)[0]


class NodeMLP(nn.Module):
    """The paper's MLP baseline: node states without any message passing (§ 5.1)."""

    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """(N, d) -> (N, d); the graph's edges are ignored."""
        del graph
        d = self.features
        return mlp([dense_params(self, f"mlp_{i}", d, d) for i in range(2)], x)
