"""The decoder of vanilla GHNs: an MLP to every number of a tile (paper C.2.1, Table 8)."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax

from ghn_jax.hypernet.decoder import Decoder
from ghn_jax.hypernet.gatedgnn import add_bias, dense, dense_params

_KERNEL = ("mlp_0", "mlp_1")


class MLPDecoder(Decoder):
    """One hidden layer of 2 d, then an output for each number of the largest tile.

    It has 32 million parameters for tiles of 64x64 channels and 11x11 positions, and 4.1 billion
    for 512x1024. The classifier's weight has an output layer of its own, as in the authors' code.
    """

    reads: ClassVar = {
        **Decoder.reads,
        "kernel": _KERNEL,
        "depthwise": _KERNEL,
        "position": _KERNEL,
        "classifier": ("mlp_0", "class_kernel"),
    }
    by_position: ClassVar = ("mlp_1",)

    def setup(self):
        """Makes the layers."""
        d = self.features
        out, in_, height, width = self.max_shape
        self.mlp_0 = dense_params(self, "mlp_0", d, 2 * d)
        # (2 d, in, out, height, width)
        self.mlp_1 = dense_params(self, "mlp_1", 2 * d, in_ * out * height * width)
        self.class_kernel = dense_params(self, "class_kernel", 2 * d, self.num_classes * in_)
        super().setup()

    def _tiles(self, x: jax.Array, height: int, width: int, i: slice, o: slice) -> jax.Array:
        """(n, d) -> (n, height * width, in, out), of some input and output channels."""
        out, in_, h, w = self.max_shape

        def few(p: jax.Array) -> jax.Array:
            p = p.reshape(*p.shape[:-1], in_, out, h, w)[..., i, o, :height, :width]
            p = p.reshape(*p.shape[:-2], height * width)
            return p.transpose(*range(p.ndim - 3), -1, -3, -2)

        kernel, bias = few(self.mlp_1["kernel"]), few(self.mlp_1["bias"])
        hidden = nn.relu(dense(self.mlp_0, x))
        y = add_bias(hidden @ kernel.reshape(len(kernel), -1), bias.reshape(-1))
        return y.reshape(len(x), *bias.shape)

    def kernel(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, in, out) tiles of dense convolutions and linear layers."""
        return self._tiles(x, height, width, slice(None), slice(None))

    def depthwise(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, out) tiles of depthwise convolutions (input channel 0)."""
        return self._tiles(x, height, width, slice(0, 1), slice(None))[:, :, 0]

    def position(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, in) tiles of positional encodings (output channel 0)."""
        return self._tiles(x, height, width, slice(None), slice(0, 1))[..., 0]

    def classifier(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, in, classes): the classification weight, from the first layer's output."""
        y = dense(self.class_kernel, nn.relu(dense(self.mlp_0, x)))
        return y.reshape(len(x), self.num_classes, -1).swapaxes(1, 2)
