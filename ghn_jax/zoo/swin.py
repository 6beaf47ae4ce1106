"""Swin transformer (Liu et al. 2021) as torchvision has it."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.zoo.adapt import is_small

WINDOW = 7  # height and width
STOCHASTIC_DEPTH = 0.2  # probability that the last block is left out, growing linearly up to there

_init = nn.initializers.truncated_normal(0.02)
_Dense = functools.partial(nn.Dense, kernel_init=_init)
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5)


def relative_position_index() -> np.ndarray:
    """Which row of a table of biases each pair of a window's positions has: (49 * 49,)."""
    place = np.moveaxis(np.indices((WINDOW, WINDOW)), 0, -1).reshape(-1, 2)
    rows, columns = np.moveaxis(place[:, None] - place[None] + WINDOW - 1, -1, 0)
    return (rows * (2 * WINDOW - 1) + columns).reshape(-1)


def into_windows(x: jax.Array | np.ndarray):
    """(B, H, W, C) -> (B, windows, 49, C)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, WINDOW**2, c)


def from_windows(x: jax.Array, height: int, width: int) -> jax.Array:
    """The way back: (B, windows, 49, C) -> (B, H, W, C)."""
    b, c = len(x), x.shape[-1]
    x = x.reshape(b, height // WINDOW, width // WINDOW, WINDOW, WINDOW, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, c)


def strangers(height: int, width: int, shift: tuple[int, int]) -> np.ndarray:
    """Which positions of a window are no neighbours, but came there by the cyclic shift.

    Args:
      height, width: of the feature map, multiples of the window's.
      shift: by how many positions it was rolled, up and to the left.

    Returns:
      (windows, 49, 49).
    """
    # Of either axis: what lies before the last window, the rest of what was there, what was rolled.
    rows, columns = (
        np.digitize(np.arange(n), [n - WINDOW, n - s]) if s else np.zeros(n, int)
        for n, s in zip((height, width), shift, strict=True)
    )
    region = into_windows((3 * rows[:, None] + columns)[None, :, :, None])[0, :, :, 0]
    return region[:, :, None] != region[:, None, :]


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each relative position.

    Attributes:
      heads: of attention.
      shifted: windows are shifted by half of their size.
    """

    heads: int
    shifted: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        b, h, w, c = x.shape
        shape = (2 * WINDOW - 1) ** 2, self.heads
        table = self.param("relative_position_bias_table", _init, shape)
        bias = table[relative_position_index()].reshape(WINDOW**2, WINDOW**2, self.heads)

        x = jnp.pad(x, ((0, 0), (0, -h % WINDOW), (0, -w % WINDOW), (0, 0)))
        height, width = x.shape[1:3]
        by = WINDOW // 2 if self.shifted else 0
        # A single window has nowhere to go.
        shift = (by if height > WINDOW else 0, by if width > WINDOW else 0)
        if any(shift):
            x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2))
        x = into_windows(x)
        x = _Dense(3 * c, name="qkv")(x).reshape(*x.shape[:3], 3, self.heads, c // self.heads)
        q, k, v = (x[:, :, :, i] for i in range(3))
        scores = jnp.einsum("bwqhc,bwkhc->bwhqk", q / math.sqrt(q.shape[-1]), k)
        scores = scores + bias.transpose(2, 0, 1)
        if any(shift):
            masked = strangers(height, width, shift)[:, None]
            scores = scores + np.where(masked, -100.0, 0.0).astype(scores.dtype)
        x = jnp.einsum("bwhqk,bwkhc->bwqhc", nn.softmax(scores), v)
        x = _Dense(c, name="proj")(x.reshape(*x.shape[:3], c))
        x = from_windows(x, height, width)
        if any(shift):
            x = jnp.roll(x, shift, (1, 2))
        return x[:, :h, :w]


class SwinBlock(nn.Module):
    """Attention within windows, then two linear layers with GELU between, each beside a shortcut.

    Attributes:
      heads: of attention.
      shifted: see `WindowAttention`.
      drop: probability that training leaves either out of an image's path.
    """

    heads: int
    shifted: bool
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        c = x.shape[-1]
        maybe = nn.Dropout(self.drop, broadcast_dims=(1, 2, 3), deterministic=not train)
        attention = WindowAttention(self.heads, self.shifted, name="attn")
        x = x + maybe(attention(_LayerNorm(name="norm1")(x)))
        y = _Dense(4 * c, name="mlp_0")(_LayerNorm(name="norm2")(x))
        return x + maybe(_Dense(c, name="mlp_3")(nn.gelu(y, approximate=False)))


class PatchMerging(nn.Module):
    """Joins the channels of each 2x2 positions and halves them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / 2, W / 2, 2 * C)."""
        _, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # down before right
        x = _LayerNorm(name="norm")(jnp.concatenate(corners, axis=-1))
        return _Dense(2 * c, use_bias=False, name="reduction")(x)


class SwinTransformer(nn.Module):
    """A Swin transformer under torchvision's names.

    Attributes:
      stages: (heads, blocks) of each stage; channels are 32 for each head.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        4x4 convolution has stride 1, as in ConvNeXt.
    """

    stages: tuple[tuple[int, int], ...]
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on stochastic depth."""
        stride, channels = 1 if is_small(self.image_size) else 4, 32 * self.stages[0][0]
        # torch's default, as of every convolution
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        first = nn.Conv(channels, (4, 4), stride, padding=0, kernel_init=init, name="features_0_0")
        x = _LayerNorm(name="features_0_2")(first(images))
        done, last = 0, sum(blocks for _, blocks in self.stages) - 1
        for i, (heads, blocks) in enumerate(self.stages):
            if i:
                x = PatchMerging(name=f"features_{2 * i}")(x)
            for j in range(blocks):
                drop = STOCHASTIC_DEPTH * done / last
                block = SwinBlock(heads, j % 2 == 1, drop, name=f"features_{2 * i + 1}_{j}")
                x = block(x, train=train)
                done += 1
        x = _LayerNorm(name="norm")(x).mean((1, 2))
        return _Dense(self.num_classes, name="head")(x)


def swin_t(num_classes: int = 10, image_size: int = 32) -> SwinTransformer:
    """Swin-T."""
    return SwinTransformer(((3, 2), (6, 2), (12, 6), (24, 2)), num_classes, image_size)
