"""Boxes: (x1, y1, x2, y2) in pixels, in arrays (..., 4)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

_LARGEST = math.log(1000 / 16)  # of the logarithm by which a box is made larger


def areas(boxes: jax.Array) -> jax.Array:
    """(..., 4) -> (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(first: jax.Array, second: jax.Array) -> jax.Array:
    """Intersection over union of each of (N, 4) with each of (M, 4): (N, M); 0 without area."""
    low = jnp.maximum(first[:, None, :2], second[:, :2])
    high = jnp.minimum(first[:, None, 2:], second[:, 2:])
    common = jnp.maximum(high - low, 0).prod(-1)
    union = areas(first)[:, None] + areas(second) - common
    return jnp.where(union > 0, common / jnp.where(union > 0, union, 1), 0)


def _centres(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centres and sizes, (..., 2) each."""
    sizes = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sizes, sizes


def encode(boxes: jax.Array, references: jax.Array, weights=(1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """What has to be predicted beside references for boxes to come out, (..., 4) each.

    The shift of the centre in sizes of the reference, and the logarithm of the ratio of sizes; each
    by its weight. Not finite where a reference or a box has no area.
    """
    (centre, size), (origin, scale) = _centres(boxes), _centres(references)
    codes = jnp.concatenate([(centre - origin) / scale, jnp.log(size / scale)], -1)
    return codes * jnp.array(weights)


def decode(codes: jax.Array, references: jax.Array, weights=(1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """The boxes of codes, (..., 4) each; at most 62.5 times as large as the references."""
    origin, scale = _centres(references)
    codes = codes / jnp.array(weights)
    centre = codes[..., :2] * scale + origin
    half = 0.5 * jnp.exp(jnp.minimum(codes[..., 2:], _LARGEST)) * scale
    return jnp.concatenate([centre - half, centre + half], -1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes (..., 4) within an image of (2,) height and width."""
    return jnp.clip(boxes, 0, jnp.stack([size[1], size[0], size[1], size[0]]))


def at_least(boxes: jax.Array, size: float) -> jax.Array:
    """Whether width and height are `size` or more: (..., 4) -> (...)."""
    return (boxes[..., 2:] - boxes[..., :2] >= size).all(-1)
