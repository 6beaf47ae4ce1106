"""Figures of detections: images with true and found boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ghn_jax.plot.figure import canvas, check_path, save

_TRUE, _FOUND = "#3fd05a", "#ff5a36"
_COLUMNS = 4


class Seen(NamedTuple):
    """An image and what was found in it.

    Attributes:
      pixels: (H, W, 3) uint8.
      objects: (N, 4) true boxes.
      boxes: (M, 4) found ones.
      scores: (M,) theirs.
    """

    pixels: np.ndarray
    objects: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def draw_detections(
    seen: Sequence[Seen], path: str | os.PathLike | None = None, *, least: float = 0.5
) -> Figure:
    """Draws images with true boxes (dashed) and found ones with their scores.

    Args:
      seen: the images.
      path: where to save the picture, .png or .pdf; None: nowhere.
      least: score from which found boxes are drawn.

    Raises:
      ValueError: another suffix, or no images.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not seen:
        raise ValueError("there are no images to draw")
    rows = -(-len(seen) // _COLUMNS)
    figure = canvas(2.6 * _COLUMNS, 2.6 * rows + 0.3)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    for axes, image in zip(panels, seen, strict=False):
        axes.imshow(image.pixels)
        for box in image.objects:
            _box(axes, box, _TRUE, "--")
        for box, score in zip(image.boxes, image.scores, strict=True):
            if score >= least:
                _box(axes, box, _FOUND, "-")
                axes.text(
                    box[0], box[1], f"{score:.2f}", va="bottom", fontsize=6, color="white",
                    bbox={"facecolor": _FOUND, "pad": 0.6, "linewidth": 0},
                )  # fmt: skip
    keys = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=color, linestyle=style)
        for color, style in ((_TRUE, "--"), (_FOUND, "-"))
    ]
    labels = ["true", f"found, score ≥ {least}"]
    figure.legend(keys, labels, loc="outside upper left", frameon=False, ncols=2, fontsize=8)
    return save(figure, path)


def _box(axes: Axes, box: np.ndarray, color: str, style: str) -> None:
    x1, y1, x2, y2 = box.tolist()
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linestyle=style, linewidth=1.3
        )
    )  # fmt: skip
