"""The decoder of GHN-1 and GHN-2: a small tensor, then 1x1 convolutions (paper B.1)."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax

from ghn_jax.hypernet.decoder import Decoder
from ghn_jax.hypernet.gatedgnn import add_bias, dense

_KERNEL = ("fc", "conv_0", "conv_1")


class ConvDecoder(Decoder):
    """The compact decoder of B.1: few parameters, however many channels a tile has.

    A linear layer makes 128 values at each kernel position, then two 1x1 convolutions (in, out)
    channels. Only the positions asked for are computed.
    """

    reads: ClassVar = {
        **Decoder.reads,
        "kernel": _KERNEL,
        "depthwise": _KERNEL,
        "position": _KERNEL,
        "classifier": (*_KERNEL, "class_kernel"),
    }
    by_position: ClassVar = ("fc",)

    def setup(self):
        """Makes the layers."""
        d = self.features
        out, in_, height, width = self.max_shape
        mid, wide = 4 * d, 8 * d
        positions = height * width
        # (d, 128, height, width): sliced to a kernel's positions before it is applied.
        self.fc = self.layer("fc", d, mid * positions)
        self.conv_0 = self.layer("conv_0", mid, wide)
        self.conv_1 = self.layer("conv_1", wide, in_ * out)
        self.class_kernel = self.layer("class_kernel", out, self.num_classes)
        super().setup()

    def _hidden(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, 256), the kernel decoder up to its last convolution."""
        _, _, h, w = self.max_shape
        mid = 4 * self.features
        rows, columns = self.window(height, width)
        kernel = self.fc["kernel"].reshape(-1, mid, h, w)[:, :, rows, columns]
        bias = self.fc["bias"].reshape(mid, h, w)[:, rows, columns]
        kernel = kernel.transpose(0, 2, 3, 1).reshape(self.features, -1)
        bias = bias.transpose(1, 2, 0).reshape(-1)
        y = nn.relu(add_bias(x @ kernel, bias)).reshape(len(x), -1, mid)
        return nn.relu(dense(self.conv_0, y))

    def _last(self, in_channels: slice, out_channels: slice):
        """The last convolution restricted to some channels: {'kernel': (256, i, o), 'bias'}."""
        out, in_ = self.max_shape[:2]
        kernel = self.conv_1["kernel"].reshape(-1, in_, out)
        bias = self.conv_1["bias"].reshape(in_, out)
        return kernel[:, in_channels, out_channels], bias[in_channels, out_channels]

    def kernel(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, in, out) tiles of dense convolutions and linear layers."""
        out, in_ = self.max_shape[:2]
        y = dense(self.conv_1, self._hidden(x, height, width))
        return y.reshape(len(x), height * width, in_, out)

    def depthwise(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, out) tiles of depthwise convolutions (input channel 0)."""
        kernel, bias = self._last(slice(0, 1), slice(None))
        return add_bias(self._hidden(x, height, width) @ kernel[:, 0], bias[0])

    def position(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, in) tiles of positional encodings (output channel 0)."""
        kernel, bias = self._last(slice(None), slice(0, 1))
        return add_bias(self._hidden(x, height, width) @ kernel[:, :, 0], bias[:, 0])

    def classifier(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, in, classes): the classification weight, one map over output channels."""
        return dense(self.class_kernel, nn.relu(self.kernel(x, 1, 1)[:, 0]))
