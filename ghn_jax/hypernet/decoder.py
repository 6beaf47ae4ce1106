"""From node states to parameter tiles: shape encoding and the three decoders (paper B.1, B.2).

A *tile* is what the decoder predicts before it is tiled and sliced to a parameter's shape
(`tiling.py`): 64 input by 64 output channels at each position of a kernel.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.hypernet.gatedgnn import add_bias, dense, dense_params
from ghn_jax.hypernet.tiling import TileKind

LARGEST_CHANNELS = 8192


def channel_table(num_classes: int) -> np.ndarray:
    """The predefined channel numbers (B.1), sorted: about 390 from 1 to 8192."""
    steps = [*range(8, 64, 8), *range(64, 4096, 16), *range(4096, LARGEST_CHANNELS + 1, 32)]
    return np.unique([1, 3, num_classes, *steps])


def spatial_table(largest: int) -> np.ndarray:
    """The predefined kernel heights and widths (B.1), sorted."""
    return np.unique([*range(1, max(12, largest), 2), 14, 16])


def _nearest(table: np.ndarray, exceptions: dict[int, int]) -> np.ndarray:
    """Maps 0..max(table) to table rows: 0 ("no parameter") to one row past the table's end."""
    values = np.arange(table[-1] + 1)
    rows = np.abs(values[:, None] - table[None]).argmin(1)
    for value, like in exceptions.items():
        rows[value] = np.searchsorted(table, like)
    rows[0] = len(table)
    return rows.astype(np.int32)


@functools.cache
def _rows(num_classes: int, largest_kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the channel table and of the spatial table for 0, 1, 2, ... (B.1)."""
    channels, spatial = channel_table(num_classes), spatial_table(largest_kernel)
    # The authors' own exceptions to "nearest": 4 to 7 channels are 8, 2 pixels are 3.
    four_to_seven = {c: 8 for c in range(4, 8) if c not in channels}
    return _nearest(channels, four_to_seven), _nearest(spatial, {2: 3})


def nearest_shape(
    shape: tuple[int, int, int, int], num_classes: int, largest_kernel: int
) -> tuple[int, ...]:
    """The shape (out, in, height, width) that `ShapeEncoder` takes a parameter's for."""
    tables = channel_table(num_classes), spatial_table(largest_kernel)
    rows = _rows(num_classes, largest_kernel)
    return tuple(
        int(tables[i // 2][rows[i // 2][min(n, len(rows[i // 2]) - 1)]])
        for i, n in enumerate(shape)
    )


class ShapeEncoder(nn.Module):
    """Encodes parameter shapes (B.1): four 8-vectors for out, in, height, width.

    Values off the tables take the nearest row, those beyond the last row the last one.
    """

    features: int
    num_classes: int
    largest_kernel: int

    @nn.compact
    def __call__(self, shape: jax.Array) -> jax.Array:
        """(N, 4) int32 (out, in, height, width), zeros for no parameter -> (N, features)."""
        channels = channel_table(self.num_classes)
        spatial = spatial_table(self.largest_kernel)
        normal = nn.initializers.normal(1.0)  # PyTorch's default for embeddings
        d = self.features // 4
        by_channel = self.param("channel", normal, (len(channels) + 1, d))
        by_size = self.param("spatial", normal, (len(spatial) + 1, d))
        channel_rows, spatial_rows = map(jnp.asarray, _rows(self.num_classes, self.largest_kernel))
        rows = [
            by_channel[channel_rows[jnp.minimum(shape[:, i], len(channel_rows) - 1)]]
            for i in (0, 1)
        ] + [by_size[spatial_rows[jnp.minimum(shape[:, i], len(spatial_rows) - 1)]] for i in (2, 3)]
        return jnp.concatenate(rows, axis=-1)


class Decoder(nn.Module):
    """The three decoders: kernels, vectors (norm layers and biases), and the classifier (B.1).

    The kernel decoder is the compact one of B.1: a linear layer to 128 values at each kernel
    position, then two 1x1 convolutions to (in, out) channels. Only the positions asked for are
    computed.

    Attributes:
      features: d, size of a node's state.
      max_shape: (out, in, height, width) of the largest tile.
      num_classes: number of classes.
    """

    features: int
    max_shape: tuple[int, int, int, int]
    num_classes: int

    def setup(self):
        """Makes the layers that `__call__` chooses from."""
        d = self.features
        out, in_, height, width = self.max_shape
        mid, wide = 4 * d, 8 * d
        positions = height * width
        # (d, 128, height, width): sliced to a kernel's positions before it is applied.
        self.fc = dense_params(self, "fc", d, mid * positions)
        self.conv_0 = dense_params(self, "conv_0", mid, wide)
        self.conv_1 = dense_params(self, "conv_1", wide, in_ * out)
        self.class_kernel = dense_params(self, "class_kernel", out, self.num_classes)
        self.vector_0 = dense_params(self, "vector_0", d, 2 * d)
        self.vector_1 = dense_params(self, "vector_1", 2 * d, 2 * max(out, in_))
        self.class_bias = dense_params(self, "class_bias", max(out, in_), self.num_classes)

    def _hidden(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, 256), the kernel decoder up to its last convolution."""
        _, _, h, w = self.max_shape
        mid = 4 * self.features
        kernel = self.fc["kernel"].reshape(-1, mid, h, w)[:, :, :height, :width]
        bias = self.fc["bias"].reshape(mid, h, w)[:, :height, :width]
        kernel = kernel.transpose(0, 2, 3, 1).reshape(self.features, -1)
        bias = bias.transpose(1, 2, 0).reshape(-1)
        y = nn.relu(add_bias(x @ kernel, bias)).reshape(len(x), height * width, mid)
        return nn.relu(dense(self.conv_0, y))

    def _last(self, in_channels: slice, out_channels: slice):
        """The last convolution restricted to some channels: {'kernel': (256, i, o), 'bias'}."""
        out, in_ = self.max_shape[:2]
        kernel = self.conv_1["kernel"].reshape(-1, in_, out)
        bias = self.conv_1["bias"].reshape(in_, out)
        return kernel[:, in_channels, out_channels], bias[in_channels, out_channels]

    def __call__(self, states: jax.Array, kind: TileKind) -> jax.Array:
        """Decodes (n, d) node states to n tiles of one kind."""
        method = getattr(self, kind.decoder)
        if kind.decoder in ("kernel", "depthwise", "position"):
            return method(states, kind.height, kind.width)
        return method(states)

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

    def vector(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, 2, 64): row 0 a norm layer's weight, row 1 its or a layer's bias."""
        y = dense(self.vector_1, nn.relu(dense(self.vector_0, x)))
        return y.reshape(len(x), 2, -1)

    def classifier_bias(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, classes)."""
        return dense(self.class_bias, nn.relu(self.vector(x)[:, 1]))
