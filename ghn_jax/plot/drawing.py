"""Pictures of computational graphs, in the colours and with the legend of Table 1 and Fig. 6b."""

from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph, check_graph
from ghn_jax.plot.figure import canvas, check_path, save
from ghn_jax.plot.layout import Layout, layout_graph

_NEUTRAL, _FAINT = "#444444", "#a0a0a0"


@dataclasses.dataclass(frozen=True)
class _Style:
    """How one kind of node is drawn: label as in Fig. 6b, marker and colours as in Table 1."""

    label: str
    color: str
    marker: str = "o"
    size: float = 1.0  # area, relative to an ordinary node
    edge: str = "gray"
    line: float = 0.5


# In the order of their frequency in the training set (Fig. 6b, the legend of Table 1).
STYLES = {
    "conv_1x1": _Style("conv 1×1, FC", "#0008ff", "^", edge="black", line=1.0),
    "conv": _Style("conv", "#0008ff"),
    "bn": _Style("BN", "#29ffce", "s", edge="black", line=1.0),
    "sum": _Style("sum", "#ff6800"),
    "bias": _Style("bias", "#ff00ff", "d"),
    "sep_conv": _Style("group conv", "#000080"),
    "concat": _Style("concat", "#ff2900", "^"),
    "dil_conv": _Style("dil. gr. conv", "#0000cd"),
    "ln": _Style("LN", "#ffff00", "s"),
    "max_pool": _Style("max pool", "#ceff29", size=1.75, edge="black", line=1.0),
    "avg_pool": _Style("avg pool", "#ffe600"),
    "msa": _Style("MSA", "#0a0a0a"),
    "cse": _Style("SE", "#00d4ff"),
    "input": _Style("input", "#cd0000", "s", size=2.0, edge="black", line=1.5),
    "glob_avg": _Style("glob avg", "#ffa700", size=2.0),
    "pos_enc": _Style("pos enc", "#97ff60", "s"),
}


def _kind(primitive: int, shape: tuple[int, ...] | None) -> str:
    """A node's key in `STYLES`: its primitive, or 'conv_1x1' (shape (out, in[, 1, 1]))."""
    name = PRIMITIVES[primitive]
    if name == "conv" and shape is not None and len(shape) >= 2 and math.prod(shape[2:]) == 1:
        return "conv_1x1"
    return name


# In inches: the distance between layers (less only where the drawing would exceed _LARGEST).
_INCHES = 0.24
_LARGEST = 40.0
_MARGIN, _TITLE, _LEGEND, _LEGEND_LINE = 0.3, 0.35, 1.9, 0.24
_AREA = 50.0  # of an ordinary marker, in square points


def _page(layout: Layout, title: str | None, lines: int) -> tuple[Figure, Axes, float]:
    """A figure with the title above and room for a legend of some lines to the right.

    Returns it with axes in the layout's units, and the inches of one unit.
    """
    points = np.concatenate([layout.positions, *layout.curves, *layout.carried])
    low, high = points.min(0) - 0.7, points.max(0) + 0.7
    inches = min(_INCHES, _LARGEST / (high - low).max())
    width, height = (high - low) * inches
    above = _TITLE if title else 0.0
    page_width = max(width + (_LEGEND if lines else 0.0), 0.1 * len(title or "")) + 2 * _MARGIN
    page_height = max(height, _LEGEND_LINE * lines) + above + 2 * _MARGIN

    figure = canvas(page_width, page_height)
    top = 1 - (_MARGIN + above) / page_height
    size = width / page_width, height / page_height
    axes = figure.add_axes((_MARGIN / page_width, top - size[1], *size))
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.set_axis_off()
    if title:
        corner = {"x": _MARGIN / page_width, "y": 1 - _MARGIN / page_height}
        figure.text(s=title, ha="left", va="top", fontsize=12, **corner)
    return figure, axes, inches


def _scatter(axes: Axes, kinds: np.ndarray, positions: np.ndarray, area: float) -> list[Line2D]:
    """Draws the markers, one collection with gid 'nodes:KIND' per kind; returns legend entries."""
    entries = []
    for kind, style in STYLES.items():
        here = positions[kinds == kind]
        if not len(here):
            continue
        markers = axes.scatter(
            here[:, 0],
            here[:, 1],
            s=area * style.size,
            color=style.color,
            marker=style.marker,
            edgecolors=style.edge,
            linewidths=style.line,
            zorder=3,
        )
        markers.set_gid(f"nodes:{kind}")
        entries.append(
            Line2D(
                [],
                [],
                linestyle="",
                label=f"{style.label} ({len(here)})",
                marker=style.marker,
                markersize=7 * math.sqrt(style.size),
                markerfacecolor=style.color,
                markeredgecolor=style.edge,
                markeredgewidth=style.line,
            )
        )
    return entries


def _lines(axes: Axes, layout: Layout, width: float) -> None:
    for curves, color in ((layout.carried, _FAINT), (layout.curves, _NEUTRAL)):
        lines = LineCollection(curves, colors=color, linewidths=width, capstyle="round", zorder=1)
        axes.add_collection(lines, autolim=False)


def _arrowheads(
    axes: Axes, kinds: np.ndarray, tops: np.ndarray, area: float, inches: float
) -> None:
    """Triangles on top of the nodes (T kinds and positions) that edges lead to, from above."""
    head = 0.42 * math.sqrt(area)
    radius = np.array([math.sqrt(area * STYLES[kind].size) / 2 for kind in kinds])
    y = tops[:, 1] + (radius + head / 2) / 72 / inches
    axes.scatter(tops[:, 0], y, s=head**2, marker="v", color=_NEUTRAL, linewidths=0, zorder=2)


def draw_graph(
    graph: Graph,
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
    legend: bool = True,
) -> Figure:
    """Draws a computational graph with the markers of Table 1.

    Edges run downwards; long graphs continue at the top of the next column. The edges that leave a
    node share one line until they part. Only real edges are drawn, virtual ones are not.

    Args:
      graph: the graph: `primitives` (N,), `edges` (M, 3) and N `param_shapes` are read.
      path: where to save the picture, .png or .pdf; None: nowhere.
      title: a line above the picture.
      legend: whether to explain the markers that occur and count them, sorted by their frequency
        in the training set. A triangle marks 1x1 convolutions and fully connected layers.

    Returns:
      The figure; its markers are collections with the gid 'nodes:KIND', KIND a key of `STYLES`.

    Raises:
      TypeError: `graph` is no graph.
      ValueError: another suffix; no nodes, N primitives but not N shapes, an unknown primitive, an
        edge to a node that does not exist, or a cycle.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = check_path(path)
    check_graph(graph)
    primitives = np.asarray(graph.primitives)
    if len(primitives) != len(graph.param_shapes):
        raise ValueError(
            f"{len(primitives)} primitives but {len(graph.param_shapes)} param_shapes; "
            "a graph has one of each per node"
        )
    if primitives.size and not (primitives.min() >= 0 and primitives.max() < len(PRIMITIVES)):
        raise ValueError(
            f"primitive {primitives.min()} or {primitives.max()}; "
            f"allowed: 0 to {len(PRIMITIVES) - 1}, ids into PRIMITIVES"
        )
    edges = np.asarray(graph.edges, int).reshape(-1, 3)
    edges = edges[edges[:, 2] == 1, :2]
    layout = layout_graph(len(primitives), edges)

    pairs = zip(primitives, graph.param_shapes, strict=True)
    kinds = np.array([_kind(primitive, shape) for primitive, shape in pairs])
    lines = len(set(kinds.tolist())) if legend else 0
    figure, axes, inches = _page(layout, title, lines)
    area = _AREA * (inches / _INCHES) ** 2
    _lines(axes, layout, 0.9 * inches / _INCHES)
    entries = _scatter(axes, kinds, layout.positions, area)
    reached = np.unique(edges[:, 1])
    _arrowheads(axes, kinds[reached], layout.positions[reached], area, inches)
    if legend:
        box = axes.get_position()
        figure.legend(
            handles=entries,
            frameon=False,
            loc="upper left",
            bbox_to_anchor=(box.x1, box.y1),
            borderaxespad=0,
        )
    return save(figure, path)
