"""Array operations of the design space, as plain `lax` with autodiff: their definition.

`engine/cpu_layers.py` and `engine/gpu_layers.py` have faster forms of them. All images are
(B, H, W, C); kernels are Flax's (height, width, in, out); padding is symmetric, half the dilated
kernel, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

_NUMBERS = ("NHWC", "HWIO", "NHWC")
_AROUND = ((1, 1), (1, 1))  # one pixel


def _padding(kernel: Sequence[int], dilation: int = 1) -> list[tuple[int, int]]:
    return [(dilation * (k - 1) // 2,) * 2 for k in kernel]


def conv(x: jax.Array, w: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolution (B, H, W, C) x (h, w, C, F) -> (B, ceil(H / s), ceil(W / s), F)."""
    padding = _padding(w.shape[:2])
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=_NUMBERS)


def concatenate(parts: Sequence[jax.Array | None]) -> jax.Array:
    """Images along channels; None stands for zeros, as many as the others have."""
    like = next(x for x in parts if x is not None)
    parts = [jnp.zeros_like(like) if x is None else x for x in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def pointwise(parts: Sequence[jax.Array | None], w: jax.Array, stride: int) -> jax.Array:
    """1x1 convolution of images' concatenation, (B, H, W, C) each, x (1, 1, N C, F)."""
    return conv(concatenate(parts), w, (stride, stride))


def depthwise(x: jax.Array, w: jax.Array, stride: int, dilation: int) -> jax.Array:
    """Depthwise convolution (B, H, W, C) x (k, k, 1, C) -> (B, ceil(H / s), ceil(W / s), C)."""
    return lax.conv_general_dilated(
        x, w, (stride, stride), _padding(w.shape[:2], dilation), rhs_dilation=(dilation,) * 2,
        feature_group_count=x.shape[-1], dimension_numbers=_NUMBERS,
    )  # fmt: skip


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 max-pooling (B, H, W, C) -> (B, ceil(H / s), ceil(W / s), C), padded by one."""
    return nn.max_pool(x, (3, 3), (stride, stride), _AROUND)


def avg_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 average pooling (B, H, W, C) -> (B, ceil(H / s), ceil(W / s), C); padding not counted."""
    return nn.avg_pool(x, (3, 3), (stride, stride), _AROUND, count_include_pad=False)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of (B, positions, heads, d) queries, keys and values."""
    logits = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bhij,bjhd->bihd", nn.softmax(logits), v)
