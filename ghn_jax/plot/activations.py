"""Activations by layer: Fig. 8."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ghn_jax.plot.figure import canvas, check_path, method_colors, save, tidy

_LINES = ("--", "-", ":", "-.")


def activation_figure(
    curves: Mapping[str, Sequence[Any]], path: str | os.PathLike | None = None
) -> Figure:
    """Draws the variance of each layer's output, on a linear and on a logarithmic axis (Fig. 8).

    Args:
      curves: name -> a network's layers, from `activation_statistics`. Names that are alike up to
        their last comma ('GHN-2, begin', 'GHN-2, trained') get one colour and lines of their own.
        What is not finite leaves a gap.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no curves.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not curves:
        raise ValueError("there are no curves to draw")
    groups: dict[str, list[str]] = {}
    for name in curves:
        groups.setdefault(name.rpartition(",")[0] or name, []).append(name)
    figure = canvas(9.0, 3.6)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, 2)
    for axes, scale in zip(panels, ("linear", "log"), strict=True):
        for names, color in zip(groups.values(), method_colors(groups).values(), strict=True):
            for j, name in enumerate(names):
                values = np.array([layer.variance for layer in curves[name]], float)
                values[~np.isfinite(values)] = np.nan
                axes.plot(
                    np.arange(len(values)), values, _LINES[j % len(_LINES)], label=name,
                    color=color, marker="o", markersize=3, linewidth=1.4,
                )  # fmt: skip
        axes.set_yscale(scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="layer", ylabel="variance of activations")
        tidy(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", frameon=False, ncols=3, fontsize=9)
    return save(figure, path)
