"""What the training images say about a dataset: mean, deviation, and whether they are gray."""

from __future__ import annotations

import numpy as np

_CHUNK = 1000  # images that are counted at once
_SAMPLE = 5000  # training images that represent a set which is not in memory

Channels = tuple[float, float, float]


def channel_statistics(pixels: np.ndarray) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each colour channel, for values from 0 to 1.

    They come from exact counts of the 256 values, in float64. Of a channel that never changes the
    deviation is 1, so that it becomes 0 by normalisation.

    Args:
      pixels: (N, S, S, 3) uint8.
    """
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(pixels), _CHUNK):
        for channel in range(3):
            values = pixels[start : start + _CHUNK, ..., channel].ravel()
            counts[channel] += np.bincount(values, minlength=256)
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = (share * values).sum(1)
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))
    std[counts.max(1) == counts.sum(1)] = 1.0
    return tuple(map(float, mean)), tuple(map(float, std))


def is_gray(pixels: np.ndarray) -> bool:
    """Whether (N, S, S, 3) images have the same values in all channels."""
    return bool((pixels == pixels[..., :1]).all())


def sample(count: int) -> np.ndarray:
    """Indices of at most 5,000 of `count` images, the same distance apart, always the same."""
    return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)
