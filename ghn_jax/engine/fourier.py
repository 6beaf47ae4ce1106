"""Convolutions as products of Fourier coefficients, for CPUs: they need fewer multiplications.

A convolution with zero padding is a circular one over images that are half a kernel larger, and
that is a product for each frequency: of a 7x7 kernel over 8x8 images, some 200 multiplications for
each pair of channels in place of 3,136. Images are small, so their coefficients are products with
matrices too. One axis after the other: along rows, real numbers become the real and imaginary parts
of the frequencies 0 to half the size; along columns, those become all frequencies, each as the
three numbers whose products with the kernel's three give a complex product (Gauss). All of it is
linear, so the gradients are the same products with the same matrices, transposed.

Images are (B, H, W, C), kernels (height, width, in, out); strides are 1, padding is half the
kernel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax import lax


class _Matrices(NamedTuple):
    """From pixels to what is multiplied, or (transposed) from products to pixels.

    Attributes:
      rows: (2V, W), real and imaginary parts of V frequencies along rows.
      columns: (3U, 2H), three numbers for each of U frequencies along columns.
    """

    rows: np.ndarray
    columns: np.ndarray


class _Transform(NamedTuple):
    """The matrices of images, of kernels, and of what a convolution gives."""

    images: _Matrices
    kernels: _Matrices
    results: _Matrices


def _angles(frequencies: int, positions: np.ndarray, size: int) -> np.ndarray:
    return 2 * np.pi * np.arange(frequencies)[:, None] * positions / size


def _interleave(*parts: np.ndarray) -> np.ndarray:
    """(n, m) arrays -> (k n, m), their rows in turn."""
    return np.stack(parts, 1).reshape(-1, parts[0].shape[1]).astype(np.float32)


@functools.cache
def _transform(height: int, width: int, k_height: int, k_width: int) -> _Transform:
    size_h, size_w = height + k_height // 2, width + k_width // 2  # of the circular convolution
    half = size_w // 2 + 1

    def forward(x, y, is_kernel):
        angle = _angles(half, x, size_w)
        rows = _interleave(np.cos(angle), -np.sin(angle))
        angle = _angles(size_h, y, size_h)
        real = np.hstack([np.cos(angle), np.sin(angle)])
        imaginary = np.hstack([-np.sin(angle), np.cos(angle)])
        if is_kernel:
            return _Matrices(rows, _interleave(real, imaginary - real, real + imaginary))
        return _Matrices(rows, _interleave(real + imaginary, real, imaginary))

    # Of products p, q, r the real part is p - r and the imaginary one p + q.
    angle = _angles(half, np.arange(width), size_w)
    twice = np.where(np.arange(half) * 2 % size_w == 0, 1, 2)[:, None] / size_w
    rows = _interleave(twice * np.cos(angle), -twice * np.sin(angle))
    angle = _angles(size_h, np.arange(height), size_h)
    c, s = np.cos(angle) / size_h, np.sin(angle) / size_h
    columns = _interleave(np.hstack([c - s, c + s]), np.hstack([-s, c]), np.hstack([-c, -s]))
    return _Transform(
        forward(np.arange(width), np.arange(height), False),
        forward(k_width // 2 - np.arange(k_width), k_height // 2 - np.arange(k_height), True),
        _Matrices(rows, columns),
    )


def _lines(x: jax.Array, axis: int) -> jax.Array:
    """(B, H, W, C) -> (N, 1, n, C): the lines of pixels along an axis as images of their own."""
    x = x.swapaxes(2, axis)
    return x.reshape(-1, 1, *x.shape[2:])


def _from_lines(lines: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """The images (B, H, W, ...) that lines of pixels along an axis make up."""
    b, *sizes = shape[:3]
    sizes = sizes if axis == 2 else sizes[::-1]
    return lines.reshape(b, *sizes, lines.shape[-1]).swapaxes(2, axis)


def _line(w: tuple[int, ...]) -> int | None:
    """The axis along which a kernel of this shape, (1, k, ...) or (k, 1, ...), is a line."""
    return {0: 2, 1: 1}.get(w.index(1)) if 1 in w[:2] else None


def multiplications(images: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """How many `convolve` needs, for images and a kernel of these shapes."""
    b, h, w, c = images
    k_h, k_w, _, f = kernel
    if _line(kernel) == 1:
        h, w, k_h, k_w = w, h, k_w, k_h
    if k_h == 1:
        b, h = b * h, 1
    size_h, half = h + k_h // 2, (w + k_w // 2) // 2 + 1

    def transforms(height, width):
        return 2 * half * height * (width + 3 * size_h)

    products = 3 * size_h * half * b * c * f
    return transforms(h, w) * b * (c + f) + transforms(k_h, k_w) * c * f + products


def _along_rows(x: jax.Array, matrices: _Matrices) -> jax.Array:
    """(N, H, W, C) -> (V, 2H, N C)."""
    n, h, w, c = x.shape
    y = matrices.rows @ x.transpose(2, 1, 0, 3).reshape(w, -1)
    return y.reshape(-1, 2 * h, n * c)


def _back_along_rows(y: jax.Array, matrices: _Matrices, n: int) -> jax.Array:
    """(V, 2H, N C) -> (N, H, W, C)."""
    h = y.shape[1] // 2
    x = matrices.rows.T @ y.reshape(matrices.rows.shape[0], -1)
    return x.reshape(-1, h, n, y.shape[2] // n).transpose(2, 1, 0, 3)


def _along_columns(x: jax.Array, matrices: _Matrices, n: int) -> jax.Array:
    """(2H, N C) -> (3U, N, C)."""
    return (matrices.columns @ x).reshape(-1, n, x.shape[1] // n)


def _back_along_columns(x: jax.Array, matrices: _Matrices) -> jax.Array:
    """(3U, N, C) -> (2H, N C)."""
    return matrices.columns.T @ x.reshape(len(x), -1)


def _kernel_rows(w: jax.Array, matrices: _Matrices) -> jax.Array:
    """(h, w, C, F) -> (V, 2h, C F)."""
    return _along_rows(w.transpose(2, 0, 1, 3), matrices)


def _batched(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """A product of matrices for each number of a frequency."""
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((0,), (0,))))


def _convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    n, c = len(x), x.shape[-1]
    images, kernels, results = _transform(*x.shape[1:3], *w.shape[:2])

    # One frequency of the rows at a time: its numbers stay in the cache.
    def one_frequency(rows):
        x, w = rows
        x, w = _along_columns(x, images, n), _along_columns(w, kernels, c)
        return _back_along_columns(_batched(x, w, 2, 1), results)

    y = lax.map(one_frequency, (_along_rows(x, images), _kernel_rows(w, kernels)))
    return _back_along_rows(y, results, n)


def _gradients(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    n, c = len(x), x.shape[-1]
    images, kernels, results = _transform(*x.shape[1:3], *w.shape[:2])

    def one_frequency(rows):
        x, w, g = rows
        x, w = _along_columns(x, images, n), _along_columns(w, kernels, c)
        g = _along_columns(g, results, n)
        dx, dw = _batched(g, w, 2, 2), _batched(x, g, 1, 1)
        return _back_along_columns(dx, images), _back_along_columns(dw, kernels)

    rows = _along_rows(x, images), _kernel_rows(w, kernels), _along_rows(g, results)
    dx, dw = lax.map(one_frequency, rows)
    dw = _back_along_rows(dw, kernels, c).transpose(1, 2, 0, 3)
    return _back_along_rows(dx, images, n), dw


def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
    """Convolution (B, H, W, C) x (h, w, C, F) -> (B, H, W, F)."""
    axis = _line(w.shape)
    if axis is None:
        return _convolve(x, w)
    y = _convolve(_lines(x, axis), w.reshape(1, -1, *w.shape[2:]))
    return _from_lines(y, x.shape, axis)


def gradients(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of `convolve` with respect to images and kernel, from that of its result."""
    axis = _line(w.shape)
    if axis is None:
        return _gradients(x, w, g)
    dx, dw = _gradients(_lines(x, axis), w.reshape(1, -1, *w.shape[2:]), _lines(g, axis))
    return _from_lines(dx, x.shape, axis), dw.reshape(w.shape)
