"""What each kind of instruction computes, from its inputs and decoded tiles.

A branch is a pure function up to the batch norm that ends most operations; that one, the same for
all, is `finish`. Gradients are taken by `jax.vjp` inside the backward loop, from the inputs alone:
nothing but states is kept from the forward loop. The convolutions, norms and poolings that branches
are made of have hand-written gradients (`kernels.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ghn_jax import kernels
from ghn_jax.executor.bucket import Bucket, Kind
from ghn_jax.network import HEADS
from ghn_jax.parameters import (
    TileKind,
    tile_axis,
    weight_from_tile,
    weight_scale,
)

ONE = TileKind("kernel")
VECTOR = TileKind("vector")
Slot = tuple[TileKind, int]


class Context(NamedTuple):
    """What a branch knows besides its inputs and tiles.

    Attributes:
      channels: of the target plane.
      stride: 1 or 2, from the source to the target plane.
      normalise: whether weights are scaled (Table 2; static). Vector tiles come normalised.
      norm: () bool, whether batch norm follows.
      offset: () int32, first output channel that a stem instruction computes.
      scale: () float32, weight scale where it depends on the number of parts.
      axis: mesh axis that the images are divided along, if any (static).
    """

    channels: int
    stride: int
    normalise: bool
    norm: jax.Array
    offset: jax.Array
    scale: jax.Array
    axis: str | None = None


def _kernel(tile, out, in_, context, height=None, width=None, decoder="kernel"):
    """A weight from its tile, for shapes that the planes fix."""
    shape = (out, in_) if height is None else (out, in_, height, width)
    kind = TileKind(decoder, height or 1, width or 1)
    return weight_from_tile(tile, shape, kind, context.normalise, jnp)


def window(x: jax.Array, axis: int, offset: jax.Array, size: int) -> jax.Array:
    """`size` entries of an endlessly repeated axis, from a traced offset that is not negative."""
    have = x.shape[axis]
    start = lax.rem(offset.astype(jnp.uint32), jnp.uint32(have))
    return lax.dynamic_slice_in_dim(tile_axis(x, axis, have + size, jnp), start, size, axis)


def _norm_vectors(vector, size):
    """Scale and bias of a norm layer from its (2, 64) tile."""
    return tuple(tile_axis(row, 0, size, jnp) for row in vector)


def _bias(vector, size):
    return tile_axis(vector[1], 0, size, jnp)


def finish(z: jax.Array, vector: jax.Array, context: Context) -> jax.Array:
    """Batch norm (B, H, W, C) with a (2, 64) tile; the identity where `context.norm` is false."""
    scale, bias = _norm_vectors(vector, context.channels)
    return kernels.batch_norm(z, scale, bias, context.norm, context.axis)


def _conv(k: int):
    def branch(x, tiles, vectors, context):
        w = _kernel(tiles[0], context.channels, x.shape[-1], context, k, k)
        x = nn.relu(x)
        if k == 1:
            return kernels.pointwise(x[:, :: context.stride, :: context.stride], w[0, 0])
        return kernels.conv(x, w, (context.stride,) * 2)

    return branch


def _conv_7x1(x, tiles, vectors, context):
    c = x.shape[-1]
    first = _kernel(tiles[0], c, c, context, 1, 7)
    second = _kernel(tiles[1], context.channels, c, context, 7, 1)
    x = kernels.conv(nn.relu(x), first, (1, context.stride))
    return kernels.conv(x, second, (context.stride, 1))


def _depthwise(k: int, dilation: int):
    def branch(x, tiles, vectors, context):
        c = x.shape[-1]
        depth = _kernel(tiles[0], c, 1, context, k, k, "depthwise")[:, :, 0]
        point = _kernel(tiles[1], context.channels, c, context, 1, 1)[0, 0]
        x = kernels.depthwise(nn.relu(x), depth, context.stride, dilation)
        return kernels.pointwise(x, point)

    return branch


def _pool(kernel):
    return lambda x, tiles, vectors, context: kernel(x, context.stride)


def _identity(x, tiles, vectors, context):
    return x[:, :: context.stride, :: context.stride]


def _excite(x, tiles, vectors, context):
    c = x.shape[-1]
    down = _kernel(tiles[0], c // 2, c, context)
    up = _kernel(tiles[1], c, c // 2, context)
    gate = nn.relu(x.mean((1, 2)) @ down + _bias(vectors[0], c // 2))
    gate = nn.hard_swish(gate @ up + _bias(vectors[1], c))
    return (x * gate[:, None, None])[:, :: context.stride, :: context.stride]


def _layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + 1e-5) * scale + bias


def _attention(x, tiles, vectors, context):
    b, h, w, c = x.shape
    qkv = _kernel(tiles[0], 3 * c, c, context)
    out, first, second = (_kernel(tile, c, c, context) for tile in tiles[1:])
    x = x.reshape(b, h * w, c)
    y = _layer_norm(x, *_norm_vectors(vectors[0], c)) @ qkv
    q, k, v = y.reshape(b, h * w, 3, HEADS, c // HEADS).transpose(2, 0, 3, 1, 4)
    y = kernels.attend(q, k, v).transpose(0, 2, 1, 3).reshape(b, h * w, c)
    x = y @ out + _bias(vectors[1], c) + x
    y = _layer_norm(x, *_norm_vectors(vectors[2], c))
    y = nn.gelu(y @ first + _bias(vectors[3], c), approximate=False)
    return (y @ second + _bias(vectors[4], c) + x).reshape(b, h, w, c)


def _stem(k: int):
    def branch(images, tiles, vectors, context):
        w = window(tiles[0][:, :3], -1, context.offset, context.channels)
        w = w.reshape(k, k, 3, context.channels)
        if context.normalise:
            w = w * weight_scale((context.channels, 3, k, k))
        return kernels.conv(images, w, (context.stride,) * 2)

    return branch


def _stem_double(k: int):
    def branch(images, tiles, vectors, context):
        c, each = context.channels, 2 if context.stride == 4 else 1
        first = _kernel(tiles[0], c // 2, 3, context, k, k)
        second = _kernel(tiles[1], c, c // 2, context, 3, 3)
        x = kernels.conv(images, first, (each,) * 2)
        scale, bias = _norm_vectors(vectors[0], c // 2)
        x = kernels.batch_norm(x, scale, bias, context.norm, context.axis)
        return kernels.conv(nn.relu(x), second, (each,) * 2)

    return branch


def _stem_vit(size: int):
    def branch(images, tiles, vectors, context):
        k = context.stride
        w = _kernel(tiles[0], context.channels, 3, context, k, k)
        # Kernel and stride are equal: every pixel belongs to one patch, so this is one product.
        pad = 1 if k == 3 else 0
        images = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))[
            :, : size * k, : size * k
        ]
        b = len(images)
        patches = images.reshape(b, size, k, size, k, 3).transpose(0, 1, 3, 2, 4, 5)
        x = patches.reshape(b, size, size, k * k * 3) @ w.reshape(-1, context.channels)
        shape = (1, context.channels, size, size)
        kind = TileKind("position", size, size)
        return x + weight_from_tile(tiles[1], shape, kind, context.normalise, jnp)

    return branch


# Branches that read several states: what one part adds to the convolution's output.


def _mix_part(x, tiles, offset, context):
    w = window(tiles[0][0], 0, offset, x.shape[-1])
    w = tile_axis(w, 1, context.channels, jnp) * context.scale
    return kernels.pointwise(nn.relu(x), w)


def _reduce_part(x, tiles, offset, context):
    x = nn.relu(x)
    halves = []
    for shift, tile in enumerate(tiles):
        w = window(tile[0], 0, offset, x.shape[-1])
        w = tile_axis(w, 1, context.channels // 2, jnp) * context.scale
        halves.append(kernels.pointwise(x[:, shift::2, shift::2], w))
    return jnp.concatenate(halves, axis=-1)


# The head's first layer sees its input modulo the tile's input channels, so it is enough to add up
# the features that share a row of the tile: (B, bins).


def _average_bins(x, offset, bins):
    b, h, w, c = x.shape
    rows = jnp.arange(c) % bins
    one_hot = (rows[:, None] == jnp.arange(bins)).astype(x.dtype)
    return jnp.roll(x.mean((1, 2)) @ one_hot, offset, axis=1)


def _flatten_bins(x, offset, bins):
    b, h, w, c = x.shape
    # Feature (channel, row, column) is number (channel * h + row) * w + column.
    number = jnp.arange(c)[None] * (h * w) + jnp.arange(h * w)[:, None]
    one_hot = (number.reshape(-1, 1) % bins == jnp.arange(bins)).astype(x.dtype)
    return jnp.roll(x.reshape(b, -1) @ one_hot, offset * (h * w), axis=1)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A kind of instruction.

    Attributes:
      tiles: kinds of the kernel tiles that it reads, in the order of the operation's nodes.
      vectors: number of vector tiles that it reads itself.
      norm: whether it may be followed by batch norm, with a vector tile more.
      keep: whether what it computes is kept for the gradient of that batch norm; otherwise it is
        computed again, which for 1x1 convolutions takes no longer than reading it.
      apply: (x, tiles, vectors, context) -> y for one input.
      part: (x, tiles, offset, context) -> z where several states are read; their z add up.
      bins: (x, offset, number of bins) -> (B, bins) for the head.
    """

    tiles: tuple[TileKind, ...] = ()
    vectors: int = 0
    norm: bool = False
    keep: bool = False
    apply: Callable[..., Any] | None = None
    part: Callable[..., Any] | None = None
    bins: Callable[..., Any] | None = None

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Each of its kernel tiles' kind, and which of that kind it is."""
        return tuple((tile, self.tiles[:j].count(tile)) for j, tile in enumerate(self.tiles))


def _square(k: int) -> TileKind:
    return TileKind("kernel", k, k)


def _normed(*tiles: TileKind, vectors: int = 0, keep: bool = True, **functions) -> Branch:
    return Branch(tiles, vectors, True, keep, **functions)


_BRANCHES = {
    "max_pool": Branch(apply=_pool(kernels.max_pool)),
    "avg_pool": Branch(apply=_pool(kernels.avg_pool)),
    "identity": Branch(apply=_identity),
    "excite": Branch((ONE, ONE), 2, apply=_excite),
    "attention": Branch((ONE,) * 4, 5, apply=_attention),
    "mix": _normed(ONE, keep=False, part=_mix_part),
    "reduce": _normed(ONE, ONE, keep=False, part=_reduce_part),
    "average": Branch(bins=_average_bins),
    "flatten": Branch(bins=_flatten_bins),
    "conv_7x1": _normed(TileKind("kernel", 1, 7), TileKind("kernel", 7, 1), apply=_conv_7x1),
    **{f"conv_{k}": _normed(_square(k), keep=k > 1, apply=_conv(k)) for k in (1, 3, 5, 7)},
    **{
        f"{name}_{k}": _normed(TileKind("depthwise", k, k), ONE, apply=_depthwise(k, dilation))
        for name, dilation in (("depthwise", 1), ("dilated", 2))
        for k in (3, 5)
    },
    **{f"stem_{k}": _normed(_square(k), apply=_stem(k)) for k in (3, 5, 7)},
    **{
        f"stem_double_{k}": _normed(_square(k), _square(3), vectors=1, apply=_stem_double(k))
        for k in (3, 5, 7)
    },
}


def branch_of(kind: Kind, bucket: Bucket) -> Branch:
    """The branch of a kind of instruction."""
    if kind.name == "stem_vit":
        size = bucket.planes[kind.target][0]
        patch = 16 if bucket.image_size > 96 else 3
        tiles = (_square(patch), TileKind("position", size, size))
        return Branch(tiles, apply=_stem_vit(size))
    return _BRANCHES[kind.name]


@functools.cache  # every architecture's table has these columns
def kernel_slots(bucket: Bucket) -> tuple[Slot, ...]:
    """The slots of all instructions of a bucket, sorted."""
    return tuple(sorted({slot for kind in bucket.kinds for slot in branch_of(kind, bucket).slots}))


@functools.cache
def vector_slots(bucket: Bucket) -> int:
    """The most vector tiles that an instruction of a bucket reads itself."""
    return max(branch_of(kind, bucket).vectors for kind in bucket.kinds)


def stride_of(kind: Kind, bucket: Bucket) -> int:
    """The stride of a kind of instruction, from its planes' sizes."""
    if kind.name == "stem_vit":
        return 16 if bucket.image_size > 96 else 3
    source = bucket.image_size if kind.source < 0 else bucket.planes[kind.source][0]
    return -(-source // bucket.planes[kind.target][0])
