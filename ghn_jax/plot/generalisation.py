"""Accuracy by properties of networks: Fig. 10."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ghn_jax.plot.figure import canvas, check_path, method_colors, save, tidy


def generalisation_figure(
    points: Sequence[Any],
    panels: Mapping[str, Any],
    path: str | os.PathLike | None = None,
) -> Figure:
    """Draws Fig. 10: a panel for each property, a line for each method, standard errors as bars.

    What is as in training is on a green ground.

    Args:
      points: of the lines, with `panel`, `method`, `value`, `top1` and `error`.
      panels: what they belong to, with `label` and the range `trained`.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no points.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not points:
        raise ValueError("there are no points to draw")
    figure = canvas(3.0 * len(panels), 3.4)
    figure.set_layout_engine("constrained")
    methods = list(dict.fromkeys(point.method for point in points))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, panel) in zip(every, panels.items(), strict=True):
        axes.axvspan(*panel.trained, color="#dcefdc", linewidth=0, gid="training")
        for method, color in method_colors(methods).items():
            mine = [p for p in points if (p.panel, p.method) == (name, method)]
            if mine:
                axes.errorbar(
                    [p.value for p in mine], [p.top1 for p in mine], [p.error for p in mine],
                    color=color, marker="o", markersize=3, linewidth=1.4, capsize=2, label=method,
                )  # fmt: skip
        axes.set(title=name, xlabel=panel.label)
        axes.title.set_fontsize(10)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        tidy(axes)
    every[0].set_ylabel("top-1")
    handles = dict(zip(*reversed(every[0].get_legend_handles_labels()), strict=True))
    for axes in every[1:]:  # a method may have no network in the first
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", frameon=False, ncols=6,
        fontsize=9,
    )  # fmt: skip
    return save(figure, path)
