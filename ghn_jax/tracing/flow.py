"""From a stream of operations to a computational graph: which of them are nodes (paper § 3).

`jaxpr_graph` lists what a model computes as rows, in order; `Flow.graph` drops what is no node, as
the authors' code does: identities, sums and concatenations that a single node leads to, the mean of
a squeeze-excite block, and whatever does not reach the output.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ghn_jax.deepnets1m.graph import MAX_GRAPH_NODES, PRIMITIVE_ID, Graph, shortest_paths
from ghn_jax.tracing.abstract_values import Key

# What no primitive stands for: edges pass through it.
THROUGH = "through"
# Products of queries and keys; edges pass through, the product with the values is `msa`.
SCORES = "scores"


@dataclasses.dataclass
class Row:
    """One operation.

    Attributes:
      primitive: one of the paper's, `THROUGH` or `SCORES`.
      sources: the rows that it reads, all of them before it.
      shape: of its parameter in PyTorch's order (out, in, height, width), or None.
      name: of its parameter.
      weight, bias: which parameters it was made from (`abstract_values.Key`); None for none.
    """

    primitive: str
    sources: list[int]
    shape: tuple[int, ...] | None = None
    name: str = ""
    weight: Key | None = None
    bias: Key | None = None


class Flow:
    """The rows of one model; row 0 is its input.

    Attributes:
      rows: in order.
      lanes: a row that stands for layers side by side -> the row of each.
    """

    def __init__(self):
        self.rows: list[Row] = [Row("input", [])]
        self.lanes: dict[int, list[int]] = {}
        self._joined: dict[tuple, int] = {}

    def add(self, primitive: str, sources: list[int], **fields) -> int:
        """Appends a row and returns its number."""
        self.rows.append(Row(primitive, sources, **fields))
        return len(self.rows) - 1

    def join(self, primitive: str, sources: list[int]) -> int:
        """The row of this primitive that reads these rows; the same one when asked again."""
        key = (primitive, *sources)
        if key not in self._joined:
            self._joined[key] = self.add(primitive, sources)
        return self._joined[key]

    def lanes_of(self, row: int, count: int) -> list[int]:
        """What each of some layers side by side reads: all read a row that is none of lanes."""
        lanes = self.lanes.get(row, [])
        return lanes if len(lanes) == count else [row] * count

    def abreast(self, rows: list[int]) -> int:
        """The row that stands for layers side by side."""
        row = self.join(THROUGH, rows)
        self.lanes[row] = rows
        return row

    def origin(self, row: int) -> int:
        """The row that a row is a function of: itself, unless it is a sum of one (x + x**3)."""
        while self.rows[row].primitive in ("sum", THROUGH) and len({*self.rows[row].sources}) == 1:
            row = self.rows[row].sources[0]
        return row

    def squeezed(self, gate: int, row: int) -> list[int]:
        """Global averages of a row that a gate is computed from; none where it is no gate of it."""
        means, ahead, seen = [], [gate], set()
        while ahead:
            at = ahead.pop()
            if at in seen or at <= row:
                continue
            seen.add(at)
            if self.rows[at].primitive == "glob_avg":
                (pooled,) = self.rows[at].sources  # perhaps parts of the row, added up
                means += [at] * (self.origin(pooled) == row)
            ahead += self.rows[at].sources
        return means

    def scores(self, row: int) -> int | None:
        """The scores that a row is made of, if by layers one after another (talking heads)."""
        while self.rows[row].primitive in ("conv", "bias", "bn", "ln", THROUGH):
            sources = {*self.rows[row].sources}
            if len(sources) != 1:
                return None
            (row,) = sources
        return row if self.rows[row].primitive == SCORES else None

    def _gone(self) -> set[int]:
        """Rows that are no nodes.

        In the authors' order: of sums and concatenations that lose an input here, those further on
        still count that input as one of its own.
        """
        rows = self.rows
        gone = {i for i, row in enumerate(rows) if row.primitive in (THROUGH, SCORES)}
        for primitive in ("sum", "concat"):
            gone |= {
                i
                for i, row in enumerate(rows)
                if row.primitive == primitive and len(self._read(row.sources, gone)) < 2
            }
        return gone

    def _read(self, sources: list[int], gone: set[int]) -> list[int]:
        """The nodes that stand for rows, in order and once each."""
        found: dict[int, None] = {}
        ahead = list(reversed(sources))
        seen = set()
        while ahead:
            at = ahead.pop()
            if at in seen:
                continue
            seen.add(at)
            if at in gone:
                ahead += reversed(self.rows[at].sources)
            else:
                found[at] = None
        return list(found)

    def graph(self, output: int, virtual_edges: int, classes: int) -> tuple[Graph, list[int]]:
        """The graph of everything that reaches a row, and the row of each of its nodes.

        Args:
          output: the row.
          virtual_edges: see `graph.build_graph`.
          classes: of the model, by which the heads of an ensemble are known.

        Raises:
          ValueError: no path leads from the input to the output, or there are too many nodes.
        """
        gone = self._gone()
        last = self._read([output], gone)
        live, ahead = set(), list(last)
        while ahead:
            at = ahead.pop()
            if at not in live:
                live.add(at)
                ahead += self._read(self.rows[at].sources, gone)
        kept = sorted(live)
        if 0 not in live:
            raise ValueError("the model's output does not depend on its input; nothing to predict")
        if len(kept) > MAX_GRAPH_NODES:
            raise ValueError(
                f"the model's graph has {len(kept)} nodes; allowed: up to {MAX_GRAPH_NODES}, as "
                "the paths between all of them are listed"
            )
        place = {row: node for node, row in enumerate(kept)}
        rows = [self.rows[i] for i in kept]
        sources = [[place[s] for s in self._read(row.sources, gone)] for row in rows]
        graph = Graph(
            primitives=np.array([PRIMITIVE_ID[row.primitive] for row in rows], np.int32),
            edges=shortest_paths(sources, virtual_edges),
            param_shapes=[row.shape for row in rows],
            names=[row.name or row.primitive for row in rows],
            cells=np.zeros(len(rows), np.int32),
            classifier=_classifier(rows, sources, [place[r] for r in last], classes),
        )
        return graph, kept


def _classifier(
    rows: list[Row], sources: list[list[int]], last: list[int], classes: int
) -> tuple[int, ...]:
    """The nodes of the weight and the bias that the output is made by; () where it is by others.

    Followed from the output: a pooling may come after (SqueezeNet), a bias may be missing. An
    ensemble's heads are all classifiers: their logits are added up, or stacked and averaged.
    """
    bias: tuple[int, ...] = ()
    while len(last) == 1:
        (node,) = last
        primitive, shape = rows[node].primitive, rows[node].shape
        if primitive == "conv":
            dense = len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
            return (node, *bias) if dense else ()
        if primitive == "bias" and not bias:
            bias = (node,)
        elif primitive not in ("glob_avg", "avg_pool", "sum", "concat"):
            return ()
        last = sources[node]
    heads = [_classifier(rows, sources, [node], classes) for node in last]
    if bias or not all(head and rows[head[0]].shape[0] == classes for head in heads):
        return ()
    found = dict.fromkeys(node for head in heads for node in head)
    above, ahead = set(), [source for head in heads for source in sources[head[0]]]
    while ahead:
        at = ahead.pop()
        if at not in above:
            above.add(at)
            ahead += sources[at]
    return () if above & found.keys() else tuple(found)  # of a residual, one is above another
