"""Shape encoding, and what all decoders from node states to tiles have in common (paper B.1, B.2).

A *tile* is what the decoder predicts before it is tiled and sliced to a parameter's shape
(`tiling.py`): 64 input by 64 output channels at each position of a kernel. The decoders are in
files of their own, such as `conv_decoder.py`; `ghn.DECODERS` names them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.hypernet.gatedgnn import dense, dense_params
from ghn_jax.hypernet.tiling import TileKind, undecodable

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


def table_rows(shape: jax.Array, num_classes: int, largest_kernel: int) -> list[jax.Array]:
    """(N, 4) shapes as `ShapeEncoder` takes them -> four (N,) rows of its tables."""
    by_value = [jnp.asarray(rows) for rows in _rows(num_classes, largest_kernel)]
    return [by_value[i // 2][jnp.minimum(shape[:, i], len(by_value[i // 2]) - 1)] for i in range(4)]


class ShapeEncoder(nn.Module):
    """Encodes parameter shapes (B.1): four 8-vectors for out, in, height, width.

    Values off the tables take the nearest row, those beyond the last row the last one.
    """

    features: int
    num_classes: int
    largest_kernel: int
    table_init: Callable = nn.initializers.normal(1.0)  # PyTorch's default for embeddings

    @nn.compact
    def __call__(self, shape: jax.Array) -> jax.Array:
        """(N, 4) int32 (out, in, height, width), zeros for no parameter -> (N, features)."""
        channels = channel_table(self.num_classes)
        spatial = spatial_table(self.largest_kernel)
        d = self.features // 4
        by_channel = self.param("channel", self.table_init, (len(channels) + 1, d))
        by_size = self.param("spatial", self.table_init, (len(spatial) + 1, d))
        rows = table_rows(shape, self.num_classes, self.largest_kernel)
        tables = by_channel, by_channel, by_size, by_size
        return jnp.concatenate([t[r] for t, r in zip(tables, rows, strict=True)], axis=-1)


class Decoder(nn.Module):
    """Makes tiles: kernels as a subclass does, vectors (norm layers and biases) as all do (B.1).

    A subclass has methods named after `tiling.TileKind`: `kernel`, `depthwise`, `position` and
    `classifier`.

    Training decodes tiles of one kind at a time (`training/decoding.py`). What a kind does not read
    should cost it nothing, so it gets the *part* of the parameters that it reads, and gives back
    that part of their gradient.

    Attributes:
      features: d, size of a node's state.
      max_shape: (out, in, height, width) of the largest tile.
      num_classes: number of classes.
    """

    features: int
    max_shape: tuple[int, int, int, int]
    num_classes: int

    # A subclass adds its own: a method's name -> names of the parameters that it reads.
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vector": ("vector_0", "vector_1"),
        "scale": ("vector_0", "vector_1"),
        "classifier_bias": ("vector_0", "vector_1", "class_bias"),
    }
    # Layers whose outputs are (..., height, width): of them, only a kernel's positions are read.
    by_position: ClassVar[tuple[str, ...]] = ()
    # Layers that begin small.
    small: ClassVar[tuple[str, ...]] = ()

    def setup(self):
        """Makes the layers that all decoders have."""
        self.make_vectors()

    def make_vectors(self):
        """Makes the layers of vectors and of the classifier's bias."""
        d, largest = self.features, self.vector_size
        self.vector_0 = self.layer("vector_0", d, 2 * d)
        self.vector_1 = self.layer("vector_1", 2 * d, 2 * largest)
        self.class_bias = self.layer("class_bias", largest, self.num_classes)

    def layer(self, name: str, n_in: int, n_out: int):
        """Makes the parameters of a linear layer."""
        return dense_params(self, name, n_in, n_out, small=name in self.small)

    @property
    def vector_size(self) -> int:
        """Number of channels of a vector's tile."""
        return max(self.max_shape[:2])

    def __call__(self, states: jax.Array, kind: TileKind) -> jax.Array:
        """Decodes (n, d) node states to n tiles of one kind."""
        method = getattr(self, kind.decoder)
        if kind.decoder in ("kernel", "depthwise", "position"):
            return method(states, kind.height, kind.width)
        return method(states)

    def vector(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, 2, 64): row 0 a norm layer's weight, row 1 its or a layer's bias."""
        y = dense(self.vector_1, nn.relu(dense(self.vector_0, x)))
        return y.reshape(len(x), 2, -1)

    def scale(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, 128): a layer scale of ConvNeXt."""
        return self.vector(x).reshape(len(x), -1)

    def classifier_bias(self, x: jax.Array) -> jax.Array:
        """(n, d) -> (n, classes)."""
        return dense(self.class_bias, nn.relu(self.vector(x)[:, 1]))

    # --- Of a decoder that is bound to no parameters ---

    def undecodable(self, shape: tuple[int, ...]) -> str | None:
        """Why it makes no parameter of some shape (PyTorch's order), None where it does."""
        return undecodable(shape, self.max_shape)

    def sized(self, kind: TileKind, shape: tuple[int, ...]) -> TileKind:
        """The kind of tile for a parameter of some shape, with the channels that it is to have."""
        del shape
        return kind

    def window(self, height: int, width: int) -> tuple[slice, slice]:
        """The rows and columns of the largest tile that a kernel reads."""
        return slice(0, height), slice(0, width)

    def _positions(self, x: jax.Array) -> jax.Array:
        """(..., outputs) of a layer in `by_position` -> (..., outputs, height, width)."""
        return x.reshape(*x.shape[:-1], -1, *self.max_shape[2:])

    def _sliced(self, params, name: str, kind: TileKind):
        """A layer's parameters, of the kind's positions where it has some for each."""
        if name not in self.by_position:
            return params[name]

        rows, columns = self.window(kind.height, kind.width)

        def few(x):
            x = self._positions(x)[..., rows, columns]
            return x.reshape(*x.shape[:-3], -1)

        return jax.tree.map(few, params[name])

    def part(self, params, kind: TileKind) -> dict[str, Any]:
        """What a kind of tile reads of the parameters."""
        return {name: self._sliced(params, name, kind) for name in self.reads[kind.decoder]}

    def decode_part(self, params, part, states: jax.Array, kind: TileKind) -> jax.Array:
        """(n, d) -> n tiles of a kind, from its part; of all parameters no value is read."""
        rows, columns = self.window(kind.height, kind.width)
        size = rows.stop - rows.start, columns.stop - columns.start
        small = self.clone(max_shape=(*self.max_shape[:2], *size))
        unread = {name: self._sliced(params, name, kind) for name in params}
        return cast(jax.Array, small.apply({"params": {**unread, **part}}, states, kind))

    def add_part(self, sums, part, kind: TileKind) -> dict[str, Any]:
        """Adds the gradient of a kind's part to a gradient of all parameters."""
        sums = dict(sums)
        for name, gradient in part.items():
            if name in self.by_position:
                window = (..., *self.window(kind.height, kind.width))

                def add(total, g, window=window):
                    positions = self._positions(total)
                    added = positions.at[window].add(g.reshape(positions[window].shape))
                    return added.reshape(total.shape)

                sums[name] = jax.tree.map(add, sums[name], gradient)
            else:
                sums[name] = jax.tree.map(jnp.add, sums[name], gradient)
        return sums
