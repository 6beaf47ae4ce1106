"""Computational graphs of architectures (paper § 3, Table 1).

`build_graph` goes straight from an architecture to its graph in NumPy; no network is built or
traced.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.operations import classifier_piece, operation_pieces, piece_nodes
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import Node
from ghn_jax.deepnets1m.wiring import IMAGE, Wiring, wire
from ghn_jax.files.messages import what_is

# The 15 primitives of Table 1; a primitive's id is its position (the authors' order).
PRIMITIVES = (
    "max_pool",
    "avg_pool",
    "sep_conv",
    "dil_conv",
    "conv",
    "msa",
    "cse",
    "sum",
    "concat",
    "input",
    "bias",
    "bn",
    "ln",
    "pos_enc",
    "glob_avg",
)
PRIMITIVE_ID = {name: i for i, name in enumerate(PRIMITIVES)}
PADDING_ID = len(PRIMITIVES)  # the embedding's dummy row (B.2.1)

MAX_GRAPH_NODES = 10_000  # of one graph; the largest of the official files have some thousand


@dataclasses.dataclass(frozen=True)
class Graph:
    """The computational graph of one network, nodes in a topological order, cell by cell.

    Attributes:
      primitives: (N,) int32, ids into `PRIMITIVES`.
      edges: (M, 3) int32: source, target, length of the shortest directed path from source to
        target. Length 1 is a real edge, more a virtual one (§ 4.2).
      param_shapes: N shapes in PyTorch's order (out, in, height, width), None without parameters;
        pooling nodes carry their kernel as (1, 1, 3, 3).
      names: N official parameter names ('cells.0._ops.1.op.1.weight'), or the primitive's name.
      cells: (N,) int32, the cell that each node is counted to.
      classifier: nodes of the classifier's weight and bias (the bias may be missing, or both),
        which have decoders of their own (B.1); negative numbers count from the end.
    """

    primitives: np.ndarray
    edges: np.ndarray
    param_shapes: list[tuple[int, ...] | None]
    names: list[str]
    cells: np.ndarray
    classifier: tuple[int, ...] = (-2, -1)

    def __len__(self) -> int:
        return len(self.primitives)


def check_graph(graph) -> None:
    """Checks that something is a graph.

    Raises:
      TypeError: it is not.
    """
    if not all(hasattr(graph, name) for name in ("primitives", "edges", "param_shapes")):
        raise TypeError(
            f"the graph is {what_is(graph)}; allowed: a Graph, as build_graph makes it of an "
            "architecture and model_graph of a Flax model"
        )


class _GraphBuilder:
    """Expands a wiring's operations to nodes and follows tensors to the nodes that make them.

    A row of `rows` is a node: primitive, name, shape, cell and the nodes that it reads.
    """

    def __init__(self, wiring: Wiring):
        self.wiring = wiring
        self.rows: list[tuple[str, str, tuple[int, ...] | None, int, list[int]]] = []
        self.writers: dict[int, list[int]] = {}  # state -> positions of operations
        self.expansions = [
            piece_nodes(operation_pieces(op, wiring.states), wiring.norm)
            for op in wiring.operations
        ]
        for i, op in enumerate(wiring.operations):
            self.writers.setdefault(op.output, []).append(i)
        self.output_of: list[int] = []  # position of an operation -> its last node
        self.node_of: dict[int, int] = {}  # state -> node
        self.concat_of: dict[tuple, int] = {}  # feature -> node

    def join(self, primitive: str, sources: list[int]) -> int:
        """Adds a node without parameters where several meet.

        As in the official files, a node without a name counts to the cell of what it reads.
        """
        rows = self.rows
        rows.append((primitive, "", None, max([rows[s][3] for s in sources], default=0), sources))
        return len(rows) - 1

    def expand(self, nodes: tuple[Node, ...], prefix: str, cell: int, source: int) -> int:
        """Adds an operation's nodes; returns the last, or `source` if there are none."""
        rows = self.rows
        first = len(rows)
        for primitive, name, shape, sources in nodes:
            inputs = [source if s < 0 else first + s for s in sources]
            if not name:
                rows.append((primitive, "", shape, max([rows[s][3] for s in inputs]), inputs))
            elif name[0] == ".":
                rows.append((primitive, prefix + name, shape, cell, inputs))
            else:
                rows.append((primitive, name, shape, cell, inputs))
        return len(rows) - 1 if nodes else source

    def _tensor(self, state: int) -> int:
        """What a state is before sums are removed; an identity is the tensor that it passes on."""
        writers = self.writers.get(state, ())
        if len(writers) == 1 and not self.expansions[writers[0]]:
            return self._passed_on(writers[0])
        return state

    def _passed_on(self, identity: int) -> int:
        """The tensor that an operation without nodes passes on."""
        state = self.wiring.operations[identity].inputs[0]
        assert state is not None  # only features of several parts have zeros in them
        return self._tensor(state)

    def state(self, state: int) -> int:
        """The node that a state is read from; a `sum` where two tensors meet."""
        node = self.node_of.get(state)
        if node is None:
            writers = self.writers[state]
            node = self.output_of[writers[0]]
            if len(writers) > 1:
                # Two identities of one tensor add it to itself: one edge comes in, so no node.
                tensors = {
                    ("operation", i) if self.expansions[i] else self._passed_on(i) for i in writers
                }
                if len(tensors) > 1:
                    node = self.join("sum", [self.output_of[i] for i in writers])
            self.node_of[state] = node
        return node

    def feature(self, feature) -> int:
        """The node that a feature is read from; a `concat` where two nodes or more meet."""
        if len(feature) == 1:
            return self.state(feature[0])
        node = self.concat_of.get(feature)
        if node is None:
            sources = {self.state(s) for s in feature if s is not None}
            node = self.join("concat", list(sources)) if len(sources) > 1 else sources.pop()
            self.concat_of[feature] = node
        return node

    def build(self) -> list:
        wiring = self.wiring
        self.node_of[IMAGE] = self.join("input", [])
        read = {op.inputs for op in wiring.operations}
        cell = 0
        for op, nodes in zip(wiring.operations, self.expansions, strict=True):
            if op.cell != cell:
                # Joins at a cell's end come before the next cell's nodes, as in the official files.
                if wiring.outputs[cell] in read:
                    self.feature(wiring.outputs[cell])
                cell = op.cell
            last = self.expand(nodes, op.name, op.cell, self.feature(op.inputs))
            self.output_of.append(last)
        head = wiring.head
        last_cell = wiring.arch.n_cells - 1
        nodes = piece_nodes((classifier_piece(head),), wiring.norm)
        self.expand(nodes, "", last_cell, self.feature(head.feature))
        return self.rows


def shortest_paths(sources: list[list[int]], cutoff: int) -> np.ndarray:
    """(M, 3) pairs of nodes and the length of the shortest path between them, up to a length.

    Args:
      sources: for each node those that it reads, all of them before it.
      cutoff: the longest path listed.
    """
    n = len(sources)
    distance = np.full((n, n), np.iinfo(np.int16).max // 2, np.int16)
    one = np.ones(n, np.int16)  # adding an array is faster than a scalar
    rows = list(distance)
    # In topological order every source is finished. Far grows by at most n on its way.
    for node, from_ in enumerate(sources):
        row = rows[node]
        if from_:
            nearest = rows[from_[0]]
            for other in from_[1:]:
                nearest = np.minimum(nearest, rows[other])
            np.add(nearest, one, row)
        row[node] = 0
    lengths = np.ascontiguousarray(distance.T)
    listed = (lengths - one).view(np.uint16) < min(cutoff, n)  # 0 - 1 is 65,535
    edges = np.empty((np.count_nonzero(listed), 3), np.int32)
    # Masking broadcast indices takes half the time of `np.nonzero`.
    index = np.arange(n, dtype=np.int32)
    edges[:, 0] = np.broadcast_to(index[:, None], (n, n))[listed]
    edges[:, 1] = np.broadcast_to(index, (n, n))[listed]
    edges[:, 2] = lengths[listed]
    return edges


def count_nodes(wiring: Wiring) -> int:
    """Nodes of an architecture's computational graph, without the paths between them."""
    return len(_GraphBuilder(wiring).build())


def build_graph(
    arch: Architecture,
    virtual_edges: int = 50,
    *,
    num_classes: int = 10,
    image_size: int = 32,
) -> Graph:
    """Builds the computational graph of an architecture (§ 3).

    Args:
      arch: the architecture.
      virtual_edges: s^(max) of Eq. 4: nodes are joined along shortest paths up to this length; 1
        gives the real edges only.
      num_classes, image_size: of the network; they set the shapes of the classifier, and the stem
        where images are larger than 96 pixels.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: an argument is out of range, or the graph has more than 10,000 nodes.
    """
    if virtual_edges < 1:
        raise ValueError(f"virtual_edges is {virtual_edges}; allowed: 1 (real edges only) or more")
    rows = _GraphBuilder(wire(arch, Task(num_classes, image_size))).build()
    if len(rows) > MAX_GRAPH_NODES:
        raise ValueError(
            f"the architecture's graph has {len(rows)} nodes; allowed: up to {MAX_GRAPH_NODES}, as "
            "the paths between all of them are listed; use fewer cells or operations"
        )
    primitives, names, shapes, cells, reads = zip(*rows, strict=True)
    sources: list[list[int]] = list(reads)
    if sorted(cells) != list(cells):
        # Cells contiguous, as in the official files.
        order = sorted(range(len(rows)), key=cells.__getitem__)
        place = {old: new for new, old in enumerate(order)}
        primitives, names, shapes, cells, reads = zip(*[rows[i] for i in order], strict=True)
        sources = [[place[s] for s in read] for read in reads]
    return Graph(
        primitives=np.array([PRIMITIVE_ID[p] for p in primitives], np.int32),
        edges=shortest_paths(sources, virtual_edges),
        param_shapes=list(shapes),
        names=[name or p for name, p in zip(names, primitives, strict=True)],
        cells=np.array(cells, np.int32),
    )
