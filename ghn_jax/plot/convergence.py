"""Loss and accuracy while networks (Fig. 13) and hypernetworks (Fig. 9) are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ghn_jax.plot.figure import canvas, check_path, method_colors, save, tidy


def convergence_figure(records: Sequence[Mapping], path: str | os.PathLike | None = None) -> Figure:
    """Draws training loss and test accuracy by epoch, a line for each beginning (Fig. 13).

    Args:
      records: with `start`, `loss` (a number for each epoch), and `test_top1` (epoch -> fraction).
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no records.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not records:
        raise ValueError("there are no records to draw")
    figure = canvas(8.0, 3.4)
    figure.set_layout_engine("constrained")
    loss, accuracy = figure.subplots(1, 2)
    colors = method_colors(record["start"] for record in records)
    for record in records:
        look = {"color": colors[record["start"]], "marker": "o", "markersize": 3,
                "linewidth": 1.4, "label": f"from {record['start']}"}  # fmt: skip
        losses = np.array(record["loss"], float)
        losses[~np.isfinite(losses)] = np.nan
        loss.plot(range(1, len(losses) + 1), losses, **look)
        top1 = record["test_top1"]
        accuracy.plot([int(epoch) for epoch in top1], list(top1.values()), **look)
    loss.set_ylabel("training loss")
    accuracy.set_ylabel("test accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)
        tidy(axes)
    return save(figure, path)


def meta_batch_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike | None = None
) -> Figure:
    """Draws the training loss of hypernetworks by update and by share of their training (Fig. 9).

    Args:
      curves: name of a run -> (S,) numbers of updates, and the losses there; NaN leaves a gap.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no curves.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not curves:
        raise ValueError("there are no curves to draw")
    figure = canvas(8.0, 3.4)
    figure.set_layout_engine("constrained")
    by_update, by_share = figure.subplots(1, 2, sharey=True)
    shortest = min(updates[-1] for updates, _ in curves.values())
    colors = method_colors(curves)
    for name, (updates, losses) in curves.items():
        look = {"color": colors[name], "linewidth": 1.2, "label": name}
        same = updates <= shortest
        by_update.plot(updates[same], losses[same], **look)
        by_share.plot(updates / updates[-1], losses, **look)
    by_update.set(xlabel="updates", ylabel="training loss", title="as many updates")
    by_share.set(xlabel="share of the run", title="whole runs")
    by_share.xaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (by_update, by_share):
        axes.title.set_fontsize(10)
        axes.legend(frameon=False, fontsize=9)
        tidy(axes)
    return save(figure, path)
