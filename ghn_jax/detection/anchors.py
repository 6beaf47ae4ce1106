"""Anchors: boxes of some sizes and shapes, at every position of a feature map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def anchors_at_origin(sizes: Sequence[float], ratios: Sequence[float]) -> np.ndarray:
    """(R * S, 4) anchors around (0, 0), ratio by ratio, to whole pixels.

    Args:
      sizes: square roots of areas, in pixels.
      ratios: of height to width.
    """
    heights = np.sqrt(np.asarray(ratios, np.float32))
    sides = np.asarray(sizes, np.float32)
    h = (heights[:, None] * sides).ravel()
    w = ((1 / heights)[:, None] * sides).ravel()
    return np.round(np.stack([-w, -h, w, h], 1) / 2)


def anchors_of_grid(
    grid: tuple[int, int], image: tuple[int, int], sizes: Sequence[float], ratios: Sequence[float]
) -> np.ndarray:
    """(H * W * A, 4) anchors of a feature map: row by row, at each position all A.

    Args:
      grid: height and width of the feature map.
      image: height and width of the images, padding included.
      sizes, ratios: see `anchors_at_origin`.
    """
    step_y, step_x = (pixels // cells for pixels, cells in zip(image, grid, strict=True))
    y, x = np.meshgrid(np.arange(grid[0]) * step_y, np.arange(grid[1]) * step_x, indexing="ij")
    shifts = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (shifts + anchors_at_origin(sizes, ratios)).reshape(-1, 4).astype(np.float32)
