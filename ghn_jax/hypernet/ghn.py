"""Graph HyperNetworks (paper § 2.2, § 4): GHN-2, the GHN-1 baseline and the MLP baseline.

Encoders and decoders of later work are choices of the same module; `presets.py` has its models.
"""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph, build_graph
from ghn_jax.files.messages import what_is
from ghn_jax.hypernet.centred_decoder import CentredDecoder
from ghn_jax.hypernet.conv_decoder import ConvDecoder
from ghn_jax.hypernet.decoder import Decoder, ShapeEncoder
from ghn_jax.hypernet.gatedgnn import GatedGNN, NodeMLP
from ghn_jax.hypernet.graphormer import Graphormer, table_init
from ghn_jax.hypernet.lowrank_decoder import LowRankDecoder, LowRankVectorDecoder
from ghn_jax.hypernet.mlp_decoder import MLPDecoder
from ghn_jax.hypernet.padding import next_power_of_two, pad_graphs
from ghn_jax.hypernet.tiling import (
    Tensor,
    TileKind,
    check_decodable,
    named_tree,
    node_tensors,
    tile_kind,
)


class GHN(nn.Module):
    """A graph hypernetwork: from computational graphs to parameters.

    `GHN()` is GHN-2 for CIFAR-10; `ghn1()` and `mlp_baseline()` make the paper's baselines.

    Attributes:
      num_classes: classes of the image dataset.
      max_shape: (out, in, height, width) of the largest decoded tile; larger parameters are tiled
        along channels.
      encoder: a name in `ENCODERS`: 'gatedgnn', 'graphormer', that of GHN-3, or 'mlp' for node
        states without message passing.
      decoder: a name in `DECODERS`: 'conv', the compact one of B.1 (with a Graphormer, GHN-3's: its
        kernels are the centres of tiles), 'mlp', that of vanilla GHNs, 'lowrank', LoGAH's, or
        'lowrank_1d', with layers of their own for vectors.
      virtual_edges: s^(max) of Eq. 4 (GHN-2: 50); 1 for real edges only (GHN-1).
      virtual_includes_real: sum over virtual edges from s = 1, as the released checkpoints were
        trained, in place of the paper's 1 < s.
      normalise: differentiable normalisation of predicted parameters (§ 4.1).
      fan: what it divides weights by: 'in', or 'out' (§ C.2.1).
      layer_norm: layer norm of the final node states.
      shape_encoding: add an encoding of parameters' shapes to the initial node states (B.1).
      stack: encoders one after another, each with parameters of its own ("Stacked GHN" of Table 8;
        the paper says no more about it).
      rounds: T of Eq. 3, sweeps of the GatedGNN in each direction.
      forward_only: the GatedGNN sweeps forwards only (π of Eq. 3).
      features: d, size of node states.
      dummy_op: an extra row of the op embedding for padding nodes, as the paper prints it (B.2.1);
        released checkpoints have none.
      layers, heads: of the Graphormer.
      remat: let the Graphormer compute its layers again in the backward pass: less memory.
      bfloat16: let it compute products in bfloat16.
      rank: r of low-rank decoders, which make weights as products (out * height, r) by (r, in *
        width).
      factor_size: K, the most rows and columns of such a product; if not given, as many as
        `max_shape` has.
    """

    num_classes: int = 10
    max_shape: tuple[int, int, int, int] = (64, 64, 11, 11)
    encoder: str = "gatedgnn"
    decoder: str = "conv"
    virtual_edges: int = 50
    virtual_includes_real: bool = False
    normalise: bool = True
    fan: str = "in"
    layer_norm: bool = True
    shape_encoding: bool = True
    stack: int = 1
    rounds: int = 1
    forward_only: bool = False
    features: int = 32
    dummy_op: bool = True
    layers: int = 3
    heads: int = 8
    remat: bool = False
    bfloat16: bool = False
    rank: int = 32
    factor_size: int | None = None

    def setup(self):
        """Makes the parts; their parameters are shared by everything below."""
        check_choices(self)
        d = self.features
        rows = len(PRIMITIVES) + self.dummy_op
        init = table_init if self.encoder == "graphormer" else nn.initializers.normal(1.0)
        self.op_embedding = self.param("op_embedding", init, (rows, d))
        if self.shape_encoding:
            self.shape_encoder = ShapeEncoder(d, self.num_classes, self.max_shape[2], init)
        self.gnn = ENCODERS[self.encoder](self)
        self.stacked = [ENCODERS[self.encoder](self) for _ in range(self.stack - 1)]
        if self.layer_norm:
            self.norm = nn.LayerNorm(epsilon=1e-5)
        self.tile_decoder = make_decoder(self, name="decoder")

    def __call__(self, graph: jraph.GraphsTuple) -> jax.Array:
        """Encodes a padded batch of graphs: (N, d) final node states."""
        x = self.initial_states(graph)
        for gnn in (self.gnn, *self.stacked):
            x = gnn(x, graph)
        return self.norm(x) if self.layer_norm else x

    def initial_states(self, graph: jraph.GraphsTuple) -> jax.Array:
        """(N, d) embeddings of nodes' primitives and parameter shapes."""
        rows = jnp.minimum(graph.nodes["primitive"], self.op_embedding.shape[0] - 1)
        x = self.op_embedding[rows]
        return x + self.shape_encoder(graph.nodes["shape"]) if self.shape_encoding else x

    def decode(self, states: jax.Array, kind: TileKind) -> jax.Array:
        """Decodes (n, d) node states to n tiles of one kind; see `decoder.Decoder`."""
        return self.tile_decoder(states, kind)

    def encode_and_decode_all(self, graph: jraph.GraphsTuple) -> tuple:
        """Runs every part once, so that `init` creates every parameter."""
        states = self(graph)
        kinds = ("kernel", "depthwise", "position", "classifier", "vector", "classifier_bias")
        return tuple(self.decode(states[:1], TileKind(kind)) for kind in kinds)

    def init_variables(self, seed: int) -> dict:
        """Random variables {'params': ...}, a pure function of the seed."""
        example = Graph(
            primitives=np.zeros(1, np.int32),
            edges=np.zeros((0, 3), np.int32),
            param_shapes=[None],
            names=["input"],
            cells=np.zeros(1, np.int32),
        )
        return _init(self, jax.random.key(seed), pad_graphs([example], n_node=2, n_edge=1))

    # --- What users call ---

    @classmethod
    def from_pretrained(cls, path: str | Path) -> tuple[GHN, dict]:
        """Loads a hypernetwork from whatever holds one; see `interop.pretrained`."""
        # Files of others are a matter of `interop`, which imports this package.
        return importlib.import_module("ghn_jax.interop.pretrained").from_pretrained(path)

    def graph(self, arch: Architecture, *, image_size: int = 32) -> Graph:
        """The graph of an architecture as this hypernetwork needs it (its virtual edges).

        Raises:
          ValueError: a parameter is beyond what the decoders can make, or the graph is
            disconnected.
        """
        graph = build_graph(
            arch, self.virtual_edges, num_classes=self.num_classes, image_size=image_size
        )
        check_decodable(graph, self.undecodable)
        return graph

    def undecodable(self, shape: tuple[int, ...]) -> str | None:
        """Why the decoder makes no parameter of some shape, None where it does."""
        return free_decoder(self).undecodable(shape)

    def tile_kind(self, graph: Graph, node: int) -> TileKind | None:
        """The kind of tile that a node's parameter is made from, None for a node without one."""
        kind = tile_kind(graph, node)
        return kind and free_decoder(self).sized(kind, graph.param_shapes[node] or ())

    def embed(self, variables, arch: Architecture | Graph, *, image_size: int = 32) -> jax.Array:
        """(N, d) final node states of one architecture, in the order of its graph's nodes."""
        check_hypernetwork(self, variables)
        graph = arch if isinstance(arch, Graph) else self.graph(arch, image_size=image_size)
        states = _encode(self, variables, pad_graphs([graph]))
        return states[: len(graph)]

    def predict(
        self,
        variables,
        arch: Architecture | Graph,
        *,
        image_size: int = 32,
    ) -> dict:
        """Predicts all parameters of one network.

        No program is compiled for an architecture: its graph is data to programs whose shapes are
        rounded up to powers of two. Under `jax.grad` the result is differentiable.

        Args:
          variables: of this module.
          arch: an architecture, or the graph of any network.
          image_size: height and width of the images, in pixels.

        Returns:
          The `params` tree of `build_network(arch, self.num_classes, image_size)`.

        Raises:
          TypeError: something else than variables, or than an architecture or graph.
          ValueError: a shape that no decoder makes.
        """
        check_hypernetwork(self, variables)
        graph = arch if isinstance(arch, Graph) else self.graph(arch, image_size=image_size)
        if isinstance(arch, Graph):
            check_decodable(graph, self.undecodable)
        params = named_tree(graph, self.tensors(variables, graph))
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
        return params if traced else jax.tree.map(jnp.asarray, params)

    def tensors(
        self, variables, graph: Graph, nodes: Iterable[int] | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """Predicts the tensors of a graph's nodes, whatever module they belong to.

        Args:
          variables: of this module.
          graph: the graph of any network.
          nodes: those wanted; None for all that have parameters.

        Returns:
          node -> its tensors as `tiling.node_tensors` names them, NumPy's unless traced.
        """
        states = _encode(self, variables, pad_graphs([graph]))
        xp = jnp if isinstance(states, jax.core.Tracer) else np
        groups = defaultdict(list)
        for node in range(len(graph)) if nodes is None else nodes:
            kind = self.tile_kind(graph, node)
            if kind is not None:
                groups[kind].append(node)
        decoded = {}
        for kind, group in groups.items():
            padded = np.zeros(next_power_of_two(len(group)), np.int32)
            padded[: len(group)] = group
            decoded[kind] = _decode(self, variables, states, padded, kind)
        tensors = {}
        for kind, group in groups.items():  # a second loop: the device decodes while we wait
            tiles = xp.asarray(decoded[kind])
            for i, node in enumerate(group):
                tensors[node] = node_tensors(graph, node, tiles[i], self.normalise, xp, self.fan)
        return tensors


# Encoders by name: the fields of a hypernetwork -> a module (states, padded graphs) -> states.
ENCODERS: dict[str, Callable[[GHN], nn.Module]] = {
    "gatedgnn": lambda ghn: GatedGNN(
        ghn.features,
        ghn.virtual_edges > 1,
        ghn.virtual_includes_real,
        ghn.rounds,
        ghn.forward_only,
    ),
    "graphormer": lambda ghn: Graphormer(
        ghn.features,
        ghn.layers,
        ghn.heads,
        ghn.remat,
        jnp.dtype(jnp.bfloat16 if ghn.bfloat16 else jnp.float32),
    ),
    "mlp": lambda ghn: NodeMLP(ghn.features),
}
# Decoders by name: the fields of a hypernetwork -> a class, and what it has beside those of all.
DECODERS: dict[str, Callable[[GHN], tuple[type[Decoder], dict[str, Any]]]] = {
    "conv": lambda ghn: (CentredDecoder if ghn.encoder == "graphormer" else ConvDecoder, {}),
    "lowrank": lambda ghn: (LowRankDecoder, _factors(ghn)),
    "lowrank_1d": lambda ghn: (LowRankVectorDecoder, _factors(ghn)),
    "mlp": lambda ghn: (MLPDecoder, {}),
}


def _factors(ghn: GHN) -> dict[str, Any]:
    out, in_, height, width = ghn.max_shape
    return {"rank": ghn.rank, "factor_size": ghn.factor_size or max(out * height, in_ * width)}


def check_choices(ghn: GHN) -> None:
    """Raises ValueError if a hypernetwork has a choice that there is not, or that does nothing."""
    for field, known in (("encoder", ENCODERS), ("decoder", DECODERS), ("fan", ("in", "out"))):
        if getattr(ghn, field) not in known:
            raise ValueError(
                f"{field} is {getattr(ghn, field)!r}; allowed: {', '.join(map(repr, known))}"
            )
    if ghn.shape_encoding and ghn.features % 4:
        raise ValueError(
            f"features is {ghn.features}; allowed: multiples of 4, a quarter of them for each of a "
            "shape's sizes; or without shape_encoding"
        )
    for field in ("stack", "rounds"):
        if getattr(ghn, field) < 1:
            raise ValueError(f"{field} is {getattr(ghn, field)}; allowed: 1 or more")
    if ghn.encoder != "gatedgnn" and (ghn.rounds > 1 or ghn.forward_only):
        raise ValueError(
            f"rounds is {ghn.rounds} and forward_only {ghn.forward_only}, but the encoder "
            f"{ghn.encoder!r} does not sweep; allowed: 1 and False"
        )
    if ghn.fan != "in" and not ghn.normalise:
        raise ValueError("fan is 'out', but normalise is False; allowed: 'in', or normalise")
    if ghn.encoder == "graphormer" and (
        ghn.layers < 1 or ghn.heads < 1 or ghn.features % ghn.heads
    ):
        raise ValueError(
            f"layers is {ghn.layers}, heads {ghn.heads} and features {ghn.features}; allowed: one "
            "layer or more, and heads that divide the features"
        )
    if ghn.rank < 1 or (ghn.factor_size is not None and ghn.factor_size < 1):
        raise ValueError(
            f"rank is {ghn.rank} and factor_size {ghn.factor_size}; allowed: 1 or more"
        )


def count_parameters(ghn: GHN) -> int:
    """How many parameters a hypernetwork has; nothing is allocated."""
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: ghn.init_variables(0))))


def make_decoder(ghn: GHN, **place) -> Decoder:
    """The decoder of a hypernetwork; `place` is Flax's, where its parameters are."""
    decoder, more = DECODERS[ghn.decoder](ghn)
    return decoder(ghn.features, ghn.max_shape, ghn.num_classes, **more, **place)


@functools.lru_cache(maxsize=64)
def free_decoder(ghn: GHN) -> Decoder:
    """The decoder of a hypernetwork, bound to no parameters."""
    check_choices(ghn)
    return make_decoder(ghn, parent=None)


def check_hypernetwork(ghn, variables) -> None:
    """Checks a hypernetwork and its variables.

    Raises:
      TypeError: one of them is something else.
    """
    if not isinstance(ghn, GHN):
        raise TypeError(
            f"the hypernetwork is {what_is(ghn)}; allowed: a GHN, and then its variables, as in "
            "predict_model(*ghn_jax.from_pretrained(path), model, sample)"
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        what = what_is(variables)
        if isinstance(variables, Mapping):
            what += f" of {', '.join(map(str, [*variables][:5])) or 'nothing'}"
        raise TypeError(
            f"the hypernetwork's variables are {what}; allowed: {{'params': ...}}, as "
            "ghn.init_variables(0) and ghn_jax.from_pretrained give them"
        )


@functools.partial(jax.jit, static_argnums=0)
def _init(ghn: GHN, key: jax.Array, graph: jraph.GraphsTuple) -> Mapping[str, Any]:
    return ghn.init(key, graph, method="encode_and_decode_all")


@functools.partial(jax.jit, static_argnums=0)
def _encode(ghn: GHN, variables, graph: jraph.GraphsTuple) -> jax.Array:
    return cast(jax.Array, ghn.apply(variables, graph))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _decode(ghn: GHN, variables, states: jax.Array, nodes: jax.Array, kind: TileKind) -> jax.Array:
    return cast(jax.Array, ghn.apply(variables, states[nodes], kind, method="decode"))


def ghn1(num_classes: int = 10, **options) -> GHN:
    """The GHN-1 baseline (B.1): no virtual edges, normalisation or layer norm."""
    return GHN(num_classes, virtual_edges=1, normalise=False, layer_norm=False, **options)


def mlp_baseline(num_classes: int = 10, **options) -> GHN:
    """The MLP baseline (§ 5.1): GHN-2 without message passing."""
    return GHN(num_classes, encoder="mlp", **options)
