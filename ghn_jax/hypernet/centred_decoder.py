"""The decoder of GHN-3: GHN-2's, but a kernel is the centre of a tile (arXiv:2303.04143)."""

from __future__ import annotations

from typing import ClassVar

import jax

from ghn_jax.hypernet.conv_decoder import ConvDecoder


class CentredDecoder(ConvDecoder):
    """A `ConvDecoder` whose tiles are cropped centrally, and stretched for larger kernels.

    Its last layers begin with small weights, so that large hypernetworks train.
    """

    small: ClassVar = ("vector_1", "conv_1", "class_kernel")

    def undecodable(self, shape: tuple[int, ...]) -> str | None:
        """See `Decoder.undecodable`."""
        if len(shape) == 4 and shape[2] > self.max_shape[2] and shape[3] > self.max_shape[3]:
            return None
        return super().undecodable(shape)

    def window(self, height: int, width: int) -> tuple[slice, slice]:
        """The centre of the largest tile; all of it for kernels that are larger."""

        def centre(size: int, largest: int) -> slice:
            size = min(size, largest)
            start = largest // 2 - size // 2
            return slice(start, start + size)

        return centre(height, self.max_shape[2]), centre(width, self.max_shape[3])

    def _hidden(self, x: jax.Array, height: int, width: int) -> jax.Array:
        """See `ConvDecoder._hidden`.

        The last layer is linear in what this gives, so to stretch it is to stretch the tile.
        """
        rows, columns = self.window(height, width)
        size = rows.stop - rows.start, columns.stop - columns.start
        y = super()._hidden(x, height, width)
        if size == (height, width):
            return y
        n, _, channels = y.shape
        y = jax.image.resize(
            y.reshape(n, *size, channels), (n, height, width, channels), "linear", antialias=False
        )
        return y.reshape(n, height * width, channels)
