"""Units: what the operations of the design space are made of (paper Appendix A.1).

A unit says which parameters it has, what it computes from them, which nodes of the computational
graph it is (§ 3, Table 1), and what it costs. Flax modules (`network.py`), the engine's programs
(`engine/`), graphs (`graph.py`) and counts (`counts.py`) follow from that. Batch norm and the sums
of states are units as well (`NormSum`), and so is the classifier. Which units an operation has is
in `operations.py`.

Units are plain data: equal ones are one compiled program, whichever architecture they belong to.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ghn_jax.deepnets1m import layers
from ghn_jax.deepnets1m.layers import concatenate

HEADS = 8  # of attention
EPSILON = 1e-5  # of norm layers

Arrays = tuple[jax.Array, ...]


class Parameter(NamedTuple):
    """A parameter as a node of the graph has it.

    Attributes:
      primitive: of the node (Table 1).
      shape: in PyTorch's order: (out, in, height, width), (out, in) or (channels,).
    """

    primitive: str
    shape: tuple[int, ...]

    @property
    def leaves(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of its arrays in Flax."""
        shape = self.shape
        if self.primitive in ("bn", "ln"):
            return {"scale": shape, "bias": shape}
        if self.primitive == "bias":
            return {"bias": shape}
        if self.primitive == "pos_enc":
            return {"embedding": (*shape[2:], shape[1])}
        return {"kernel": (*shape[2:], shape[1], shape[0])}


class Node(NamedTuple):
    """A node of the computational graph.

    Attributes:
      primitive: name of one of the paper's 15 primitives (Table 1).
      name: official parameter name, e.g. 'cells.0._ops.1.op.1.weight'; '' without parameters. One
        that starts with a dot follows the operation's name.
      shape: parameter shape in PyTorch's order, or None.
      sources: what it reads: indices of nodes within the operation, or -1 for the operation's
        input, or () for none.
    """

    primitive: str
    name: str = ""
    shape: tuple[int, ...] | None = None
    sources: tuple[int, ...] = (-1,)


def over(x: jax.Array, last: jax.Array) -> jax.Array:
    """What an image has of its last axes, (C,) say, in the shape of images (B, H, W, C).

    Broadcast in so many words, as `jax_numpy_rank_promotion="raise"` demands it.
    """
    return jnp.broadcast_to(last, x.shape)


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    y = x @ kernel
    return y + over(y, bias)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Layer norm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * lax.rsqrt(variance + EPSILON) * over(x, scale) + over(x, bias)


class Unit(abc.ABC):
    """A part of an operation that is one program; subclasses are frozen dataclasses.

    Attributes:
      normed: whether batch norm follows, in networks that have it.
    """

    normed: ClassVar[bool] = True

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its parameters; `apply` takes the arrays of each in turn."""
        return ()

    @abc.abstractmethod
    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """What it computes.

        Args:
          params: the arrays of all parameters (`Parameter.leaves`), flat.
          inputs: (B, H, W, C) parts that are concatenated along channels; None for zeros.
          layers: the module that array operations are taken from.

        Returns:
          (B, H', W', C').
        """

    def size(self, size: int) -> int:
        """Height (= width) of what it computes, from that of its input."""
        return size

    def multiply_adds(self, size: int) -> int:
        """Multiply-adds for one image, whose height is given; as is usual, of products only."""
        return 0

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """Its nodes, given the names of its parameters: each reads the one before it."""
        return [
            Node(p.primitive, name, p.shape, (i - 1,))
            for i, (p, name) in enumerate(zip(self.parameters, names, strict=True))
        ]


class Convolution(NamedTuple):
    """One convolution: channels, (height, width) of the kernel, strides and dilation.

    Attributes:
      primitive: 'conv'; or 'sep_conv' or 'dil_conv', which have one kernel for each channel.
    """

    c_in: int
    c_out: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    primitive: str = "conv"

    @property
    def parameter(self) -> Parameter:
        """Its kernel."""
        c_in = self.c_in if self.primitive == "conv" else 1
        return Parameter(self.primitive, (self.c_out, c_in, *self.kernel))

    def apply(self, w: jax.Array, parts: tuple, layers) -> jax.Array:
        """(B, H, W, C) parts of its input -> (B, H', W', c_out)."""
        if self.primitive != "conv":
            dilation = 2 if self.primitive == "dil_conv" else 1
            return layers.depthwise(*parts, w, self.strides[0], dilation)
        if self.kernel == (1, 1):
            return layers.pointwise(parts, w, self.strides[0])
        return layers.conv(*parts, w, self.strides)


@dataclasses.dataclass(frozen=True)
class Convolutions(Unit):
    """Convolutions one after another, behind a ReLU or not."""

    relu: bool
    convolutions: tuple[Convolution, ...]

    @property
    def features(self) -> int:
        """Channels of what it computes, which batch norm follows."""
        return self.convolutions[-1].c_out

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The kernels."""
        return tuple(c.parameter for c in self.convolutions)

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        parts = inputs
        if self.relu:
            parts = tuple(x if x is None else nn.relu(x) for x in parts)
        for convolution, w in zip(self.convolutions, params, strict=True):
            parts = (convolution.apply(w, parts, layers),)
        return parts[0]

    def size(self, size: int) -> int:
        """See `Unit`."""
        for convolution in self.convolutions:
            size = -(-size // convolution.strides[0])
        return size

    def multiply_adds(self, size: int) -> int:
        """See `Unit`."""
        height = width = size
        total = 0
        for convolution in self.convolutions:
            height, width = (
                -(-n // s) for n, s in zip((height, width), convolution.strides, strict=True)
            )
            total += math.prod(convolution.parameter.shape) * height * width
        return total


@dataclasses.dataclass(frozen=True)
class FactorizedReduce(Unit):
    """Halves the resolution: two strided 1x1 convolutions, the second shifted by one pixel."""

    c_in: int
    features: int

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The kernels of both halves of the output's channels."""
        return (Parameter("conv", (self.features // 2, self.c_in, 1, 1)),) * 2

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        parts = [x if x is None else nn.relu(x) for x in inputs]
        shifted = [x if x is None else x[:, 1:, 1:] for x in parts]
        halves = (layers.pointwise(x, w, 2) for x, w in zip((parts, shifted), params, strict=True))
        return jnp.concatenate([*halves], axis=-1)

    def size(self, size: int) -> int:
        """See `Unit`."""
        return -(-size // 2)

    def multiply_adds(self, size: int) -> int:
        """See `Unit`."""
        return self.c_in * self.features * self.size(size) ** 2

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """See `Unit`."""
        halves = [
            Node(p.primitive, name, p.shape) for p, name in zip(self.parameters, names, strict=True)
        ]
        return [*halves, Node("concat", sources=(0, 1))]


@dataclasses.dataclass(frozen=True)
class Pool(Unit):
    """3x3 pooling; `kind` is 'max' or 'avg'."""

    normed: ClassVar[bool] = False
    kind: str
    stride: int

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        return (layers.max_pool if self.kind == "max" else layers.avg_pool)(*inputs, self.stride)

    def size(self, size: int) -> int:
        """See `Unit`."""
        return -(-size // self.stride)

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """See `Unit`; pooling nodes carry their kernel as their shape."""
        return [Node(f"{self.kind}_pool", shape=(1, 1, 3, 3))]


@dataclasses.dataclass(frozen=True)
class Identity(Unit):
    """Its input, or every second pixel of it; no node."""

    normed: ClassVar[bool] = False
    stride: int = 1

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        (x,) = inputs
        return x[:, :: self.stride, :: self.stride]

    def size(self, size: int) -> int:
        """See `Unit`."""
        return -(-size // self.stride)


def _dense(c_out: int, c_in: int) -> tuple[Parameter, Parameter]:
    return Parameter("conv", (c_out, c_in)), Parameter("bias", (c_out,))


@dataclasses.dataclass(frozen=True)
class SqueezeExcite(Unit):
    """Squeeze & Excitation with ratio 2, ReLU and hard swish; strides subsample the output."""

    normed: ClassVar[bool] = False
    channels: int
    stride: int

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Two dense layers."""
        c = self.channels
        return (*_dense(c // 2, c), *_dense(c, c // 2))

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        (x,), (down, down_bias, up, up_bias) = inputs, params
        gate = nn.relu(_linear(x.mean((1, 2)), down, down_bias))
        gate = nn.hard_swish(_linear(gate, up, up_bias))
        return (x * gate[:, None, None])[:, :: self.stride, :: self.stride]

    def size(self, size: int) -> int:
        """See `Unit`."""
        return -(-size // self.stride)

    def multiply_adds(self, size: int) -> int:
        """See `Unit`."""
        return 2 * (self.channels // 2) * self.channels

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """See `Unit`."""
        return [*super().nodes(names), Node("cse", sources=(-1, 3))]


@dataclasses.dataclass(frozen=True)
class TransformerBlock(Unit):
    """Over positions: 8-head self-attention and a feed-forward layer with GELU, as in the ViT."""

    normed: ClassVar[bool] = False
    channels: int

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Layer norm, queries with keys and values, output; layer norm, two dense layers."""
        c, norm = self.channels, Parameter("ln", (self.channels,))
        attention = (norm, Parameter("conv", (3 * c, c)), *_dense(c, c))
        return (*attention, norm, *_dense(c, c), *_dense(c, c))

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        (x,) = inputs
        scale, shift, qkv, out, out_bias, scale_2, shift_2, first, bias, second, bias_2 = params
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        y = layer_norm(x, scale, shift) @ qkv
        q, k, v = jnp.moveaxis(y.reshape(b, h * w, 3, HEADS, c // HEADS), 2, 0)
        x = _linear(layers.attend(q, k, v).reshape(b, h * w, c), out, out_bias) + x
        y = nn.gelu(_linear(layer_norm(x, scale_2, shift_2), first, bias), approximate=False)
        return (_linear(y, second, bias_2) + x).reshape(b, h, w, c)

    def multiply_adds(self, size: int) -> int:
        """See `Unit`."""
        products = sum(math.prod(p.shape) for p in self.parameters if p.primitive == "conv")
        # Queries by keys, and weights by values.
        return products * size**2 + 2 * size**4 * self.channels

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """See `Unit`."""
        p = [
            Node(p.primitive, name, p.shape) for p, name in zip(self.parameters, names, strict=True)
        ]
        nodes = [p[0], p[1], Node("msa"), p[2], p[3]]
        nodes = [n._replace(sources=(i - 1,)) for i, n in enumerate(nodes)]
        after = [n._replace(sources=(i - 1,)) for i, n in enumerate(p[4:], 6)]
        return [*nodes, Node("sum", sources=(4, -1)), *after, Node("sum", sources=(10, 5))]


@dataclasses.dataclass(frozen=True)
class PatchEmbedding(Unit):
    """The ViT's stem: patches of k x k pixels to channels, and an encoding of their positions."""

    normed: ClassVar[bool] = False
    channels: int
    patch: int
    positions: int

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The patches' kernel, and the positions' encodings."""
        c, k, n = self.channels, self.patch, self.positions
        return Parameter("conv", (c, 3, k, k)), Parameter("pos_enc", (1, c, n, n))

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`."""
        (images,), (w, embedding) = inputs, params
        k, pad = self.patch, self._pad
        x = lax.conv_general_dilated(
            images, w, (k, k), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x + over(x, embedding)

    @property
    def _pad(self) -> int:
        return 1 if self.patch == 3 else 0

    def size(self, size: int) -> int:
        """See `Unit`."""
        return (size + 2 * self._pad - self.patch) // self.patch + 1

    def multiply_adds(self, size: int) -> int:
        """See `Unit`."""
        return math.prod(self.parameters[0].shape) * self.positions**2

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """See `Unit`."""
        kernel, encoding = super().nodes(names)
        return [kernel, encoding._replace(sources=()), Node("sum", sources=(0, 1))]


@dataclasses.dataclass(frozen=True)
class NormSum(Unit):
    """A state: the sum of what one or two operations computed, each behind batch norm or not.

    Attributes:
      channels: of the state.
      normed_terms: how many of its inputs, the first ones, are normalised; the others are added.
      running: whether with given statistics, in place of the batch's (as in PyTorch's `eval`).
      dropped: how many terms are scaled image by image, for drop path; none, or all.
    """

    normed: ClassVar[bool] = False
    channels: int
    normed_terms: int
    running: bool = False
    dropped: int = 0

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Scale and shift of each batch norm."""
        return (Parameter("bn", (self.channels,)),) * self.normed_terms

    def apply(self, params: Arrays, inputs: tuple, layers=layers) -> jax.Array:
        """See `Unit`; with `running`, (2, C) mean and variance of each norm follow `params`."""
        if not self.running:
            return self.with_statistics(params, inputs)[0]
        count = 2 * self.normed_terms
        return self._sum(params[:count], inputs, params[count:])

    def with_statistics(
        self, params: Arrays, inputs: tuple, scales: jax.Array | None = None
    ) -> tuple[jax.Array, Arrays]:
        """The state, and the (2, C) mean and variance of each normalised input, in float32.

        Args:
          params, inputs: see `Unit`.
          scales: (terms, B) factors of each term, where they are `dropped`.
        """
        statistics = tuple(map(batch_statistics, inputs[: self.normed_terms]))
        return self._sum(params, inputs, statistics, scales), statistics

    def _sum(self, params, inputs, statistics, scales=None) -> jax.Array:
        n = self.normed_terms
        terms = [
            (
                (x - over(x, mean)) * over(x, scale * lax.rsqrt(variance + EPSILON))
                + over(x, shift)
            ).astype(x.dtype)
            for x, (mean, variance), scale, shift in zip(
                inputs[:n], statistics, params[::2], params[1::2], strict=True
            )
        ]
        terms += inputs[n:]
        if scales is not None:
            scales = scales[:, :, None, None, None].astype(terms[0].dtype)
            terms = [x * scale for x, scale in zip(terms, scales, strict=True)]
        return sum(terms[::-1])

    def gradient(self, params: Arrays, inputs: tuple, statistics: Arrays, g: jax.Array):
        """Cotangents of the parameters and of the normalised inputs, for one of the state.

        That of the other inputs is `g` itself.
        """
        dparams, dinputs = [], []
        dshift = g.astype(jnp.float32).sum((0, 1, 2))
        count = g.size // self.channels
        for x, (mean, variance), scale in zip(inputs, statistics, params[::2], strict=True):
            inverse = lax.rsqrt(variance + EPSILON)
            dscale = (g * ((x - mean) * inverse)).astype(jnp.float32).sum((0, 1, 2))
            factor = scale * inverse
            a, b = factor * dshift / count, factor * dscale / count * inverse
            dinputs.append((g * factor - a - (x - mean) * b).astype(x.dtype))
            dparams += [dscale, dshift]
        return tuple(dparams), tuple(dinputs)


def batch_statistics(x: jax.Array) -> jax.Array:
    """(2, C) mean and variance of (B, H, W, C), in float32; the variance of centred numbers."""
    x = x.astype(jnp.float32)
    mean = x.mean((0, 1, 2))
    return jnp.stack([mean, jnp.square(x - over(x, mean)).mean((0, 1, 2))])


@dataclasses.dataclass(frozen=True)
class Classifier(Unit):
    """The head: averages over positions or flattens, then fully connected layers.

    Attributes:
      glob_avg: average; else flattened in (channel, row, column) order, as in PyTorch, so that
        weights interchange.
      dims: sizes of the layers, input first: (in, [hidden, ...], classes).
    """

    normed: ClassVar[bool] = False
    glob_avg: bool
    dims: tuple[int, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Weight and bias of each layer."""
        sizes = itertools.pairwise(self.dims)
        return tuple(p for c_in, c_out in sizes for p in _dense(c_out, c_in))

    def apply(self, params: Arrays, inputs: tuple, layers=layers, key=None) -> jax.Array:
        """(B, classes) logits; see `Unit`.

        A weight may have fewer rows than its layer has inputs: they repeat (B.1).

        Args:
          params, inputs, layers: see `Unit`.
          key: of the dropout between layers; none without it.
        """
        if self.glob_avg:
            x = concatenate([x if x is None else x.mean((1, 2)) for x in inputs])
        else:
            x = concatenate(
                [x if x is None else x.transpose(0, 3, 1, 2).reshape(len(x), -1) for x in inputs]
            )
        for i, (w, bias) in enumerate(zip(params[::2], params[1::2], strict=True)):
            if i:
                x = nn.relu(x)
                if key is not None:
                    keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, x.shape)
                    x = jnp.where(keep, 2 * x, 0)
            x = _linear(_fold(x, w.shape[0]), w, bias)
        return x

    def size(self, size: int) -> int:
        """See `Unit`; logits have no positions."""
        return 1

    def multiply_adds(self, size: int) -> int:
        """See `Unit`."""
        return sum(c_in * c_out for c_in, c_out in itertools.pairwise(self.dims))

    def nodes(self, names: Sequence[str]) -> list[Node]:
        """See `Unit`."""
        layers = super().nodes(names)
        if not self.glob_avg:
            return layers
        layers = [n._replace(sources=(i,)) for i, n in enumerate(layers)]
        return [Node("glob_avg"), *layers]


def _fold(x: jax.Array, rows: int) -> jax.Array:
    """(B, n) -> (B, rows): the sums of features that meet the same row of a weight that repeats."""
    n = x.shape[1]
    if rows >= n:
        return x
    x = jnp.pad(x, ((0, 0), (0, -n % rows)))
    return x.reshape(len(x), -1, rows).sum(1)
