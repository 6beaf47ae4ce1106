"""From decoded tiles to a network's parameters: which decoder, tiling, normalisation (§ 4.1, B.1).

The functions take NumPy or JAX arrays: prediction assembles parameters on the host in NumPy, the
engine does the same inside compiled programs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph
from ghn_jax.deepnets1m.names import insert, parameter_path

Tensor = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, order=True)
class TileKind:
    """What is decoded for a node: a method of `decoder.Decoder` and a kernel's size.

    Some decoders make as many output and input channels as are asked for; 0 are those of the
    largest tile.
    """

    decoder: str
    height: int = 1
    width: int = 1
    out: int = 0
    in_: int = 0


def parameter_kind(primitive: str, shape: tuple[int, ...]) -> TileKind:
    """The kind of tile that a parameter is made from, unless it is the classifier's."""
    if len(shape) == 1:
        return TileKind("vector")
    if len(shape) == 2:
        return TileKind("kernel")
    if len(shape) == 3:
        return TileKind("scale")
    if primitive == "pos_enc":
        return TileKind("position", *shape[2:])
    return TileKind("depthwise" if shape[1] == 1 else "kernel", *shape[2:])


CLASSIFIER = TileKind("classifier"), TileKind("classifier_bias")  # weight and bias


def tile_kind(graph: Graph, node: int) -> TileKind | None:
    """The kind of tile that a node's parameter is made from, None for a node without one."""
    shape, primitive = graph.param_shapes[node], PRIMITIVES[graph.primitives[node]]
    if shape is None or primitive in ("max_pool", "avg_pool"):
        return None
    if node in {index % len(graph) for index in graph.classifier}:
        return CLASSIFIER[len(shape) == 1]
    return parameter_kind(primitive, shape)


def undecodable(shape: tuple[int, ...], max_shape: tuple[int, int, int, int]) -> str | None:
    """Why no decoder makes a parameter of some shape, None where one does."""
    if len(shape) not in (1, 2, 4) and shape[1:] != (1, 1):
        return "supported are vectors, matrices, 4-dimensional kernels and layer scales (C, 1, 1)"
    if len(shape) == 4 and (shape[2] > max_shape[2] or shape[3] > max_shape[3]):
        return (
            f"kernels of this hypernetwork go up to {max_shape[2]}x{max_shape[3]}, grids of "
            "positions as well; use one with a larger max_shape"
        )
    return None


def check_decodable(graph: Graph, why_not: Callable[[tuple[int, ...]], str | None]) -> None:
    """Raises ValueError if there is a reason why a parameter's shape cannot be made."""
    for name, shape in zip(graph.names, graph.param_shapes, strict=True):
        reason = None if shape is None else why_not(shape)
        if reason:
            raise ValueError(f"no decoder makes the shape {shape} of {name!r}: {reason}")


def weight_scale(shape: tuple[int, ...], fan: str = "in") -> float:
    """Table 2: sqrt(beta / fan in) of a weight of two dimensions or more (PyTorch's order).

    beta is 2, but 1 where no ReLU follows: depthwise kernels and the 1xk half of a factorised one.

    Args:
      shape: of the weight.
      fan: 'in', or 'out' to count output channels instead (Table 8).
    """
    channels = shape[1] if fan == "in" else shape[0]
    before_linear = len(shape) > 2 and (shape[1] == 1 or shape[2] < shape[3])
    return math.sqrt((1.0 if before_linear else 2.0) / (channels * math.prod(shape[2:])))


def squash_norm_weight(p, xp):
    """Table 2: weights of norm layers, 2 * sigmoid(p / 2), in (0, 2)."""
    return 2 / (1 + xp.exp(-0.5 * p))


def squash_bias(p, xp):
    """Table 2: biases, tanh(p / 5), in (-1, 1)."""
    return xp.tanh(0.2 * p)


def tile_axis(x, axis: int, size: int, xp):
    """Slices or repeats an axis to a size (B.1: tiling across channels)."""
    have = x.shape[axis]
    if size > have:
        repeats = [1] * x.ndim
        repeats[axis] = -(-size // have)
        x = xp.tile(x, repeats)
    index = [slice(None)] * x.ndim
    index[axis] = slice(0, size)
    return x[tuple(index)]


def weight_from_tile(
    tile,
    shape: tuple[int, ...],
    kind: TileKind,
    normalise: bool,
    xp,
    repeat: bool = True,
    fan: str = "in",
):
    """Makes a weight in Flax's layout from a decoded tile.

    Args:
      tile: as `decoder.Decoder` returns it for one node.
      shape: the parameter's shape in PyTorch's order: (out, in) or (out, in, height, width).
      kind: the tile's kind.
      normalise: apply Table 2.
      xp: `numpy` or `jax.numpy`.
      repeat: whether a weight with more inputs than the tile has repeats it (B.1); without, it has
        as many rows as there are.
      fan: see `weight_scale`.

    Returns:
      (in, out) for linear layers, (height, width, in, out) for convolutions, where depthwise ones
      have in = 1, and (height, width, channels) for positional encodings.
    """
    if kind.decoder == "position":
        # Positional encodings are left as they are: they are added to, not multiplied with.
        return tile_axis(tile, -1, shape[1], xp).reshape(kind.height, kind.width, shape[1])
    w = tile_axis(tile, -1, shape[0], xp)
    if kind.decoder == "depthwise":
        w = w.reshape(kind.height, kind.width, 1, shape[0])
    else:
        w = tile_axis(w, -2, shape[1] if repeat else min(shape[1], w.shape[-2]), xp)
        if len(shape) == 4:
            w = w.reshape(kind.height, kind.width, shape[1], shape[0])
        elif kind.decoder == "kernel":
            w = w[0]
    return w * xp.asarray(weight_scale(shape, fan), w.dtype) if normalise else w


def squash(tiles, kind: TileKind, xp):
    """Table 2 for norm layers and biases: it depends on nothing but the tile.

    Args:
      tiles: (..., 2, n) vectors or (..., classes) classifier biases; others are left as they are.
      kind: of the tiles.
      xp: `numpy` or `jax.numpy`.
    """
    if kind.decoder == "vector":
        scale, bias = tiles[..., 0, :], tiles[..., 1, :]
        return xp.stack([squash_norm_weight(scale, xp), squash_bias(bias, xp)], axis=-2)
    return squash_bias(tiles, xp) if kind.decoder == "classifier_bias" else tiles


def tile_tensors(
    primitive: str,
    shape,
    kind: TileKind,
    tile,
    normalise: bool,
    xp,
    repeat: bool = True,
    fan: str = "in",
) -> dict[str, Tensor]:
    """A parameter's tensors, made from its tile.

    Args:
      primitive, shape: of its node, the shape in PyTorch's order.
      kind: of the tile.
      tile: as `decoder.Decoder` returns it, behind `squash` where parameters are normalised.
      normalise: scale weights as § 4.1 does.
      xp: `numpy` or `jax.numpy`.
      repeat: see `weight_from_tile`.
      fan: see `weight_scale`.

    Returns:
      {'kernel': (in, out) or (height, width, in, out)}, {'embedding': (height, width, channels)},
      {'scale', 'bias': (channels,)} of norm layers, {'bias': (channels,)}, or {'scale':
      (channels,)} of layer scales.
    """
    if kind.decoder == "classifier_bias":
        return {"bias": tile_axis(tile, 0, shape[0], xp)}
    if kind.decoder == "vector":
        if primitive in ("bn", "ln"):
            return {
                leaf: tile_axis(tile[i], 0, shape[0], xp)
                for i, leaf in enumerate(("scale", "bias"))
            }
        return {"bias": tile_axis(tile[1], 0, shape[0], xp)}
    if kind.decoder == "scale":
        return {"scale": tile_axis(tile, 0, shape[0], xp)}
    leaf = "embedding" if kind.decoder == "position" else "kernel"
    return {leaf: weight_from_tile(tile, shape, kind, normalise, xp, repeat, fan)}


def node_tensors(
    graph: Graph, node: int, tile, normalise: bool, xp, fan: str = "in"
) -> dict[str, Tensor]:
    """The tensors of a node, from its tile as `decoder.Decoder` returns it; see `tile_tensors`."""
    primitive, shape = PRIMITIVES[graph.primitives[node]], graph.param_shapes[node]
    kind = tile_kind(graph, node)
    tile = squash(tile, kind, xp) if normalise else tile
    return tile_tensors(primitive, shape, kind, tile, normalise, xp, fan=fan)


def named_tree(graph: Graph, tensors: dict[int, dict[str, Tensor]]) -> dict:
    """The `params` tree of a network whose modules have the official names.

    Args:
      graph: the network's graph.
      tensors: node -> its tensors, as `node_tensors` makes them.
    """
    params: dict = {}
    for node, leaves in tensors.items():
        path = parameter_path(graph.names[node])
        for leaf, tensor in leaves.items():
            insert(params, (*path, leaf), tensor)
    return params
