"""Pooling with PyTorch's windows, where Flax has others."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, size: int = 3) -> jax.Array:
    """Max-pooling with stride 2, whose last window may hang over the edge (ceil_mode)."""
    over = tuple((0, (n - size) % 2) for n in x.shape[1:3])
    return nn.max_pool(x, (size, size), (2, 2), over)


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages of windows that cover the image: (B, H, W, C) -> (B, size, size, C).

    The windows are PyTorch's, from floor(i H / size) to ceil((i + 1) H / size): they overlap where
    the image does not divide, and repeat where it is the smaller.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n != size:
            windows = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
            parts = [jax.lax.slice_in_dim(x, *window, axis=axis) for window in windows]
            x = jnp.stack([part.mean(axis) for part in parts], axis)
    return x
