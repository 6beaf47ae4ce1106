"""Pictures of DeepNets-1M's splits: Fig. 6 (a-e, h) and Fig. 7 of the paper."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph
from ghn_jax.deepnets1m.statistics import Statistics
from ghn_jax.plot.drawing import STYLES, draw_graph
from ghn_jax.plot.figure import canvas, check_path, save

_COLORS = {
    "train": "#444444", "val": "#9a9a9a", "test": "#123a80", "wide": "#7aa3dc", "deep": "#b5432a",
    "dense": "#e39b2d", "bnfree": "#3d8b57", "search": "#7b52a3",
}  # fmt: skip


def _color(split: str) -> str:
    return _COLORS.get(split, "#444444")


def _violins(axes: Axes, values: Mapping[str, np.ndarray], label: str, log: bool = False) -> None:
    """A violin for each split; a logarithmic axis is drawn from the logarithms' densities."""
    drawn = [np.log10(v) if log else v for v in values.values()]
    parts = axes.violinplot(drawn, showextrema=False, widths=0.85, points=200)
    for body, split in zip(parts["bodies"], values, strict=True):
        body.set(facecolor=_color(split), alpha=0.85, linewidth=0)
    medians = [np.median(v) for v in drawn]
    axes.scatter(range(1, len(drawn) + 1), medians, color="white", s=9, zorder=3)
    if log:
        low, high = (f(v.min() if f is np.floor else v.max()) for f, v in (
            (np.floor, np.concatenate(drawn)), (np.ceil, np.concatenate(drawn))))  # fmt: skip
        ticks = np.arange(low, high + 1)
        axes.set_yticks(ticks, [f"$10^{int(t)}$" for t in ticks])
    axes.set_xticks(range(1, len(drawn) + 1), list(values))
    axes.set_ylabel(label)


def _primitives(axes: Axes, columns: Mapping[str, Statistics]) -> None:
    """Fig. 6b: the fraction of nodes of each primitive, most frequent in the first split first."""
    shares = {split: c.primitives.sum(0) / c.primitives.sum() for split, c in columns.items()}
    order = np.argsort(-next(iter(shares.values())), kind="stable")
    width = 0.8 / len(shares)
    for i, (split, share) in enumerate(shares.items()):
        at = np.arange(len(order)) + (i - (len(shares) - 1) / 2) * width
        axes.bar(at, share[order], width, color=_color(split), label=split)
    names = [STYLES[PRIMITIVES[p]].label for p in order]
    axes.set_xticks(range(len(order)), names, rotation=60, ha="right")
    axes.set_ylabel("fraction of nodes")


def _shapes(axes: Axes, columns: Mapping[str, Statistics]) -> None:
    """Fig. 6e: average shortest path against average degree."""
    for split, c in columns.items():
        axes.scatter(
            c.degree, c.path, s=6, alpha=0.6, linewidths=0, color=_color(split), label=split
        )
    axes.set_xlabel("average degree")
    axes.set_ylabel("average shortest path")


def draw_statistics(
    columns: Mapping[str, Statistics],
    path: str | os.PathLike | None = None,
    *,
    distances: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draws Fig. 6 (a-e, h): nodes, primitives, channels, parameters, paths, distances.

    Args:
      columns: statistics of each split.
      path: where to save the picture, .png or .pdf; None: nowhere.
      distances: for each split, Hungarian distances of its architectures to training ones; without
        them there is no panel (h).

    Raises:
      ValueError: another suffix, or no split.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not columns:
        raise ValueError("draw_statistics was given no splits; give one or more")
    figure = canvas(14, 8)
    axes = figure.subplots(2, 3)
    _violins(axes[0, 0], {s: c.nodes for s, c in columns.items()}, "nodes")
    _primitives(axes[0, 1], columns)
    _violins(axes[0, 2], {s: c.channels for s, c in columns.items()}, "initial channels", log=True)
    _violins(axes[1, 0], {s: c.parameters for s, c in columns.items()}, "parameters", log=True)
    _shapes(axes[1, 1], columns)
    if distances:
        arrays = {split: np.asarray(d, float) for split, d in distances.items()}
        _violins(axes[1, 2], arrays, "Hungarian distance to train")
    else:
        axes[1, 2].axis("off")
    for letter, panel in zip("abcdeh", axes.flat, strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"({letter})" if panel.axison else "", loc="left", fontsize=10)
    axes[1, 1].legend(frameon=False, markerscale=2)
    figure.tight_layout()
    return save(figure, path)


def draw_examples(
    examples: Mapping[str, Sequence[Graph]], path: str | os.PathLike | None = None
) -> Figure:
    """Draws Fig. 7: computational graphs of each split, a row for each.

    Args:
      examples: a few graphs of each split, equally many.
      path: where to save the picture, .png or .pdf; None: nowhere.

    Raises:
      ValueError: another suffix, or no graph.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    if not examples or not all(examples.values()):
        raise ValueError("draw_examples was given a split without graphs; give one or more of each")
    rows, across = len(examples), max(map(len, examples.values()))
    figure = canvas(3.3 * across, 3.1 * rows)
    axes = figure.subplots(rows, across, squeeze=False)
    for row, (split, graphs) in zip(axes, examples.items(), strict=True):
        for panel in row:
            panel.axis("off")
        for panel, graph in zip(row, graphs, strict=False):
            drawn = draw_graph(graph, legend=False)
            drawn.canvas.draw()
            panel.imshow(np.asarray(drawn.canvas.buffer_rgba()), interpolation="antialiased")
            panel.set_title(f"{split}, {len(graph)} nodes", fontsize=10)
    figure.tight_layout()
    return save(figure, path)
