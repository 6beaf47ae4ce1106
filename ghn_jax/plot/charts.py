"""Charts: training curves, and accuracies of networks with predicted and random parameters."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ghn_jax.plot.figure import canvas, check_path, save, tidy

_NEUTRAL = "#444444"
_PREDICTED, _PREDICTED_BAR = "#123a80", "#7aa3dc"
_RANDOM, _RANDOM_BAR = "#5f5f5f", "#c8c8c8"
_LOSS = "#b5432a"

# --- Training -------------------------------------------------------------------------------------


def _read_metrics(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Steps, losses and accuracies of a metrics.jsonl, each (S,) and sorted by step.

    A run that went back to a checkpoint repeats steps; the last record of a step counts.
    """
    path = pathlib.Path(path)
    text = path.read_text(encoding="utf-8")
    records = {}
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            values = (record["loss"], record["top1"])
            values = [math.nan if v is None else float(v) for v in values]
            records[int(record["step"])] = values
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # without a line end: training is still writing it
            raise ValueError(
                f"{path.name}, line {number} is not a record with step, loss and top1: {error!r}"
            ) from error
    if not records:
        raise ValueError(f"{path.name} has no records; training writes one per step")
    step = np.array(sorted(records))
    loss, top1 = np.array([records[s] for s in step.tolist()]).T
    # A failed step has no gradient worth the name, and so no accuracy either.
    top1[~np.isfinite(loss)] = np.nan
    loss[~np.isfinite(loss)] = np.nan
    return {"step": step, "loss": loss, "top1": top1}


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """(S,) mean of the finite ones among the last `window` values, NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    for totals in (sums, counts):
        totals[window:] -= totals[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def training_curve(
    metrics_path: str | os.PathLike, path: str | os.PathLike | None = None
) -> Figure:
    """Draws loss and training accuracy against the step: raw values faintly and a running mean.

    The mean is over the last fiftieth of the steps. Failed steps, whose loss is null or not finite,
    are left out of both and marked on the axis.

    Args:
      metrics_path: a metrics.jsonl, one object per line with `step`, `loss` and `top1` (a fraction)
        at least.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix; a line that is not such an object; no records.
      FileNotFoundError: there is no such file, or the folder of `path` does not exist.
    """
    path = check_path(path)
    metrics = _read_metrics(metrics_path)
    step = metrics["step"]
    window = max(1, len(step) // 50)
    figure = canvas(7.0, 6.0)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, color in zip(panels, ("loss", "top1"), (_LOSS, _PREDICTED), strict=True):
        values = metrics[name]
        axes.plot(
            step, values, color=color, alpha=0.3, linewidth=0.7, label="each update", gid="raw"
        )
        axes.plot(
            step,
            _running_mean(values, window),
            color=color,
            linewidth=1.8,
            label=f"mean of the last {window} updates",
            gid="mean",
        )
        tidy(axes)
    failed = step[np.isnan(metrics["loss"])]
    if len(failed):
        panels[0].plot(
            failed,
            np.zeros(len(failed)),
            "x",
            color="black",
            markersize=5,
            clip_on=False,
            transform=panels[0].get_xaxis_transform(),
            label=f"failed ({len(failed)})",
            gid="failed",
        )
    finite = metrics["loss"][np.isfinite(metrics["loss"])]
    if len(finite) and finite.min() > 0 and finite.max() > 20 * np.median(finite):
        panels[0].set_yscale("log")  # a few steps that blew up would flatten all the rest
    panels[0].set_ylabel("training loss")
    panels[0].legend(frameon=False)
    panels[1].set(xlabel="update", ylabel="training accuracy")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    figure.align_ylabels(panels)
    figure.tight_layout()
    return save(figure, path)


# --- Accuracy -------------------------------------------------------------------------------------


def _fraction(value, what: str) -> float:
    """`value` as a float; ValueError unless it is a fraction."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError(f"{what} is {value!r}; allowed: a fraction from 0 to 1")
    return number


def accuracy_bars(
    records: Sequence[Mapping],
    path: str | os.PathLike | None = None,
    *,
    chance: float | None = None,
) -> Figure:
    """Draws the accuracy of networks with predicted parameters beside random (He) ones.

    The best network is at the top; dashed lines are the means of the two groups.

    Args:
      records: one mapping per network: `name`, `top1` and `top1_random`, fractions.
      path: where to save the picture, .png or .pdf; None: nowhere.
      chance: accuracy of guessing, 1 / number of classes, drawn as a dotted line; None: not drawn.

    Raises:
      ValueError: another suffix; no records, one without these keys, or an accuracy outside 0..1.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    rows = []
    for i, record in enumerate(records):
        missing = {"name", "top1", "top1_random"} - set(record)
        if missing:
            raise ValueError(f"record {i} lacks {', '.join(sorted(missing))}")
        name = str(record["name"])
        pair = [_fraction(record[key], f"{key} of {name!r}") for key in ("top1", "top1_random")]
        rows.append((name, *pair))
    if not rows:
        raise ValueError("there are no records; give one per network")
    chance = None if chance is None else _fraction(chance, "chance")
    rows.sort(key=lambda row: -row[1])
    names, predicted, random = zip(*rows, strict=True)

    # With many networks, bars get thin, names would overlap, and bars side by side turn to moire.
    each = min(0.36, 18.0 / len(rows))
    named = each > 0.12
    height, aside = (0.4, 0.2) if named else (1.0, 0.0)
    figure = canvas(7.0, 1.6 + (each * len(rows) if named else 6.0))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    y = np.arange(len(rows))
    entries = []
    for values, place, color, line, label in (
        (predicted, y - aside, _PREDICTED_BAR, _PREDICTED, "predicted"),
        (random, y + aside, _RANDOM_BAR, _RANDOM, "random (He)"),
    ):
        mean = float(np.mean(values))
        look = {"color": line, "linestyle": "--", "gid": f"mean:{label}"}
        entries.append(axes.barh(place, values, height, color=color, label=label))
        entries.append(axes.axvline(mean, label=f"mean {mean:.1%}", **look))
    if chance is not None:
        look = {"color": "black", "linestyle": ":", "gid": "chance"}
        entries.append(axes.axvline(chance, label=f"chance {chance:.1%}", **look))
    if named:
        axes.set_yticks(y, names, fontsize=min(9.0, each * 45))
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(rows)} networks")
    axes.set(xlabel="accuracy (top-1)", xlim=(0, None), ylim=(len(rows) - 0.4, -0.6))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    tidy(axes)
    axes.grid(False, axis="y")
    look = {"frameon": False, "ncols": 5, "fontsize": 9, "columnspacing": 1.2}
    figure.legend(handles=entries, loc="outside upper left", **look)
    return save(figure, path)
