"""The functions of `deepnets1m/layers.py` in forms for NVIDIA's GPUs: products and sums.

cuDNN has many ways to a convolution. XLA finds out which is fast by trying all of them while it
compiles, for longer than most programs here ever run; untried it takes the first, which is slower
by two orders of magnitude. cuBLAS chooses by itself. So dense convolutions are products of patches,
and depthwise ones sums of shifted products, which XLA makes one kernel of.

A kernel's gradient is a product of few rows and columns that sums over all positions of all images.
cuBLAS gives such a product to one of a hundred multiprocessors; here groups of images make products
of their own, which are then added up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ghn_jax.deepnets1m.layers import attend, avg_pool, concatenate, max_pool

__all__ = ["attend", "avg_pool", "concatenate", "conv", "depthwise", "max_pool", "pointwise"]


def _shifted(
    x: jax.Array, kernel: Sequence[int], strides: Sequence[int], dilation: int = 1
) -> list[jax.Array]:
    """(B, ceil(H / s), ceil(W / s), C) what each position of a kernel meets, in its order."""
    batch, *size, channels = x.shape
    reach = [dilation * (k - 1) for k in kernel]
    x = jnp.pad(x, ((0, 0), *((r // 2, r // 2) for r in reach), (0, 0)))
    last = [(-(-n // s) - 1) * s + 1 for n, s in zip(size, strides, strict=True)]
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + last[0], j + last[1], channels),
            (1, *strides, 1),
        )
        for i in range(0, reach[0] + 1, dilation)
        for j in range(0, reach[1] + 1, dilation)
    ]


_BLOCKS = 128  # that a GPU runs at once, roughly
_TILE = 64  # rows and columns of a product that a block makes


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """(B, H, W, K) @ (K, N)."""
    return x @ w


def _product_forward(x, w):
    return x @ w, (x, w)


def _product_backward(residuals, g):
    x, w = residuals
    tiles = math.prod(math.ceil(n / _TILE) for n in w.shape)
    groups = math.gcd(len(x), 1 << int(math.log2(max(1, _BLOCKS // tiles))))
    parts = jnp.einsum(
        "gik,gin->gkn",
        x.reshape(groups, -1, x.shape[-1]),
        g.reshape(groups, -1, g.shape[-1]),
        preferred_element_type=jnp.float32,
    )
    return g @ w.T, parts.sum(0).astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def conv(x: jax.Array, w: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """See `layers.conv`."""
    patches = jnp.concatenate(_shifted(x, w.shape[:2], strides), -1)
    return _product(patches, w.reshape(-1, w.shape[-1]))


def pointwise(parts: Sequence[jax.Array | None], w: jax.Array, stride: int) -> jax.Array:
    """See `layers.pointwise`."""
    return _product(concatenate(parts)[:, ::stride, ::stride], w[0, 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, w: jax.Array, stride: int, dilation: int) -> jax.Array:
    """See `layers.depthwise`."""
    kernel = w.astype(jnp.float32).reshape(-1, w.shape[-1])
    met = _shifted(x, w.shape[:2], (stride, stride), dilation)
    products = (part.astype(jnp.float32) * k for part, k in zip(met, kernel, strict=True))
    return functools.reduce(jnp.add, products).astype(x.dtype)


def _depthwise_forward(x, w, stride, dilation):
    return depthwise(x, w, stride, dilation), (x, w)


def _depthwise_backward(stride, dilation, residuals, g):
    x, w = residuals
    (dx,) = jax.vjp(lambda x: depthwise.fun(x, w, stride, dilation), x)[1](g)
    # One sum over a stack of products is one kernel; autodiff's sum for each position is not.
    met = jnp.stack(_shifted(x, w.shape[:2], (stride, stride), dilation))
    dw = (met.astype(jnp.float32) * g.astype(jnp.float32)).sum((1, 2, 3))
    return dx, dw.reshape(w.shape).astype(w.dtype)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)
