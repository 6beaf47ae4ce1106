"""Where the nodes of a computational graph are drawn.

Sugiyama's method, as in Graphviz's dot: (1) layers by longest path; (2) edges that span layers are
cut into tracks, one per source, by dummy vertices; (3) barycentre sweeps order each layer; (4) a
linear program gives x coordinates that keep tracks straight. Long chains are then set like a
newspaper, in columns read from top to bottom, left to right.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

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
    if edges.size and not (edges.min() >= 0 and edges.max() < n):
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
