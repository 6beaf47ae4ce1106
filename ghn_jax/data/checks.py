"""Checks of what users give: each refuses in a sentence that says what is allowed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

MIN_IMAGE_SIZE = 8
_MAX_WORD = 2**32 - 1  # larger numbers would spill into the next word of a seed


def check_choice(what: str, given: str, allowed: Sequence[str]) -> None:
    """Raises ValueError where `given` is none of `allowed`."""
    if given not in allowed:
        raise ValueError(f"unknown {what} {given!r}; use one of {', '.join(map(repr, allowed))}")


def check_whole(what: str, given: int, least: int, most: int = _MAX_WORD) -> None:
    """Raises ValueError where `given` is no whole number from `least` to `most`."""
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not (whole and least <= given <= most):
        raise ValueError(f"{what} is {given!r}; use a whole number from {least} to {most}")


def own_size(name: str, sizes: Collection[tuple[int | None, int | None]]) -> int:
    """Height and width of a dataset's images, which are squares of one size.

    Args:
      name: of the dataset.
      sizes: (height, width) of its images, or some of them that differ; None for any.

    Raises:
      ValueError: they are of several sizes, or no squares, or too small.
    """
    given = sorted(sizes, key=str)
    height, width = given[0]
    if len(given) == 1 and height == width and height is not None and height >= MIN_IMAGE_SIZE:
        return height
    several = len(given) > 1 or height is None or width is None
    found = "several sizes" if several else f"{height}x{width} pixels"
    raise ValueError(
        f"{name} has images of {found}; give the size that networks get, image_size or "
        f"--image-size, {MIN_IMAGE_SIZE} or more"
    )
