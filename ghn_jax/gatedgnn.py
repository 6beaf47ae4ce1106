"""The graph hypernetwork's encoder: GatedGNN with virtual edges (paper § 2.2, § 4.2, Eqs. 3-4)."""

from __future__ import annotations

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


class GatedGNN(nn.Module):
    """Sweeps once over the graph forwards and once backwards (Eqs. 3 and 4, T = 1).

    A node hears its neighbours' already updated states, so nodes are updated in topological order,
    up to `SWEEP_WIDTH` at a time (`graph._schedule`). What a node says is computed once, when it
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
          graph: padded batch from `graph.pad_graphs` with N nodes.

        Returns:
          (N, d) states after both sweeps.
        """
        d = self.features
        hidden = d // 2 if self.virtual else d
        names = ("mlp", "mlp_virtual") if self.virtual else ("mlp",)
        mlps = [
            (
                dense_params(self, f"{name}_0", d, hidden),
                dense_params(self, f"{name}_1", hidden, d),
            )
            for name in names
        ]
        cell = {
            "input": dense_params(self, "gru_input", d, 3 * d),
            "hidden": dense_params(self, "gru_hidden", d, 3 * d),
        }
        n = x.shape[0]
        distance = graph.edges["distance"]
        weight = jnp.where(distance > 0, 1 / jnp.maximum(distance, 1), 0.0).astype(x.dtype)
        matrix = jnp.zeros((n, n), x.dtype).at[graph.receivers, graph.senders].add(weight)

        def sweep(state, matrix, schedule):
            def step(carry, nodes):
                state, said = carry
                rows = matrix.at[nodes].get(mode="fill", fill_value=0)
                real = (rows == 1).astype(rows.dtype)
                message = real @ said[0]
                if self.virtual:
                    message += (rows if self.virtual_includes_real else rows - real) @ said[1]
                new = gru(cell, message, state.at[nodes].get(mode="fill", fill_value=0))
                state = state.at[nodes].set(new, mode="drop")
                said = [
                    s.at[nodes].set(mlp(p, new), mode="drop")
                    for s, p in zip(said, mlps, strict=True)
                ]
                return (state, said), None

            said = [jnp.zeros_like(state) for _ in mlps]
            return lax.scan(step, (state, said), schedule)[0][0]

        x = sweep(x, matrix, graph.globals["forward"])
        return sweep(x, matrix.T, graph.globals["backward"])


class NodeMLP(nn.Module):
    """The paper's MLP baseline: node states without any message passing (§ 5.1)."""

    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """(N, d) -> (N, d); the graph's edges are ignored."""
        del graph
        d = self.features
        return mlp([dense_params(self, f"mlp_{i}", d, d) for i in range(2)], x)
