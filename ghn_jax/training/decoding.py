"""The parameters of a meta-batch's networks: graphs to node states to tiles, and back (§ 4.1, B.1).

Nodes of all networks that need the same kind of tile are decoded together, so many at a time; every
tile is an array of its own, which one step of one network reads. Shapes of programs depend on the
kind of tile and on the padded size of the graphs, not on what the networks are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jax.flatten_util import ravel_pytree

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.deepnets1m.units import Arrays, Classifier, Unit
from ghn_jax.engine.engine import Engine, is_spec
from ghn_jax.engine.programs import Program
from ghn_jax.hypernet.ghn import GHN, free_decoder
from ghn_jax.hypernet.tiling import (
    CLASSIFIER,
    TileKind,
    parameter_kind,
    squash,
    tile_tensors,
)
from ghn_jax.training.norm_penalty import node_norms, sum_of_norms

# Kernel positions that are decoded at once: enough for the matrix products to be efficient.
_POSITIONS = 64


class Chunk(NamedTuple):
    """Nodes that are decoded together.

    Attributes:
      kind: of their tiles.
      nodes: (n,) int32 nodes of the padded graph, -1 for none.
      owners: of each node, the network (its place in the batch) and its official name.
      norms: (n, 4), see `norm_penalty.node_norms`.
    """

    kind: TileKind
    nodes: np.ndarray
    owners: tuple[tuple[int, str], ...]
    norms: np.ndarray


def make_chunks(ghn: GHN, graphs: Sequence[Graph]) -> tuple[Chunk, ...]:
    """Divides the nodes that have parameters into chunks of few different sizes.

    Args:
      ghn: the hypernetwork.
      graphs: in the order in which `padding.pad_graphs` joins them.
    """
    found: dict[TileKind, list[tuple[int, tuple[int, str], np.ndarray]]] = {}
    first = 0
    for member, graph in enumerate(graphs):
        for node in range(len(graph)):
            kind = ghn.tile_kind(graph, node)
            if kind is not None:
                norms = node_norms(graph, node, kind, ghn.normalise, ghn.fan)
                owner = member, graph.names[node]
                found.setdefault(kind, []).append((first + node, owner, norms))
        first += len(graph)
    chunks = []
    for kind, nodes in sorted(found.items()):
        most = max(1, _POSITIONS // (kind.height * kind.width))
        least = max(1, most // 8)
        while nodes:
            size = most if len(nodes) > most // 2 else least
            taken, nodes = nodes[:size], nodes[size:]
            numbers = np.full(size, -1, np.int32)
            of_nodes, owners, of_norms = zip(*taken, strict=True)
            numbers[: len(taken)] = of_nodes
            norms = np.zeros((size, 4), np.float32)
            norms[: len(taken)] = of_norms
            chunks.append(Chunk(kind, numbers, owners, norms))
    return tuple(chunks)


@functools.lru_cache(maxsize=1024)
def _tile_shape(ghn: GHN, kind: TileKind) -> tuple[int, ...]:
    def decode(key, states):
        return ghn.init_with_output(key, states, kind, method="decode")[0]

    states = jax.ShapeDtypeStruct((1, ghn.features), jnp.float32)
    return jax.eval_shape(decode, jax.random.key(0), states).shape[1:]


@functools.lru_cache(maxsize=4096)
def _unit_kinds(ghn: GHN, unit: Unit) -> tuple[TileKind, ...]:
    kinds = tuple(parameter_kind(*p) for p in unit.parameters)
    if isinstance(unit, Classifier):
        kinds = *kinds[:-2], *CLASSIFIER
    sized = free_decoder(ghn).sized
    return tuple(sized(kind, p[1]) for kind, p in zip(kinds, unit.parameters, strict=True))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Parameters as `TilePrograms.decode` gives them, one tile each; see `engine.Tensors`.

    Equal for hypernetworks whose tiles are used in the same way: they share networks' programs.
    """

    ghn: GHN = dataclasses.field(compare=False)
    used: tuple = dataclasses.field(init=False)

    def __post_init__(self):
        ghn = self.ghn
        used = ghn.max_shape[:2], ghn.num_classes, ghn.normalise, ghn.fan, ghn.decoder
        object.__setattr__(self, "used", used)

    def _kinds(self, unit: Unit) -> tuple[TileKind, ...]:
        return _unit_kinds(self.ghn, unit)

    def shapes(self, unit: Unit) -> list[tuple[tuple[int, ...], ...]]:
        """See `engine.Tensors`."""
        return [(_tile_shape(self.ghn, kind),) for kind in self._kinds(unit)]

    def tensors(self, unit: Unit, params: Arrays) -> Arrays:
        """See `engine.Tensors`; weights that repeat the classifier's inputs are left short."""
        repeat, ghn = not isinstance(unit, Classifier), self.ghn
        return tuple(
            tensor
            for p, kind, tile in zip(unit.parameters, self._kinds(unit), params, strict=True)
            for tensor in tile_tensors(*p, kind, tile, ghn.normalise, jnp, repeat, ghn.fan).values()
        )


def _specs(engine: Engine, tree):
    """(shape, dtype, sharding) of arrays that are the same on all devices."""
    return jax.tree.map(lambda x: (np.shape(x), jnp.dtype(x.dtype), engine.whole), tree)


class TilePrograms:
    """A hypernetwork's programs: from graphs to tiles, and from tiles' cotangents to a gradient.

    Args:
      ghn: the hypernetwork.
      engine: whose devices they run on.
      params: of the hypernetwork, or their shapes.
      norm_penalty: weight of the sum of predicted tensors' norms in the loss.
    """

    def __init__(self, ghn: GHN, engine: Engine, params: Any, norm_penalty: float = 0.0):
        self.ghn, self.engine, self.norm_penalty = ghn, engine, norm_penalty
        self._decoder = free_decoder(ghn)
        self._params = _specs(engine, params)
        self._known_residuals: dict[Any, Any] = {}

    def _states(self, nodes: int):
        return (nodes, self.ghn.features), jnp.dtype(jnp.float32), self.engine.whole

    def _encoded(self, params, graph: jraph.GraphsTuple):
        """(N, d) node states, and the function that takes their cotangent back to parameters."""
        return jax.vjp(lambda p: self.ghn.apply({"params": p}, graph), params)

    def _encode(self, params, graph):
        states, vjp = self._encoded(params, graph)
        return states, tuple(jax.tree.leaves(vjp))

    def encode(self, graph: jraph.GraphsTuple) -> Program:
        """(params, graph) -> (N, d) node states, and what `encode_backward` needs of the way."""
        specs = self._params, _specs(self.engine, graph)
        return self.engine.program(("encode", self.ghn), self._encode, specs)

    def encode_backward(self, graph: jraph.GraphsTuple, workers: int) -> Program:
        """(params, graph, residuals, each worker's sums of `decode_backward`) -> (P,) gradient."""

        def encode_backward(params, graph, residuals, sums):
            # Traced for its structure: the values of the way forwards are those of `encode`.
            _, vjp = self._encoded(params, graph)
            vjp = jax.tree.unflatten(jax.tree.structure(vjp), residuals)
            ddecoder, dstates = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), sums)
            (dparams,) = vjp(dstates)
            # The encoder does not read the decoder's parameters.
            return ravel_pytree({**dparams, "decoder": ddecoder})[0]

        sums = self._params["decoder"], self._states(len(graph.nodes["primitive"]))
        specs = self._params, _specs(self.engine, graph)
        specs = *specs, self._residuals(*specs), (sums,) * workers
        return self.engine.program(("encode backward", self.ghn), encode_backward, specs)

    def _residuals(self, params, graph):
        """Specs of what `encode` hands to `encode_backward`."""
        key = tuple(jax.tree.leaves(graph, is_leaf=is_spec))
        if key not in self._known_residuals:
            given = jax.tree.map(
                lambda spec: jax.ShapeDtypeStruct(*spec[:2]), (params, graph), is_leaf=is_spec
            )
            self._known_residuals[key] = _specs(
                self.engine, jax.eval_shape(self._encode, *given)[1]
            )
        return self._known_residuals[key]

    def _decode(self, params, part, states, nodes, kind: TileKind) -> jax.Array:
        """(n, ...) tiles, from the part of the decoder's parameters that the kind reads."""
        tiles = self._decoder.decode_part(params, part, states[jnp.maximum(nodes, 0)], kind)
        return squash(tiles, kind, jnp) if self.ghn.normalise else tiles

    def _chunk_specs(self, chunk: Chunk, n_node: int):
        nodes = (chunk.nodes.shape, jnp.dtype(jnp.int32), self.engine.whole)
        return self._params["decoder"], self._states(n_node), nodes

    def decode(self, chunk: Chunk, n_node: int) -> Program:
        """(decoder's params, states, nodes) -> a tile for each node."""
        kind = chunk.kind

        def decode(params, states, nodes):
            tiles = self._decode(params, self._decoder.part(params, kind), states, nodes, kind)
            return tuple(tiles[i] for i in range(len(nodes)))

        return self.engine.program(
            ("decode", self.ghn, kind), decode, self._chunk_specs(chunk, n_node)
        )

    def decode_backward(self, chunk: Chunk, n_node: int) -> Program:
        """(params, states, nodes, cotangents of tiles, sums so far, penalty) -> sums.

        The sums are over chunks, (decoder's gradient, cotangent of states). Where a chunk has no
        node, the cotangent may be anything. The penalty is `Chunk.norms` and their share of the
        loss; without a penalty it is left out.
        """
        kind = chunk.kind

        def decode_backward(params, states, nodes, dtiles, sums, *penalty):
            part = self._decoder.part(params, kind)
            tiles, vjp = jax.vjp(lambda p, s: self._decode(params, p, s, nodes, kind), part, states)
            g = jnp.stack(dtiles)
            unused = (nodes < 0).reshape(-1, *[1] * (g.ndim - 1))
            g = jnp.where(unused, 0, g)
            if penalty:
                norms, weight = penalty
                g = g + weight * jax.grad(sum_of_norms)(tiles, norms, kind)
            dpart, dstates = vjp(g)
            return self._decoder.add_part(sums[0], dpart, kind), sums[1] + dstates

        params, states, nodes = self._chunk_specs(chunk, n_node)
        tile = (_tile_shape(self.ghn, kind), jnp.dtype(jnp.float32), self.engine.whole)
        specs = params, states, nodes, (tile,) * len(chunk.nodes), (params, states)
        if self.norm_penalty:
            single = jnp.dtype(jnp.float32)
            norms = chunk.norms.shape, single, self.engine.whole
            specs = *specs, norms, ((), single, self.engine.whole)
        return self.engine.program(
            ("decode backward", self.ghn, kind), decode_backward, specs, donate=(4,)
        )
