"""Figures of the paper's experiments: training of networks, property prediction, search."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ghn_jax.plot.figure import canvas, check_path, method_colors, save, tidy

_LOSS, _ACCURACY, _FAINT = "#b5432a", "#123a80", "#c8c8c8"


def epoch_curves(records: Sequence[dict], path: str | os.PathLike | None = None) -> Figure:
    """Draws training loss and accuracy of networks by epoch: each faintly, and their median.

    Args:
      records: with `loss` and `train_top1`, a number for each epoch.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no records.
    """
    path = check_path(path)
    if not records:
        raise ValueError("there are no records to draw")
    epochs = max(len(record["loss"]) for record in records)
    figure = canvas(7.0, 3.2)
    panels = figure.subplots(1, 2)
    for axes, name, color in zip(panels, ("loss", "train_top1"), (_LOSS, _ACCURACY), strict=True):
        values = np.full((len(records), epochs), np.nan)
        for row, record in zip(values, records, strict=True):
            row[: len(record[name])] = record[name]
        along = np.arange(1, epochs + 1)
        axes.plot(along, values.T, color=color, alpha=0.3, linewidth=0.7)
        axes.plot(along, np.nanmedian(values, 0), color=color, linewidth=1.8, marker="o",
                  markersize=3, label=f"median of {len(records)}")  # fmt: skip
        axes.set_xlabel("epoch")
        axes.legend(frameon=False)
        tidy(axes)
    panels[0].set_ylabel("training loss")
    panels[1].set_ylabel("training accuracy")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set_ylim(bottom=0)
    figure.tight_layout()
    return save(figure, path)


def property_bars(results: Sequence[Mapping], path: str | os.PathLike | None = None) -> Figure:
    """Draws Fig. 4: a bar for each property and method, error bars of a standard deviation.

    Args:
      results: mappings with `property`, `method`, `mean` and `std` of Kendall's tau.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no results.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not results:
        raise ValueError("there are no results to draw")
    methods, names = (list(dict.fromkeys(r[k] for r in results)) for k in ("method", "property"))
    picture = canvas(1.5 + 1.6 * len(names), 3.6)
    picture.set_layout_engine("constrained")
    axes = picture.subplots()
    width, colors = 0.8 / len(methods), method_colors(methods)
    for i, method in enumerate(methods):
        mine = [r for r in results if r["method"] == method]
        aside = (i - (len(methods) - 1) / 2) * width
        axes.bar(
            [names.index(r["property"]) + aside for r in mine],
            [r["mean"] for r in mine],
            width,
            yerr=[r["std"] for r in mine],
            color=colors[method],
            error_kw={"elinewidth": 0.9},
            label=method,
        )
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("Kendall's τ")
    tidy(axes)
    axes.grid(False, axis="x")
    picture.legend(loc="outside upper left", frameon=False, ncols=len(methods), fontsize=9)
    return save(picture, path)


def correlation_matrix(
    taus: np.ndarray, names: Sequence[str], path: str | os.PathLike | None = None
) -> Figure:
    """Draws Fig. 11: Kendall's tau between properties of the same networks.

    Args:
      taus: (P, P); NaN where there is none.
      names: of the properties.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    picture = canvas(2.2 + 0.9 * len(names), 1.8 + 0.8 * len(names))
    picture.set_layout_engine("constrained")
    axes = picture.subplots()
    shown = axes.imshow(taus, cmap="RdBu_r", vmin=-1, vmax=1)
    for row, column in np.ndindex(taus.shape):
        tau = taus[row, column]
        color = "white" if abs(tau) > 0.6 else "black"
        said = "–" if np.isnan(tau) else f"{tau:.2f}"
        axes.text(column, row, said, ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    picture.colorbar(shown, ax=axes, label="Kendall's τ")
    return save(picture, path)


def search_curves(results: Sequence[Mapping], path: str | os.PathLike | None = None) -> Figure:
    """Draws tau, and the accuracy of what is found, against the networks a method was told of.

    Args:
      results: mappings with `method`, `size`, and lists `tau` and `test_accuracy` of some draws.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no results.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not results:
        raise ValueError("there are no results to draw")
    picture = canvas(9.0, 3.6)
    picture.set_layout_engine("constrained")
    labels = {"tau": "Kendall's τ", "test_accuracy": "test accuracy of the best found, %"}
    sizes = sorted({r["size"] for r in results})
    panels = picture.subplots(1, 2)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for method in dict.fromkeys(r["method"] for r in results):
            draws = {r["size"]: r[key] for r in results if r["method"] == method}
            axes.errorbar(
                sizes, [np.mean(draws[n]) for n in sizes], [np.std(draws[n]) for n in sizes],
                marker="o", markersize=3, linewidth=1.2, capsize=2, label=method,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set(xlabel="networks that the method was told of", ylabel=label)
        tidy(axes)
    panels[1].legend(frameon=False, fontsize=8)
    return save(picture, path)


def architecture_curves(
    results: Sequence[Mapping], path: str | os.PathLike | None = None
) -> Figure:
    """Draws Fig. 3: accuracy against the number of training architectures.

    Args:
      results: mappings with `count`, `meta_batch`, `train_top1` and, of unseen networks in and out
        of the training distribution, mean accuracies `id` and `ood`; either may be missing.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no results.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not results:
        raise ValueError("there are no results to draw")
    picture = canvas(9.0, 3.6)
    picture.set_layout_engine("constrained")
    panels = picture.subplots(1, 2)
    lines = (("train_top1", 0, "-", ""), ("id", 1, "-", ", ID"), ("ood", 1, "--", ", OOD"))
    colors = method_colors(dict.fromkeys(r["meta_batch"] for r in results))
    for size in colors:
        for key, panel, style, kind in lines:
            mine = sorted((r["count"], r[key]) for r in results
                          if r["meta_batch"] == size and key in r)  # fmt: skip
            if mine:
                panels[panel].plot(
                    *zip(*mine, strict=True), style, color=colors[size], marker="o",
                    markersize=3, linewidth=1.4, label=f"$b_m$ = {size}{kind}",
                )  # fmt: skip
    for axes, label in zip(panels, ("training accuracy", "accuracy, unseen networks"), strict=True):
        axes.set_xscale("log")
        axes.set(xlabel="training architectures", ylabel=label)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        tidy(axes)
        axes.legend(frameon=False, fontsize=8)
    return save(picture, path)


def pareto_front(cost: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Indices of the networks that none is at once cheaper than and better than, by cost."""
    order = np.lexsort((-score, cost))
    best = np.maximum.accumulate(score[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])]


def pareto_figure(
    cost: np.ndarray, score: np.ndarray, path: str | os.PathLike | None = None
) -> Figure:
    """Draws predicted accuracy against parameters, and the networks on the Pareto front.

    Args:
      cost: (N,) parameters.
      score: (N,) predicted accuracy, in per cent.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: the path has another ending.
    """
    path = check_path(path)
    figure = canvas(7, 4.5)
    axes = figure.add_subplot()
    axes.scatter(cost / 1e6, score, s=3, color=_FAINT, linewidths=0, label="networks")
    front = pareto_front(np.asarray(cost), np.asarray(score))
    axes.step(
        cost[front] / 1e6, score[front], where="post", color=_ACCURACY, marker="o", markersize=3,
        label="Pareto front",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("predicted accuracy, %")
    axes.legend(loc="lower right", frameon=False)
    tidy(axes)
    figure.tight_layout()
    return save(figure, path)
