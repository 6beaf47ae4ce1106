"""ROI align (He et al. 2017): a box of a feature map, read at a few positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _readings(start, extent, bins: int, samples: int, length: int) -> jax.Array:
    """(N, bins, length) shares of cells in the mean of each bin, along one axis.

    Args:
      start, extent: (N,) of boxes, in cells.
      bins, samples: see `roi_align`.
      length: of the axis.
    """
    at = (jnp.arange(bins * samples) + 0.5) / (bins * samples)
    at = start[:, None] + at * extent[:, None]
    inside = (at >= -1) & (at <= length)  # up to a cell outside, the outermost cell is read
    at = jnp.clip(at, 0, length - 1)
    near = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(length)), 0)  # linear
    shares = jnp.where(inside[..., None], near, 0)
    return shares.reshape(len(start), bins, samples, length).mean(2)


def roi_align(
    features: jax.Array, boxes: jax.Array, scale: float, *, bins: int = 7, samples: int = 2
) -> jax.Array:
    """Means of bilinear readings in the bins of boxes; a box is at least a cell wide and high.

    Bilinear readings are products of linear ones, and so are their means: two matrix products for
    a box, which CPUs and accelerators do faster than they gather.

    Args:
      features: (H, W, C).
      boxes: (N, 4) in pixels.
      scale: cells for a pixel.
      bins: along each side of a box.
      samples: along each side of a bin.

    Returns:
      (N, bins, bins, C).
    """
    boxes = boxes * scale
    start, extent = boxes[:, :2], jnp.maximum(boxes[:, 2:] - boxes[:, :2], 1)
    height, width, _ = features.shape
    rows = _readings(start[:, 1], extent[:, 1], bins, samples, height)
    columns = _readings(start[:, 0], extent[:, 0], bins, samples, width)
    return jnp.einsum("nph,hwc,nqw->npqc", rows, features, columns)
