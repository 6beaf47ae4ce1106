"""What became of each parameter of a model: `predict`'s report."""

from __future__ import annotations

import dataclasses
import math

from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph
from ghn_jax.hypernet.decoder import nearest_shape
from ghn_jax.hypernet.tiling import tile_kind

INITIAL = "initial"
# How the note begins of what is left because of its initial value.
CONSTANT = "on purpose, the model fills it with"


@dataclasses.dataclass(frozen=True)
class ParameterReport:
    """One parameter.

    Attributes:
      path: in the model, 'layer1_0/conv1/kernel'.
      shape: in the model.
      node_shape: of the node that makes it, in PyTorch's order (out, in, height, width); () for
        none.
      primitive: of the node that makes it; '' for none.
      decoder: that makes it (`tiling.TileKind`); '' for none.
      how: 'decoded' (the tile as it is), 'sliced' (a part of the tile's channels), 'tiled 8x4' (its
        out and in channels repeated that often), or 'initial' (left at its initial value).
      note: why it was left, or what the shape encoder took the shape for.
      norm: its Frobenius norm; None while it is traced.
      he_norm: the norm to expect of He initialisation: sqrt(2 * size / fan in) for weights,
        sqrt(size) for norms' weights and encodings of positions, 0 for biases; None where none is
        defined.
    """

    path: str
    shape: tuple[int, ...]
    node_shape: tuple[int, ...]
    primitive: str
    decoder: str
    how: str
    note: str
    norm: float | None
    he_norm: float | None

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def is_kernel(self) -> bool:
        """Whether it is the predicted kernel of a layer other than the classifier."""
        return self.decoder in ("kernel", "depthwise")


@dataclasses.dataclass(frozen=True)
class PredictionReport:
    """What `predict` did; prints as a table.

    Attributes:
      parameters: one for each tensor, in the order of the model's tree.
      notes: what was mapped to the nearest primitive or to none, and where.
      nodes: of the computational graph.
    """

    parameters: tuple[ParameterReport, ...]
    notes: tuple[str, ...]
    nodes: int

    @property
    def left(self) -> tuple[ParameterReport, ...]:
        """Those left at their initial values."""
        return tuple(p for p in self.parameters if p.how == INITIAL)

    @property
    def predicted(self) -> tuple[ParameterReport, ...]:
        """Those predicted."""
        return tuple(p for p in self.parameters if p.how != INITIAL)

    def to_dict(self) -> dict:
        """As plain data, with totals."""
        return {
            **dataclasses.asdict(self),
            "predicted": sum(p.size for p in self.predicted),
            "left": sum(p.size for p in self.left),
        }

    def __str__(self) -> str:
        head = ("parameter", "shape", "node", "how", "norm", "/ He", "note")
        rows = [head]
        for p in self.parameters:
            norm = "" if p.norm is None else f"{p.norm:.3g}"
            ratio = f"{p.norm / p.he_norm:.2f}" if p.norm is not None and p.he_norm else ""
            shape = "x".join(map(str, p.shape)) or "()"
            rows.append((p.path, shape, p.primitive, p.how, norm, ratio, p.note))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        right = (4, 5)
        lines = []
        for row in rows:
            cells = [
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=False))
            ]
            lines.append("  ".join([*cells, row[-1]]).rstrip())
        predicted, left = (sum(p.size for p in g) for g in (self.predicted, self.left))
        lines.append(
            f"{self.nodes} nodes; predicted {predicted:,} values in {len(self.predicted)} tensors, "
            f"left {left:,} in {len(self.left)} at their initial values"
        )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def shape_of(graph: Graph, node: int) -> tuple[int, ...]:
    """The shape of the parameter that a node makes."""
    shape = graph.param_shapes[node]
    assert shape is not None
    return shape


def how_made(graph: Graph, node: int, max_shape: tuple[int, int, int, int]) -> str:
    """`ParameterReport.how` of what a node makes."""
    out, in_ = max_shape[:2]
    shape, kind = shape_of(graph, node), tile_kind(graph, node)
    assert kind is not None
    pairs = {
        "kernel": ((0, out), (1, in_)),
        "depthwise": ((0, out),),
        "position": ((1, in_),),
        "classifier": ((1, in_),),
        "vector": ((0, max(out, in_)),),
        "classifier_bias": (),
    }[kind.decoder]
    have = [(shape[axis], tile) for axis, tile in pairs]
    repeats = [-(-size // tile) for size, tile in have]
    if max(repeats, default=1) > 1:
        return "tiled " + "x".join(map(str, repeats))
    return "sliced" if any(size < tile for size, tile in have) else "decoded"


def shape_note(shape: tuple[int, ...], num_classes: int, largest_kernel: int) -> str:
    """What the shape encoder takes a shape for, '' where it knows it."""
    out, in_, height, width = full = (*shape, 1, 1, 1)[:4]
    near = nearest_shape((out, in_, height, width), num_classes, largest_kernel)
    names = ("out", "in", "height", "width")
    off = [f"{n} {a} as {b}" for n, a, b in zip(names, full, near, strict=True) if a != b]
    return "encoded with " + ", ".join(off) if off else ""


def he_norm(graph: Graph, node: int, tensor: str) -> float:
    """`ParameterReport.he_norm` of what a node makes."""
    shape = shape_of(graph, node)
    size = math.prod(shape)
    if tensor == "kernel":
        return math.sqrt(2 * size / math.prod(shape[1:]))
    return 0.0 if tensor == "bias" else math.sqrt(size)


def primitive_of(graph: Graph, node: int) -> str:
    """A node's primitive by name."""
    return PRIMITIVES[graph.primitives[node]]
