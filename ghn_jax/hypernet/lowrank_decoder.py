"""The decoder of LoGAH: weights are products of two low-rank factors.

Zhou et al., "LoGAH: Predicting 774-Million-Parameter Transformers using Graph HyperNetworks with
1/100 Parameters" (arXiv:2405.16287), § 4. Tiles are as wide as a network needs them, and few
weights are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.hypernet.decoder import Decoder
from ghn_jax.hypernet.gatedgnn import dense
from ghn_jax.hypernet.padding import next_power_of_two
from ghn_jax.hypernet.tiling import TileKind

_VECTORS = ("vector", "scale", "classifier_bias")
_FACTORS = ("mlp_0", "mlp_1", "mlp_2", "expand")


def group_size(channels: int, largest: int) -> int:
    """The channels that the authors decode a vector with; where its bias begins depends on it."""
    size = min(channels, largest)
    if size % 3 == 0:
        size = size // 3 * 4
    return largest if 2 * size >= largest else size


class LowRankDecoder(Decoder):
    """An MLP makes (2 r, r) numbers, a linear layer 2 factors of (K, r) from them.

    A kernel of (out, in, height, width) is the product of the first out * height rows of one with
    the first in * width rows of the other, so the rest is not computed. The classification weight
    is a linear layer like any other: nothing depends on the number of classes. A vector is a column
    of such a product, its weight and then its bias.

    Attributes:
      rank: r.
      factor_size: K.
    """

    rank: int = 32
    factor_size: int = 704

    reads: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("kernel", "depthwise", "position", "classifier", *_VECTORS), _FACTORS
    )

    def setup(self):
        """Makes the layers."""
        self.make_factors()

        # Nothing reads these. The authors' code has them, and so have its counts and checkpoints.
        self.unused_1, self.unused_2 = self.layer("unused_1", 1, 1), self.layer("unused_2", 1, 1)

    def make_factors(self):
        """Makes the layers of both factors."""
        d = self.features
        self.mlp_0 = self.layer("mlp_0", d, 4 * d)
        self.mlp_1 = self.layer("mlp_1", 4 * d, 8 * d)
        self.mlp_2 = self.layer("mlp_2", 8 * d, 2 * self.rank**2)
        self.expand = self.layer("expand", self.rank, self.factor_size)
        self.unused_0 = self.layer("unused_0", self.rank, self.rank)  # in the authors' code, too

    def undecodable(self, shape: tuple[int, ...]) -> str | None:
        """See `Decoder.undecodable`."""
        if len(shape) not in (2, 4):
            return super().undecodable(shape)
        for channels, largest, size in zip(shape, self.max_shape, (*shape[2:], 1, 1), strict=False):
            if min(channels, largest) * size > self.factor_size:
                return (
                    f"factors of this hypernetwork have {self.factor_size} rows, fewer than "
                    f"{min(channels, largest)} channels of {size} positions; use one with a larger "
                    "factor_size"
                )
        return None

    def sized(self, kind: TileKind, shape: tuple[int, ...]) -> TileKind:
        """See `Decoder.sized`: powers of two, so that there are few kinds of kernels."""
        if kind.decoder in _VECTORS:
            return TileKind(kind.decoder, out=group_size(shape[0], self.max_shape[0]))

        def rounded(channels: int, largest: int, size: int) -> int:
            return min(next_power_of_two(channels), largest, self.factor_size // size)

        sizes = [
            rounded(*of)
            for of in zip(shape, self.max_shape, (kind.height, kind.width), strict=False)
        ]
        return TileKind(kind.decoder, kind.height, kind.width, *sizes)

    def __call__(self, states: jax.Array, kind: TileKind) -> jax.Array:
        """Decodes (n, d) node states to n tiles of one kind."""
        out, in_ = kind.out or self.max_shape[0], kind.in_ or self.max_shape[1]
        match kind.decoder:
            case "kernel":
                return self._weight(states, out, in_, kind.height, kind.width)
            case "depthwise":
                return self._weight(states, out, 1, kind.height, kind.width)[:, :, 0]
            case "position":
                return self._weight(states, 1, in_, kind.height, kind.width)[..., 0]
            case "classifier":
                return self._weight(states, out, in_, 1, 1)[:, 0]
            case "vector":
                return self.vectors(states, out)
            case "scale":
                return self.scales(states, out)
            case _:
                return self.class_biases(states, out)

    def vectors(self, x: jax.Array, size: int) -> jax.Array:
        """(n, d) -> (n, 2, size): row 0 a norm layer's weight, row 1 its or a layer's bias."""
        return self._weight(x, 2 * size, 1, 1, 1).reshape(len(x), 2, size)

    def scales(self, x: jax.Array, size: int) -> jax.Array:
        """(n, d) -> (n, size): a layer scale of ConvNeXt."""
        return self._weight(x, size, 1, 1, 1).reshape(len(x), size)

    def class_biases(self, x: jax.Array, size: int) -> jax.Array:
        """(n, d) -> (n, size)."""
        return self.vectors(x, size)[:, 1]

    def _weight(self, x: jax.Array, out: int, in_: int, height: int, width: int) -> jax.Array:
        """(n, d) -> (n, height * width, in, out)."""
        hidden = nn.relu(dense(self.mlp_1, nn.relu(dense(self.mlp_0, x))))
        rows = self._factor(hidden, 0, out * height).reshape(len(x), out, height, -1)
        columns = self._factor(hidden, 1, in_ * width).reshape(len(x), in_, width, -1)
        weight = jnp.einsum("nohr,niwr->nhwio", rows, columns)
        return weight.reshape(len(x), height * width, in_, out)

    def _factor(self, hidden: jax.Array, which: int, count: int) -> jax.Array:
        """(n, 8 d) -> (n, count, r) first rows of a factor, which is (r, K) seen as (K, r)."""
        r, size = self.rank, self.factor_size
        if count > size:
            raise ValueError(f"a factor has {size} rows, but {count} are needed; see `undecodable`")
        n_rows, n_columns = -(-count * r // size), min(count * r, size)

        def rows(p: jax.Array) -> jax.Array:
            return p.reshape(*p.shape[:-1], 2, r, r)[..., which, :n_rows, :].reshape(
                *p.shape[:-1], -1
            )

        y = nn.relu(dense(jax.tree.map(rows, self.mlp_2), hidden)).reshape(-1, n_rows, r)
        y = dense(jax.tree.map(lambda p: p[..., :n_columns], self.expand), y)
        return y.reshape(len(hidden), -1)[:, : count * r].reshape(len(hidden), count, r)


class LowRankVectorDecoder(LowRankDecoder):
    """The same with layers of their own for vectors, as in other decoders but smaller."""

    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {**LowRankDecoder.reads, **Decoder.reads}
    small: ClassVar = ("vector_1",)

    @property
    def vector_size(self) -> int:
        """Number of channels of a vector's tile."""
        return self.features // 2

    def setup(self):
        """Makes the layers."""
        self.make_factors()
        self.make_vectors()

    def sized(self, kind: TileKind, shape: tuple[int, ...]) -> TileKind:
        """See `Decoder.sized`."""
        return kind if kind.decoder in _VECTORS else super().sized(kind, shape)

    def vectors(self, x: jax.Array, size: int) -> jax.Array:
        """(n, d) -> (n, 2, d / 2), whatever was asked for."""
        del size
        return self.vector(x)

    def scales(self, x: jax.Array, size: int) -> jax.Array:
        """(n, d) -> (n, d), whatever was asked for."""
        del size
        return self.scale(x)

    def class_biases(self, x: jax.Array, size: int) -> jax.Array:
        """(n, d) -> (n, classes)."""
        del size
        return self.classifier_bias(x)
