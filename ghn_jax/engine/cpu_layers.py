"""The functions of `deepnets1m/layers.py` in faster forms for CPUs, with gradients by hand.

Dense kernel gradients are written as NHWC x HWIO convolutions, the form that XLA's CPU backend
is fast at; depthwise convolutions are sums of shifted products, several times faster there than
grouped convolutions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ghn_jax.engine import fourier

_NUMBERS = ("NHWC", "HWIO", "NHWC")


def _lax_conv(x, w, strides, padding, rhs_dilation=(1, 1)) -> jax.Array:
    """`lax.conv_general_dilated` of (B, H, W, C) x (h, w, C, F), fast for any size."""
    if any(k > n for k, n in zip(w.shape[:2], x.shape[1:3], strict=True)):
        # XLA's CPU backend has only a naive loop for kernels larger than the images.
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
        x = lax.optimization_barrier(x)
        padding = [(0, 0), (0, 0)]
    return lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=rhs_dilation, dimension_numbers=_NUMBERS
    )


def _has_frequencies(x, w, strides) -> bool:
    """Whether `fourier` does this convolution: in float32, as its matrices are."""
    single = x.dtype == w.dtype == jnp.float32
    dense = tuple(strides) == (1, 1) and max(w.shape[:2]) > 1
    return single and dense


def _by_frequencies(x, w, strides) -> bool:
    """Whether a convolution is faster by `fourier`."""
    if not _has_frequencies(x, w, strides):
        return False
    # Products of matrices reach less of a core than convolutions do (measured on two cores).
    directly = x.size * math.prod(w.shape[:2]) * w.shape[-1]
    return directly > 2.6 * fourier.multiplications(x.shape, w.shape)


def _gradients_by_frequencies(x, w, strides) -> bool:
    """Whether a convolution's gradients are faster by `fourier`."""
    # XLA's kernel gradient is slow from 32 features on.
    return _has_frequencies(x, w, strides) and w.shape[-1] >= 32


def _convolve(x, w, *options):
    if x.shape[-1] == 3 and w.shape[-1] == 32:
        # Three times as fast on CPUs with four channels.
        x, w = jnp.pad(x, ((0, 0),) * 3 + ((0, 1),)), jnp.pad(w, ((0, 0),) * 2 + ((0, 1), (0, 0)))
    return _lax_conv(x, w, *options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x: jax.Array, w: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolution (B, H, W, C) x (h, w, C, F) -> (B, ceil(H / s), ceil(W / s), F)."""
    if _by_frequencies(x, w, strides):
        return fourier.convolve(x, w)
    return _convolve(x, w, strides, [(k // 2, k // 2) for k in w.shape[:2]])


def _conv_forward(x, w, strides):
    return conv(x, w, strides), (x, w)


def _input_gradient(g, w, sizes, strides):
    """The gradient of `conv` with respect to its input, of some (height, width).

    With a stride of 2 every second pixel meets every second row of the kernel: four convolutions
    with a quarter of the kernel each, not one in which three of four products are with zeros.
    """
    flipped = w[::-1, ::-1].transpose(0, 1, 3, 2)
    phases = []  # of each axis: rows of the flipped kernel, padding
    for size, out, k, stride in zip(sizes, g.shape[1:3], w.shape[:2], strides, strict=True):
        axis = []
        for phase in range(stride):
            first = (phase + k // 2) % stride  # of the kernel's rows that these pixels meet
            count = len(range(first, k, stride))
            shift = (phase + k // 2 - first) // stride
            pixels = len(range(phase, size, stride))
            rows = slice((k - 1 - first) % stride, None, stride) if count else slice(0)
            axis.append((rows, (count - 1 - shift, pixels + shift - out), pixels))
        phases.append(axis)

    def part(vertical, horizontal):
        (r, pad_r, height), (c, pad_c, width) = vertical, horizontal
        kernel = flipped[r, c]
        if kernel.size and height and width:
            return _convolve(g, kernel, (1, 1), [pad_r, pad_c])
        return jnp.zeros((len(g), height, width, kernel.shape[-1]), g.dtype)

    return _interleave([[part(v, h) for h in phases[1]] for v in phases[0]], sizes)


def _interleave(parts, sizes):
    """(B, H, W, C) from the pixels of each phase, parts[i][j] those at rows i and columns j."""
    if len(parts) == len(parts[0]) == 1:
        return parts[0][0]
    height, width = (max(p.shape[axis] for row in parts for p in row) for axis in (1, 2))
    whole = [
        [
            jnp.pad(p, ((0, 0), (0, height - p.shape[1]), (0, width - p.shape[2]), (0, 0)))
            for p in row
        ]
        for row in parts
    ]
    x = jnp.stack([jnp.stack(row, axis=3) for row in whole], axis=2)
    b, h, i, w, j, c = x.shape
    return x.reshape(b, h * i, w * j, c)[:, : sizes[0], : sizes[1]]


def _conv_backward(strides, residuals, g):
    x, w = residuals
    if _gradients_by_frequencies(x, w, strides):
        return fourier.gradients(x, w, g)
    pads_w = []
    for size, out, k, stride in zip(x.shape[1:3], g.shape[1:3], w.shape[:2], strides, strict=True):
        spread = (out - 1) * stride + 1  # the cotangent with zeros between its pixels
        pads_w.append((k // 2, spread + k - 1 - size - k // 2))
    dx = _input_gradient(g, w, x.shape[1:3], strides)
    # Images as channels, input channels as images, the cotangent as a kernel of its own size.
    dw = _convolve(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), pads_w, strides)
    return dx, dw.transpose(1, 2, 0, 3)


conv.defvjp(_conv_forward, _conv_backward)


def pointwise(parts: Sequence[jax.Array | None], w: jax.Array, stride: int) -> jax.Array:
    """See `layers.pointwise`: the sum of each part's product with its rows of the kernel.

    The parts are never copied to one array.
    """
    each = w.shape[2] // len(parts)
    return sum(
        _product(x[:, ::stride, ::stride], w[0, 0, i * each : (i + 1) * each])
        for i, x in enumerate(parts)
        if x is not None
    )


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """(B, H, W, C) x (C, F), as one matrix product."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def _shifts(k: int, dilation: int):
    return [(i, j, i * dilation, j * dilation) for i in range(k) for j in range(k)]


def _pad(x, pad, value=0.0):
    pads = [(0, 0)] * (x.ndim - 3) + [(pad, pad), (pad, pad), (0, 0)]
    return jnp.pad(x, pads, constant_values=value)


def _window(padded, i, j, height, width, stride):
    """The pixels that kernel position (i, j) meets, one for each output pixel."""
    start = (0,) * (padded.ndim - 3) + (i, j, 0)
    limit = (*padded.shape[:-3], i + (height - 1) * stride + 1, j + (width - 1) * stride + 1)
    steps = (1,) * (padded.ndim - 3) + (stride, stride, 1)
    return lax.slice(padded, start, (*limit, padded.shape[-1]), steps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, w: jax.Array, stride: int, dilation: int) -> jax.Array:
    """Depthwise convolution (B, H, W, C) x (k, k, 1, C) -> (B, ceil(H / s), ceil(W / s), C)."""
    k = w.shape[0]
    height, width = (-(-n // stride) for n in x.shape[1:3])
    padded = _pad(x, dilation * (k - 1) // 2)
    return sum(
        _window(padded, di, dj, height, width, stride) * w[i, j, 0]
        for i, j, di, dj in _shifts(k, dilation)
    )


def _depthwise_forward(x, w, stride, dilation):
    return depthwise(x, w, stride, dilation), (x, w)


def _spread(g, stride, height, width):
    """Puts stride - 1 zeros between the pixels of (B, H', W', C), out to (B, height, width, C)."""
    if stride == 1:
        return g
    pads = [(0, n - (m - 1) * stride - 1, stride - 1)
            for n, m in zip((height, width), g.shape[1:3], strict=True)]  # fmt: skip
    return lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def _depthwise_backward(stride, dilation, residuals, g):
    x, w = residuals
    k = w.shape[0]
    dx = depthwise(_spread(g, stride, *x.shape[1:3]), w[::-1, ::-1], 1, dilation)

    # Image by image, so that one image's windows stay in the cache. Every window is a piece of the
    # program: those of one row of the kernel, in a loop over its rows, are enough. Sums over pixels
    # are products with ones, twice as fast as XLA's.
    def one_image(total, image):
        x, g = image
        padded = _pad(x, dilation * (k - 1) // 2)
        height, width = g.shape[:2]
        ones = jnp.ones(height * width, g.dtype)

        def one_row(i, total):
            rows = lax.dynamic_slice_in_dim(padded, i * dilation, (height - 1) * stride + 1)
            windows = [_window(rows, 0, j * dilation, height, width, stride) for j in range(k)]
            taps = [ones @ (window * g).reshape(len(ones), -1) for window in windows]
            return total.at[i, :, 0].add(jnp.stack(taps))

        return lax.fori_loop(0, k, one_row, total), None

    dw = lax.scan(one_image, jnp.zeros_like(w), (x, g))[0]
    return dx, dw


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _max_windows(x, axis, stride):
    """What the three positions of a window see along one axis, padded by one: (..., n / s, ...)."""
    size = x.shape[axis]
    pads = [(0, 0)] * x.ndim
    pads[axis] = (1, 1)
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    last = (-(-size // stride) - 1) * stride + 1
    return [lax.slice_in_dim(padded, k, k + last, stride, axis) for k in range(3)]


def _max_along(x, axis, stride):
    return functools.reduce(jnp.maximum, _max_windows(x, axis, stride))


def _max_along_backward(x, g, axis, stride):
    """The gradient of `_max_along`: to the first of equal values."""
    first, second, third = _max_windows(x, axis, stride)
    is_first = (first >= second) & (first >= third)
    is_second = ~is_first & (second >= third)
    size = x.shape[axis]
    total = 0.0
    for position, chosen in enumerate((is_first, is_second, ~is_first & ~is_second)):
        spread = (g.shape[axis] - 1) * stride + 1
        pads = [(0, 0, 0)] * x.ndim
        pads[axis] = (position - 1, size - spread - position + 1, stride - 1)
        total += lax.pad(jnp.where(chosen, g, 0.0), jnp.zeros((), g.dtype), pads)
    return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 max-pooling (B, H, W, C) -> (B, ceil(H / s), ceil(W / s), C), padded by one.

    Along rows, then along columns: of equal values the first in reading order gets the gradient, as
    in PyTorch and Flax, and the gradient has two times three terms, not nine.
    """
    return _max_along(_max_along(x, 2, stride), 1, stride)


def _max_pool_forward(x, stride):
    return max_pool(x, stride), x


def _max_pool_backward(stride, x, g):
    def one_image(x, g):
        rows = _max_along(x, 1, stride)
        return _max_along_backward(x, _max_along_backward(rows, g, 0, stride), 1, stride)

    # One image's intermediates fit the cache.
    return (lax.map(lambda pair: one_image(*pair), (x, g)),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x: jax.Array, stride: int) -> jax.Array:
    """3x3 average pooling (B, H, W, C) -> (B, ceil(H / s), ceil(W / s), C); padding not counted."""
    height, width = (-(-n // stride) for n in x.shape[1:3])
    padded = _pad(x, 1)
    total = sum(_window(padded, i, j, height, width, stride) for i, j, _, _ in _shifts(3, 1))

    def counts(size, out):
        first = jnp.arange(out) * stride - 1
        return jnp.minimum(first + 3, size) - jnp.maximum(first, 0)

    count = counts(x.shape[1], height)[:, None] * counts(x.shape[2], width)[None]
    return total / count[:, :, None]


def _exponentials(q, k):
    """Softmax's numerators (heads, positions, positions), and their sums (heads, positions, 1)."""
    logits = jnp.einsum("ihd,jhd->hij", q * q.shape[-1] ** -0.5, k)
    e = jnp.exp(logits - logits.max(-1, keepdims=True))
    return e, e.sum(-1, keepdims=True)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention of (B, positions, heads, d) queries, keys and values.

    The (positions, positions) probabilities are computed again for the gradient, not stored, and
    never divided by their sums: that is done to vectors. One image at a time fits the cache.
    """

    def one_image(qkv):
        q, k, v = qkv
        e, total = _exponentials(q, k)
        return jnp.einsum("hij,jhd->ihd", e, v) / total.transpose(1, 0, 2)

    return lax.map(one_image, (q, k, v))


def _attend_backward(residuals, g):
    def one_image(arrays):
        q, k, v, g = arrays
        e, total = _exponentials(q, k)
        g = g / total.transpose(1, 0, 2)
        # The probabilities' mean gradient: sum_j p_ij dp_ij = sum_d g_id out_id.
        out = jnp.einsum("hij,jhd->hid", e, v)
        mean = (g.transpose(1, 0, 2) * out).sum(-1, keepdims=True) / total
        ds = e * (jnp.einsum("ihd,jhd->hij", g, v) - mean)
        scale = q.shape[-1] ** -0.5
        return (
            jnp.einsum("hij,jhd->ihd", ds, k) * scale,
            jnp.einsum("hij,ihd->jhd", ds, q) * scale,
            jnp.einsum("hij,ihd->jhd", e, g),
        )

    return lax.map(one_image, (*residuals, g))


attend.defvjp(lambda q, k, v: (attend(q, k, v), (q, k, v)), _attend_backward)
