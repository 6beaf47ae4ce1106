"""Target networks as Flax modules (paper § 2.1, Appendix A.1).

`build_network(arch)` has parameters for exactly the operations that the output depends on, under
the official names (`parameters.parameter_path`), so that a predicted tree fits. Images are NHWC.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax import kernels
from ghn_jax.architecture import Architecture
from ghn_jax.parameters import parameter_path
from ghn_jax.wiring import IMAGE, Operation, wire

HEADS = 8  # of attention

he_init = nn.initializers.he_normal()


def _module_name(op: Operation) -> str:
    """'cells.0._ops.1' -> 'ops_1', its name within the cell."""
    return parameter_path(op.name + ".weight")[-1]


class Conv(nn.Module):
    """A convolution without bias, padded symmetrically as in PyTorch.

    Attributes:
      features: output channels.
      kernel: (height, width).
      strides: (vertical, horizontal).
      dilation: of the kernel, where it is depthwise.
      depthwise: one kernel for each channel.
      padding: (vertical, horizontal); half the (dilated) kernel if not given.
    """

    features: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilation: int = 1
    depthwise: bool = False
    padding: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', features)."""
        groups = x.shape[-1] if self.depthwise else 1
        shape = (*self.kernel, x.shape[-1] // groups, self.features)
        kernel = self.param("kernel", he_init, shape)
        if self.depthwise:
            return kernels.depthwise(x, kernel[:, :, 0], self.strides[0], self.dilation)
        if self.padding is None:
            return kernels.conv(x, kernel, self.strides)
        return kernels.convolve(x, kernel, self.strides, [(p, p) for p in self.padding])


class BatchNorm(nn.Module):
    """Batch norm on the statistics of the batch, as predicted parameters are evaluated (C.1)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        mean = x.mean((0, 1, 2))
        centred = x - mean
        variance = jnp.square(centred).mean((0, 1, 2))
        return centred * (scale * jax.lax.rsqrt(variance + 1e-5)) + bias


class ReLUConvNorm(nn.Module):
    """ReLU, one or more convolutions, batch norm: names op_1, op_2, ... as in the official code."""

    convs: tuple[Conv, ...]
    norm: bool
    first: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', features)."""
        x = nn.relu(x)
        for i, conv in enumerate(self.convs, self.first):
            x = conv.clone(name=f"op_{i}", parent=self)(x)
        return BatchNorm(name=f"op_{self.first + len(self.convs)}")(x) if self.norm else x


def _relu_conv_norm(op: Operation, norm: bool, name: str) -> nn.Module:
    """The convolutional operations, apart from the doubled separable one."""
    s, c_in, c = op.stride, op.in_channels, op.out_channels
    kind = "conv_1x1" if op.kind == "preprocess" else op.kind
    k = int(kind[-1])
    if kind == "conv_7x1_1x7":
        convs = (
            Conv(c_in, (1, 7), (1, s), parent=None),
            Conv(c, (7, 1), (s, 1), parent=None),
        )
    elif kind.startswith("dil_conv"):
        convs = (
            Conv(c_in, (k, k), (s, s), 2, True, parent=None),
            Conv(c, (1, 1), parent=None),
        )
    else:
        convs = (Conv(c, (k, k), (s, s), parent=None),)
    return ReLUConvNorm(convs, norm, name=name)


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice."""

    op: Operation
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', out_channels)."""
        k = int(self.op.kind[-1])
        strides = (self.op.stride, 1)
        for i, features in enumerate((self.op.in_channels, self.op.out_channels)):
            at = 4 * i
            x = nn.relu(x)
            x = Conv(x.shape[-1], (k, k), (strides[i],) * 2, 1, True, name=f"op_{at + 1}")(x)
            x = Conv(features, (1, 1), name=f"op_{at + 2}")(x)
            if self.norm:
                x = BatchNorm(name=f"op_{at + 3}")(x)
        return x


class FactorizedReduce(nn.Module):
    """Halves the resolution: two strided 1x1 convolutions, the second shifted by one pixel."""

    features: int
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / 2, W / 2, features)."""
        x = nn.relu(x)
        half = self.features // 2
        a = Conv(half, (1, 1), (2, 2), name="conv_1")(x)
        b = Conv(half, (1, 1), (2, 2), name="conv_2")(x[:, 1:, 1:])
        x = jnp.concatenate([a, b], axis=-1)
        return BatchNorm(name="bn")(x) if self.norm else x


class SqueezeExcite(nn.Module):
    """Squeeze & Excitation with ratio 2, ReLU and hard swish; strides subsample the output."""

    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', C)."""
        c = x.shape[-1]
        gate = x.mean((1, 2))
        gate = nn.relu(nn.Dense(c // 2, name="fc1", kernel_init=he_init)(gate))
        gate = nn.hard_swish(nn.Dense(c, name="fc2", kernel_init=he_init)(gate))
        return (x * gate[:, None, None])[:, :: self.stride, :: self.stride]


class FeedForward(nn.Module):
    """The transformer's two layers with GELU between them."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C)."""
        c = x.shape[-1]
        x = nn.gelu(nn.Dense(self.hidden, name="net_0", kernel_init=he_init)(x), approximate=False)
        return nn.Dense(c, name="net_3", kernel_init=he_init)(x)


class Attention(nn.Module):
    """A transformer block over positions: 8-head self-attention and a feed-forward layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        y = nn.LayerNorm(epsilon=1e-5, name="ln1")(x)
        y = nn.Dense(3 * c, use_bias=False, name="to_qkv", kernel_init=he_init)(y)
        q, k, v = jnp.moveaxis(y.reshape(b, h * w, 3, HEADS, c // HEADS), 2, 0)
        logits = jnp.einsum("bihd,bjhd->bhij", q, k) * (c // HEADS) ** -0.5
        y = jnp.einsum("bhij,bjhd->bihd", nn.softmax(logits), v).reshape(b, h * w, c)
        x = nn.Dense(c, name="to_out_0", kernel_init=he_init)(y) + x
        x = FeedForward(c, name="ff")(nn.LayerNorm(epsilon=1e-5, name="ln2")(x)) + x
        return x.reshape(b, h, w, c)


class PositionalEncoding(nn.Module):
    """Adds a learned encoding of each position."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        return x + self.param("embedding", nn.initializers.normal(1.0), x.shape[1:])


def avg_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 average pooling; padding does not count."""
    options = ((3, 3), (stride, stride), ((1, 1), (1, 1)))
    return nn.avg_pool(x, *options, count_include_pad=False)


class Cell(nn.Module):
    """One cell: its operations in order, each adding to the states that it writes."""

    operations: tuple[Operation, ...]
    norm: bool

    def _apply(self, op: Operation, x: jax.Array) -> jax.Array:
        if op.kind in ("skip_connect", "subsample"):
            return x[:, :: op.stride, :: op.stride]
        if op.kind in ("max_pool_3x3", "avg_pool_3x3"):
            return (kernels.max_pool if op.kind[0] == "m" else avg_pool)(x, op.stride)
        name = _module_name(op)
        if op.kind == "factorized_reduce":
            return FactorizedReduce(op.out_channels, self.norm, name=name)(x)
        if op.kind == "cse":
            return SqueezeExcite(op.stride, name=name)(x)
        if op.kind == "msa":
            return Attention(name=name)(x)
        if op.kind.startswith("sep_conv"):
            return SepConv(op, self.norm, name=name)(x)
        return _relu_conv_norm(op, self.norm, name)(x)

    @nn.compact
    def __call__(self, states: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Returns the states given and those that the cell computes."""
        states = dict(states)
        for op in self.operations:
            y = self._apply(op, concatenate(op.inputs, states))
            (out,) = op.output
            states[out] = states[out] + y if out in states else y
        return states


def concatenate(feature, states: dict[int, jax.Array]) -> jax.Array:
    """A feature's states along channels; missing parts are zero."""
    like = next(states[s] for s in feature if s is not None)
    parts = [jnp.zeros_like(like) if s is None else states[s] for s in feature]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


class Network(nn.Module):
    """A network of the DeepNets-1M design space; see `build_network`.

    Attributes:
      arch: the architecture.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels.
    """

    arch: Architecture
    num_classes: int
    image_size: int

    def _stem(self, op: Operation, x: jax.Array, norm: bool) -> jax.Array:
        c, k, stride = op.out_channels, op.kernel, op.stride
        if op.kind == "stem_pool":
            return kernels.max_pool(x, 2)
        if op.kind == "stem_vit":
            padding = (1, 1) if k == 3 else (0, 0)
            x = Conv(c, (k, k), (stride, stride), padding=padding, name="stem0")(x)
            return PositionalEncoding(name="pos_enc")(x)
        # (position in the official sequence, features, kernel, stride) of each convolution.
        if op.kind == "stem_conv":
            prefix, convs = "stem", [(0, c, k, stride)]
        elif op.kind == "stem_imagenet":
            each = 2 if stride == 4 else 1
            prefix, convs = "stem0", [(0, c // 2, k, each), (3, c, 3, each)]
        else:
            prefix, convs = "stem1", [(1, c, 3, 2)]
        for at, features, kernel, s in convs:
            x = nn.relu(x) if at else x
            x = Conv(features, (kernel, kernel), (s, s), name=f"{prefix}_{at}")(x)
            x = BatchNorm(name=f"{prefix}_{at + 1}")(x) if norm else x
        return x

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits.

        `train` turns on the dropout between fully connected layers (rng stream 'dropout').
        """
        wiring = wire(self.arch, num_classes=self.num_classes, image_size=self.image_size)
        states = {IMAGE: images}
        for op in wiring.operations:
            if not op.kind.startswith("stem"):
                continue
            y = self._stem(op, concatenate(op.inputs, states), wiring.norm)
            states.update(zip(op.output, jnp.split(y, len(op.output), axis=-1), strict=True))
        rest = [op for op in wiring.operations if not op.kind.startswith("stem")]
        for cell, operations in itertools.groupby(rest, key=lambda op: op.cell):
            states = Cell(tuple(operations), wiring.norm, name=f"cells_{cell}")(states)
        head = wiring.head
        x = concatenate(head.feature, states)
        if head.glob_avg:
            x = x.mean((1, 2))
        else:
            # Flattened channel by channel, so that weights interchange with PyTorch.
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        for i, features in enumerate(head.dims[1:]):
            if i:
                x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
            x = nn.Dense(features, name=f"classifier_{3 * i}", kernel_init=he_init)(x)
        return x


def build_network(arch: Architecture, num_classes: int = 10, image_size: int = 32) -> Network:
    """The Flax module of an architecture.

    Args:
      arch: the architecture.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; above 96 the stems are ImageNet's.

    Returns:
      A Linen module; `init` gives He-initialised parameters.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: num_classes or image_size is out of range.
    """
    wire(arch, num_classes=num_classes, image_size=image_size)
    return Network(arch, num_classes, image_size)
