"""The encoder of GHN-3: a Transformer over all pairs of a graph's nodes.

Knyazev et al., "Can We Scale Transformers to Predict Parameters of Diverse ImageNet Models?"
(arXiv:2303.04143), § 3. It has no order of nodes, so graphs are encoded side by side.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph

from ghn_jax.hypernet.gatedgnn import dense, dense_params, linear_init

# Numbers that the tables of embeddings go up to; the authors' checkpoints have as many rows.
LARGEST_DEGREE = 100
LARGEST_INPUT_DISTANCE = 1000
LARGEST_DISTANCE = 254


def table_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialises an embedding: normal with deviation width^(-1/2), cut off at -2 and 2."""
    deviation = shape[-1] ** -0.5
    return deviation * jax.random.truncated_normal(key, -2 / deviation, 2 / deviation, shape)


def nodes_apart(graph: jraph.GraphsTuple) -> jax.Array:
    """(B, M) the nodes of each graph of a padded batch; its number of nodes stands for none.

    Where `pad_graphs` was not told how many nodes M the largest graph has, M is that of the batch.
    """
    if "graphs" in graph.globals:
        return jnp.asarray(graph.globals["graphs"])
    count = len(graph.nodes["primitive"])
    sizes = jnp.asarray(graph.n_node)[:-1, None]  # the last graph is the padding
    places = jnp.arange(count)
    return jnp.where(places < sizes, places + jnp.cumsum(sizes, axis=0) - sizes, count)


def path_lengths(graph: jraph.GraphsTuple, nodes: jax.Array) -> jax.Array:
    """(B, M, M) int32 length of the shortest path from node to node [from, to]; 0 for none.

    Args:
      graph: a padded batch of graphs.
      nodes: (B, M) of each, from `nodes_apart`.
    """
    largest = nodes.shape[1]
    places = jnp.arange(nodes.size, dtype=jnp.int32).reshape(nodes.shape)
    place = jnp.zeros(len(graph.nodes["primitive"]), jnp.int32).at[nodes].set(places, mode="drop")
    # Edges that fill up a batch have length 0.
    lengths = jnp.zeros((nodes.size, largest), jnp.int32)
    lengths = lengths.at[place[graph.senders], place[graph.receivers] % largest].max(
        graph.edges["distance"]
    )
    return lengths.reshape(*nodes.shape, largest)


class EdgeBias(nn.Module):
    """What the paths between two nodes add to their attention: an MLP of two embeddings.

    One is of the path there, the other of the path back. In a graph without cycles one of them is
    always that of no path, so there are few different pairs, and the MLP runs once for each.

    Attributes:
      features: d, size of a node's state.
      heads: of the attention.
    """

    features: int
    heads: int

    @nn.compact
    def __call__(self, lengths: jax.Array) -> jax.Array:
        """(B, M, M) path lengths -> (B, heads, M, M) [query, key]."""
        d, longest = self.features, LARGEST_DISTANCE
        table = self.param("table", table_init, (longest + 3, d))
        first = dense_params(self, "mlp_0", 2 * d, d)
        second = dense_params(self, "mlp_1", d, self.heads)
        there = jnp.arange(-longest, longest + 1)
        # The authors' tables begin with two rows that nothing reads.
        pairs = [table[jnp.maximum(steps, 0) + 2] for steps in (there, -there)]
        biases = dense(second, nn.relu(dense(first, jnp.concatenate(pairs, -1))))
        pair = jnp.clip(lengths - lengths.swapaxes(-1, -2), -longest, longest) + longest
        return biases.T[:, pair].swapaxes(0, 1)


class GraphormerLayer(nn.Module):
    """A pre-norm Transformer layer whose attention has a bias for each pair of nodes.

    Attributes:
      features: d, size of a node's state.
      heads: of the attention.
      dtype: that products are computed in; states and norms are float32.
    """

    features: int
    heads: int
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        """Makes the parts; the queries, keys and values have no bias."""
        d = self.features
        self.norm_attention = nn.LayerNorm(epsilon=1e-5)
        self.qkv = self.param("qkv", linear_init, (d, 3 * d))
        self.out = dense_params(self, "out", d, d)
        self.norm_mlp = nn.LayerNorm(epsilon=1e-5)
        self.mlp_0 = dense_params(self, "mlp_0", d, 4 * d)
        self.mlp_1 = dense_params(self, "mlp_1", 4 * d, d)

    def _cast(self, tree):
        return jax.tree.map(lambda x: x.astype(self.dtype), tree)

    def attended(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, M, d) states -> (B, M, heads, d / heads) queries, keys and values."""
        y = self._cast(self.norm_attention(x)) @ self._cast(self.qkv)
        q, k, v = jnp.split(y.reshape(*y.shape[:2], 3 * self.heads, -1), 3, axis=2)
        return q, k, v

    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array) -> jax.Array:
        """(B, M, d) states, (B, heads, M, M) biases, (B, 1, 1, M) real nodes -> (B, M, d)."""
        y = jax.nn.dot_product_attention(*self.attended(x), bias, mask).reshape(x.shape)
        x = x + dense(self._cast(self.out), y)
        y = dense(self._cast(self.mlp_0), self._cast(self.norm_mlp(x)))
        return x + dense(self._cast(self.mlp_1), nn.gelu(y, approximate=False))


class Graphormer(nn.Module):
    """Transformer layers over the nodes of each graph, with the same edge biases in all of them.

    Node 0 is the graph's input: a node's state gets embeddings of its distance from there and of
    its numbers of incoming and outgoing edges.

    Attributes:
      features: d, size of a node's state.
      layers, heads: of the Transformer.
      remat: compute layers again in the backward pass, and keep nothing but their inputs.
      dtype: that products are computed in.
    """

    features: int
    layers: int = 3
    heads: int = 8
    remat: bool = False
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: jax.Array, graph: jraph.GraphsTuple) -> jax.Array:
        """(N, d) initial states of a padded batch of graphs -> (N, d)."""
        nodes = nodes_apart(graph)
        real = nodes < len(x)
        lengths = path_lengths(graph, nodes)
        y = self.node_states(x.at[nodes].get(mode="fill", fill_value=0), lengths, real)
        bias = EdgeBias(self.features, self.heads, name="edge_bias")(lengths).astype(self.dtype)
        layer = nn.remat(GraphormerLayer) if self.remat else GraphormerLayer
        for i in range(self.layers):
            made = layer(self.features, self.heads, self.dtype, name=f"layer_{i}")
            y = made(y, bias, real[:, None, None])
        return x.at[nodes].set(y, mode="drop")

    def node_states(self, y: jax.Array, lengths: jax.Array, real: jax.Array) -> jax.Array:
        """(B, M, d) initial states -> (B, M, d), with where in the graph a node is."""
        edges = lengths == 1
        for name, rows, largest in (
            ("degree_in", edges.sum(1), LARGEST_DEGREE),
            ("degree_out", edges.sum(2), LARGEST_DEGREE),
            ("input_distance", lengths[:, 0], LARGEST_INPUT_DISTANCE),
        ):
            table = self.param(name, table_init, (largest + 1, self.features))
            y = y + table[jnp.minimum(rows, largest)]
        return jnp.where(real[..., None], y, 0)
