"""Pictures: computational graphs as in Table 1 of the paper, training curves, accuracy bars.

Every function returns a `matplotlib.figure.Figure` with its own Agg canvas. Nothing touches
pyplot's global state, so the functions work without a display and in threads.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from scipy.optimize import linprog
from scipy.sparse import csr_array

from ghn_jax.graph import PRIMITIVES, Graph

FORMATS = (".png", ".pdf")

_NEUTRAL, _FAINT = "#444444", "#a0a0a0"
_PREDICTED, _PREDICTED_BAR = "#123a80", "#7aa3dc"
_RANDOM, _RANDOM_BAR = "#5f5f5f", "#c8c8c8"
_LOSS = "#b5432a"


def _canvas(width: float, height: float) -> Figure:
    """An empty figure of (width, height) inches that draws without a display."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _check_path(path: str | os.PathLike | None) -> pathlib.Path | None:
    """Refuses a path that could not be saved to, before any time goes into drawing."""
    if path is None:
        return None
    path = pathlib.Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"cannot draw to {str(path)!r}; allowed suffixes: {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {str(path.parent)!r} does not exist; create it first")
    return path


def _save(figure: Figure, path: pathlib.Path | None) -> Figure:
    if path is not None:
        # Without a date, the same graph gives the same PDF, byte for byte.
        dated = path.suffix.lower() == ".pdf"
        figure.savefig(path, metadata={"CreationDate": None} if dated else None)
    return figure


# --- Primitives -----------------------------------------------------------------------------------


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


# --- Layout ---------------------------------------------------------------------------------------
#
# Sugiyama's method, as in Graphviz's dot: (1) layers by longest path; (2) edges that span layers
# are cut into tracks, one per source, by dummy vertices; (3) barycentre sweeps order each layer;
# (4) a linear program gives x coordinates that keep tracks straight. Long chains are then set
# like a newspaper, in columns read from top to bottom, left to right.

_NODE_SPACE, _TRACK_SPACE = 1.0, 0.55  # widths, in units of the distance between layers
_LANE = 0.32  # between the tracks that run from one column to the next
_SWEEPS = 16
_PROPORTION = 1.0  # of a drawing, width to height; the legend is beside it
_SHORTEST_COLUMN = 24  # layers; a graph of less than two such columns is not wrapped


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a graph of N nodes is drawn, in units of the distance between two layers.

    Attributes:
      layers: (N,) int, the longest path from a node without sources.
      columns: (N,) int, the column of the page that a node is in.
      positions: (N, 2) float, x and y; y grows upwards, so edges run to smaller y in a column.
      curves: polylines (K, 2) that draw the edges within columns; those of one node share a track.
      carried: polylines (K, 2) from the foot of one column to the head of the next.
    """

    layers: np.ndarray
    columns: np.ndarray
    positions: np.ndarray
    curves: list[np.ndarray]
    carried: list[np.ndarray]


@dataclasses.dataclass
class _Tracks:
    """A graph of V vertices, N nodes first, with edges between neighbouring layers only.

    Attributes:
      layers: (V,) int.
      space: (V,) float, the width a vertex needs.
      segments: (S, 2) int, upper and lower vertex.
      weight: (S,) float, how much a segment wants to be vertical.
    """

    layers: np.ndarray
    space: np.ndarray
    segments: np.ndarray
    weight: np.ndarray


def _longest_paths(n: int, edges: np.ndarray) -> np.ndarray:
    """(n,) length of the longest path that ends in each node; ValueError if there is a cycle."""
    targets: list[list[int]] = [[] for _ in range(n)]
    for source, target in edges.tolist():
        targets[source].append(target)
    missing = np.bincount(edges[:, 1], minlength=n).tolist()
    layers = [0] * n
    ready = [node for node in range(n) if not missing[node]]
    for node in ready:  # grows while it is read: Kahn's topological order
        for target in targets[node]:
            layers[target] = max(layers[target], layers[node] + 1)
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)
    if len(ready) < n:
        raise ValueError(f"the real edges form a cycle through {n - len(ready)} nodes or fewer")
    return np.array(layers)


def _tracks(layers: np.ndarray, edges: np.ndarray) -> _Tracks:
    """Cuts edges to length one. All the edges of a source follow one track of dummy vertices."""
    n = len(layers)
    source, target = edges.T
    last = layers.copy()
    np.maximum.at(last, source, layers[target])
    count = np.maximum(last - layers - 1, 0)
    first = n + np.cumsum(count) - count  # a source's first dummy vertex

    owner = np.repeat(np.arange(n), count)
    dummy = np.arange(n, n + len(owner))
    step = dummy - first[owner]  # 0 for the dummy right below the source
    above = np.where(step == 0, owner, dummy - 1)
    hops = layers[target] - layers[source] - 1
    end = np.where(hops == 0, source, first[source] + hops - 1)
    return _Tracks(
        layers=np.concatenate([layers, layers[owner] + 1 + step]),
        space=np.repeat([_NODE_SPACE, _TRACK_SPACE], [n, len(dummy)]),
        segments=np.concatenate([np.stack([above, dummy], 1), np.stack([end, target], 1)]),
        # A bend disturbs most within a track, then in a chain of nodes; a track that leaves or
        # joins a chain had better do the bending.
        weight=np.concatenate([np.where(step == 0, 1.0, 8.0), np.where(hops == 0, 3.0, 1.0)]),
    )


class _Order:
    """The order of vertices within each layer, and the two moves that improve it.

    Crossings count by the product of the two segments' weights: two edges had better cross where
    one of them leaves or joins, not in the middle of long tracks.
    """

    def __init__(self, tracks: _Tracks):
        depth = int(tracks.layers.max()) + 1
        self.layers = [np.flatnonzero(tracks.layers == layer) for layer in range(depth)]
        self.place = np.zeros(len(tracks.layers))
        for vertices in self.layers:
            self.place[vertices] = np.arange(len(vertices))
        upper, lower = tracks.segments.T
        between = [np.flatnonzero(tracks.layers[upper] == layer) for layer in range(depth - 1)]
        self.gaps = [(upper[s], lower[s], tracks.weight[s]) for s in between]
        self.above: list[list] = [[] for _ in self.place]
        self.below: list[list] = [[] for _ in self.place]
        for u, v, weight in zip(upper.tolist(), lower.tolist(), tracks.weight, strict=True):
            self.above[v].append((u, float(weight)))
            self.below[u].append((v, float(weight)))

    def crossings(self) -> float:
        """The weighted number of crossings between all neighbouring layers."""
        total = 0.0
        for upper, lower, weight in self.gaps:
            left, right = self.place[upper], self.place[lower]
            cross = np.subtract.outer(left, left) * np.subtract.outer(right, right) < 0
            total += weight @ cross @ weight / 2
        return float(total)

    def sweep(self, down: bool) -> None:
        """Sorts each layer by the mean place of its neighbours in the layer before."""
        gaps = list(enumerate(self.gaps))
        for gap, (upper, lower, _) in gaps if down else reversed(gaps):
            layer, inner, outer = (gap + 1, lower, upper) if down else (gap, upper, lower)
            vertices = self.layers[layer]
            degree = np.bincount(inner, minlength=len(self.place))[vertices]
            sums = np.bincount(inner, self.place[outer], len(self.place))[vertices]
            centre = np.where(degree > 0, sums / np.maximum(degree, 1), self.place[vertices])
            self.layers[layer] = vertices[np.lexsort((self.place[vertices], centre))]
            self.place[self.layers[layer]] = np.arange(len(vertices))

    def swap(self) -> None:
        """Exchanges neighbours wherever that saves crossings."""
        place = self.place.tolist()
        for layer, vertices in enumerate(self.layers):
            row = vertices.tolist()
            for i in range(len(row) - 1):
                u, v = row[i], row[i + 1]
                saved = sum(
                    weight_a * weight_b * ((place[a] > place[b]) - (place[a] < place[b]))
                    for near in (self.above, self.below)
                    for a, weight_a in near[u]
                    for b, weight_b in near[v]
                )
                if saved > 0:
                    row[i], row[i + 1] = v, u
                    place[u], place[v] = place[v], place[u]
            self.layers[layer] = np.array(row)
        self.place = np.array(place)


def _order(tracks: _Tracks) -> list[np.ndarray]:
    """Vertices of each layer from left to right: the best of a few sweeps."""
    order = _Order(tracks)
    best, fewest = list(order.layers), order.crossings()
    for sweep in range(_SWEEPS):
        if fewest == 0:
            break
        order.sweep(down=sweep % 2 == 0)
        order.swap()
        crossings = order.crossings()
        if crossings < fewest:
            best, fewest = list(order.layers), crossings
    return best


def _split(depth: int, columns: int, carried: np.ndarray) -> np.ndarray:
    """(columns - 1,) first layer of each column but the first: even heights, few tracks broken.

    Dynamic programming over the layers that a column can end before.
    """
    ends = np.arange(depth + 1)
    heights = (ends[None] - ends[:, None]) * columns / depth  # [start, end], relative to the mean
    price = np.where(heights > 0, 6 * (heights - 1) ** 2, np.inf)
    price[:, 1:depth] += 0.1 * carried[: depth - 1]
    cost = np.where(ends == 0, 0.0, np.inf)
    starts = []
    for _ in range(columns):
        total = cost[:, None] + price
        starts.append(total.argmin(0))
        cost = total.min(0)
    breaks = [depth]
    for start in reversed(starts):
        breaks.append(int(start[breaks[-1]]))
    return np.array(breaks[-2:0:-1], int)


def _breaks(tracks: _Tracks, order: list[np.ndarray]) -> np.ndarray:
    """First layer of each column but the first, for a page of pleasant proportions."""
    depth = len(order)
    widths = np.array([tracks.space[vertices].sum() for vertices in order])
    upper = np.unique(tracks.segments[:, 0])
    carried = np.bincount(tracks.layers[upper], minlength=depth)  # tracks below each layer

    def badness(starts: np.ndarray) -> float:
        bounds = np.r_[0, starts, depth]
        heights = np.diff(bounds)
        lanes = carried[starts - 1]
        width = sum(widths[a:b].max() for a, b in itertools.pairwise(bounds))
        width += (1.5 + _LANE * lanes).sum()
        proportion = abs(math.log(width / (heights.max() + 3) / _PROPORTION))
        return proportion + 0.1 * lanes.sum() / len(heights) + heights.max() / heights.mean()

    most = max(1, depth // _SHORTEST_COLUMN)
    usual = np.percentile(widths, 95) + 2.5
    guess = min(most, round(math.sqrt(_PROPORTION * depth / usual)))
    choices = range(max(1, guess - 2), min(most, guess + 2) + 1)
    return min((_split(depth, columns, carried) for columns in choices), key=badness)


def _x_coordinates(tracks: _Tracks, order: list[np.ndarray], column: np.ndarray) -> np.ndarray:
    """(V,) x with the least weighted horizontal length of segments, 0 the left of each column.

    The variables of the linear program are x, one |x_upper - x_lower| for each segment, and the
    width of each column.
    """
    inside = column[tracks.segments[:, 0]] == column[tracks.segments[:, 1]]
    segments, weight = tracks.segments[inside], tracks.weight[inside]
    n, m, k = len(tracks.layers), len(segments), int(column.max()) + 1
    pairs = np.concatenate([np.stack([v[:-1], v[1:]], 1) for v in order])
    gaps = tracks.space[pairs].sum(1) / 2

    vertex, length, width = np.arange(n), n + np.arange(m), n + m + column
    rows = [  # each: columns of the matrix, their coefficients, the bound; sum <= bound
        (pairs, (1, -1), -gaps),
        (np.c_[segments, length], (1, -1, -1), np.zeros(m)),
        (np.c_[segments, length], (-1, 1, -1), np.zeros(m)),
        (np.c_[vertex, width], (1, -1), np.zeros(n)),
    ]
    data = np.concatenate([np.tile(np.array(c, float), len(at)) for at, c, _ in rows])
    indices = np.concatenate([at.ravel() for at, _, _ in rows])
    counts = np.concatenate([np.full(len(at), at.shape[1]) for at, _, _ in rows])
    bound = np.concatenate([b for _, _, b in rows])
    matrix = csr_array((data, indices, np.r_[0, np.cumsum(counts)]), shape=(len(bound), n + m + k))
    # Columns narrow, but never at the price of a bend.
    cost = np.concatenate([np.zeros(n), weight, np.full(k, 0.1)])
    result = linprog(cost, A_ub=matrix, b_ub=bound, bounds=(0, None), method="highs")
    if result.x is None:
        raise RuntimeError(f"the layout's linear program failed: {result.message}")
    return result.x[:n]


def _curve(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """(S, 9, 2) curves from (S, 2) to (S, 2) that leave and arrive vertically."""
    t = np.linspace(0, 1, 9)[None, :, None]
    bend = np.concatenate([t * t * (3 - 2 * t), t], -1)
    return start[:, None] + (end - start)[:, None] * bend


def _carry(start: np.ndarray, end: np.ndarray, bottom: float, gutter: float) -> list[np.ndarray]:
    """Tracks from the foot of one column to the head of the next, up the gutter between them.

    Args:
      start, end: (C, 2) where the tracks leave and arrive.
      bottom: y of the lower column end.
      gutter: x of the gutter's left end.
    """
    # One lane for each source. Inner lanes of the turn at the foot are outer lanes of the turn at
    # the head, so tracks that keep their order do not cross.
    places, source = np.unique(start[:, 0], return_inverse=True)
    leftmost = np.full(len(places), np.inf)
    np.minimum.at(leftmost, source, end[:, 0])
    down = (len(places) - 1 - np.arange(len(places)))[source]
    up = np.argsort(np.argsort(leftmost, kind="stable"))[source]
    lines = []
    for (x0, y0), (x1, y1), d, u in zip(start, end, down, up, strict=True):
        foot, lane, head = bottom - 0.8 - d * _LANE, gutter + d * _LANE, 0.8 + u * _LANE
        corners = [(x0, y0), (x0, foot), (lane, foot), (lane, head), (x1, head), (x1, y1)]
        lines.append(_rounded(np.array(corners)))
    return lines


def _rounded(corners: np.ndarray, radius: float = 0.3) -> np.ndarray:
    """(K, 2) the polyline through (C, 2) corners, with quarter circles in place of corners."""
    points = [corners[:1]]
    t = np.linspace(0, 1, 6)[:, None]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        ends = []
        for other in (before, after):
            way = other - corner
            length = np.abs(way).sum()
            ends.append(corner + way * min(radius / length, 0.5) if length else corner)
        points.append((1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * corner + t * t * ends[1])
    return np.concatenate([*points, corners[-1:]])


def layout_graph(n: int, edges: np.ndarray) -> Layout:
    """Places the nodes of a directed acyclic graph in layers, wrapped into columns.

    Args:
      n: number of nodes, one or more.
      edges: (M, 2) int, source and target.

    Raises:
      ValueError: there is no node, an edge's end is not a node, or the edges form a cycle.
    """
    edges = np.unique(np.asarray(edges, int).reshape(-1, 2), axis=0)
    if n < 1:
        raise ValueError("the graph has no nodes; there is nothing to draw")
    if edges.size and not (0 <= edges.min() and edges.max() < n):
        raise ValueError(
            f"an edge joins node {edges.min()} or {edges.max()}; allowed: 0 to {n - 1}"
        )
    tracks = _tracks(_longest_paths(n, edges), edges)
    order = _order(tracks)
    starts = _breaks(tracks, order)
    column = np.searchsorted(starts, tracks.layers, side="right")
    x = _x_coordinates(tracks, order, column)
    y = (np.r_[0, starts][column] - tracks.layers).astype(float)

    upper, lower = tracks.segments.T
    over = column[upper] != column[lower]
    gutters = []
    for i in range(len(starts)):  # shift each column to the right of what came before it
        here = column == i
        lanes = len(np.unique(upper[over & here[upper]]))
        gutters.append(x[here].max() + 1.0)
        x[column == i + 1] += gutters[-1] + (lanes - 1) * _LANE + 1.0
    points = np.stack([x, y], 1)
    curves = list(_curve(points[upper[~over]], points[lower[~over]]))
    carried = []
    for i, gutter in enumerate(gutters):
        ends = points[tracks.segments[over & (column[upper] == i)]]
        carried += _carry(ends[:, 0], ends[:, 1], y[column == i].min(), gutter)
    return Layout(tracks.layers[:n], column[:n], points[:n], curves, carried)


# --- Graphs ---------------------------------------------------------------------------------------

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

    figure = _canvas(page_width, page_height)
    top = 1 - (_MARGIN + above) / page_height
    size = width / page_width, height / page_height
    axes = figure.add_axes([_MARGIN / page_width, top - size[1], *size])
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
            *here.T,
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
      ValueError: another suffix; no nodes, N primitives but not N shapes, an unknown primitive, an
        edge to a node that does not exist, or a cycle.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = _check_path(path)
    primitives = np.asarray(graph.primitives)
    if len(primitives) != len(graph.param_shapes):
        raise ValueError(
            f"{len(primitives)} primitives but {len(graph.param_shapes)} param_shapes; "
            "a graph has one of each per node"
        )
    if primitives.size and not (0 <= primitives.min() and primitives.max() < len(PRIMITIVES)):
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
        corner = {"loc": "upper left", "bbox_to_anchor": (box.x1, box.y1), "borderaxespad": 0}
        figure.legend(handles=entries, frameon=False, **corner)
    return _save(figure, path)


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
    path = _check_path(path)
    metrics = _read_metrics(metrics_path)
    step = metrics["step"]
    window = max(1, len(step) // 50)
    figure = _canvas(7.0, 6.0)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, name, color in zip(panels, ("loss", "top1"), (_LOSS, _PREDICTED), strict=True):
        values = metrics[name]
        axes.plot(step, values, color=color, alpha=0.3, linewidth=0.7, label="each step", gid="raw")
        axes.plot(
            step,
            _running_mean(values, window),
            color=color,
            linewidth=1.8,
            label=f"mean of the last {window} steps",
            gid="mean",
        )
        _tidy(axes)
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
    panels[1].set(xlabel="step", ylabel="training accuracy")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    figure.align_ylabels(panels)
    figure.tight_layout()
    return _save(figure, path)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


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
    path = _check_path(path)
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
    figure = _canvas(7.0, 1.6 + (each * len(rows) if named else 6.0))
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
    _tidy(axes)
    axes.grid(False, axis="y")
    look = {"frameon": False, "ncols": 5, "fontsize": 9, "columnspacing": 1.2}
    figure.legend(handles=entries, loc="outside upper left", **look)
    return _save(figure, path)
