"""What is found out about a model while it is read: rows, and what becomes of its parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ghn_jax.tracing.abstract_values import (
    BATCH,
    CHANNEL,
    SPACE,
    UNKNOWN,
    Activation,
    Key,
    Parameter,
    Value,
)
from ghn_jax.tracing.flow import THROUGH, Flow


class Placement(NamedTuple):
    """Where a node's tensor goes: `model_graph.place` puts it there.

    Attributes:
      node: of the graph.
      tensor: which of the node's tensors: 'kernel', 'embedding', 'scale' or 'bias'.
      roles: of each of the parameter's axes: 'h', 'w', 'i' (in) or 'o' (out) in a kernel or a
        vector, 's' (position) or 'c' (channel) in an embedding, '' for an axis of size 1.
      skip: positions of an embedding before the grid (class tokens), which the node does not make.
      part: of a parameter that layers are stacked in: (axis, index) for each axis of the stack.
    """

    node: int
    tensor: str
    roles: tuple[str, ...]
    skip: int = 0
    part: tuple[tuple[int, int], ...] = ()


def module_of(where: str, parameter: str) -> str:
    """Where an equation is; NNX modules do not say so, but the names of their parameters do."""
    return where or parameter.rpartition("/")[0]


def said_of(where: str) -> str:
    """A module, as reasons name it."""
    return f"in {where}" if where else "in the model"


class Findings:
    """Rows of a `Flow`, placements and reasons of parameters, notes.

    Attributes:
      flow: the rows so far.
      names, shapes: of the parameters.
      roles: parameter -> its placement by each row that uses it, in order; `node` is the row.
      reasons: parameter -> why no node makes it.
      tokens: parameters that are concatenated to activations, or multiplied with parameters.
      products: rows of products of activations that are no part of attention so far -> where.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]):
        self.flow = Flow()
        self.names, self.shapes = names, shapes
        self.roles: dict[int, list[Placement]] = {}
        self.reasons: dict[int, str] = {}
        self.tokens: set[int] = set()
        self.products: dict[int, str] = {}
        self._notes: dict[str, dict[str, None]] = {}

    # --- What is told ---

    def note(self, text: str, where: str = "") -> None:
        """Tells the user something; `{}` in the text is where, a module or a parameter."""
        self._notes.setdefault(text, {})[where or "the model"] = None

    def notes(self) -> tuple[str, ...]:
        """What was told: a line for each kind, with a count."""
        lines = []
        for text, places in self._notes.items():
            first = ", ".join([*places][:2]) + (", ..." if len(places) > 2 else "")
            times = f"{len(places)} times: " if len(places) > 1 else ""
            lines.append(times + text.replace("{}", first))
        return tuple(lines)

    # --- Parameters ---

    def name_of(self, key: Key) -> str:
        """'layers/conv/kernel', or 'layers/conv/kernel[3]' of the fourth in a stack."""
        leaf, part = key
        return self.names[leaf] + "".join(f"[{index}]" for _, index in part)

    def shape_of(self, key: Key) -> tuple[int, ...]:
        """The shape of a parameter, or of one in a stack, whose axes have size 1."""
        leaf, part = key
        stacked = dict(part)
        return tuple(1 if axis in stacked else n for axis, n in enumerate(self.shapes[leaf]))

    def rank(self, p: Parameter) -> int:
        """Axes of a parameter, without those of a stack that it is taken from."""
        return len(self.shapes[p.leaf]) - len(p.part)

    def leave(self, p: Parameter, reason: str) -> None:
        """No node makes this parameter, unless another use of it does."""
        self.reasons.setdefault(p.leaf, reason)
        self.leave_others(p)

    def leave_others(self, p: Parameter) -> None:
        """Of parameters that are combined, a node makes one at most."""
        for leaf, _ in p.others:
            if leaf != p.leaf:
                why = f"combined with {self.name_of(p.key)} before it is used"
                self.reasons.setdefault(leaf, why)

    def place(self, p: Parameter, row: int, tensor: str, roles: dict, skip: int = 0) -> bool:
        """Notes that a row makes a parameter.

        Args:
          p: the parameter.
          row: its row.
          tensor: see `Placement`.
          roles: axis of the parameter -> role.
          skip: see `Placement`.

        Returns:
          Whether it can.
        """
        self.leave_others(p)
        shape = self.shape_of(p.key)
        if p.changed:
            self.leave(p, f"the model applies {p.changed} to it before it is used")
            return False
        missing = [axis for axis, n in enumerate(shape) if n > 1 and axis not in roles]
        if missing:
            self.leave(p, f"only a part of it is used at a time (axis {missing[0]})")
            return False
        axes = tuple(roles.get(axis, "") if n > 1 else "" for axis, n in enumerate(shape))
        self.roles.setdefault(p.leaf, []).append(Placement(row, tensor, axes, skip, p.part))
        return True

    def weight(self, p: Parameter, primitive: str, source: int, axes: dict, where: str) -> int:
        """Adds the row of a kernel.

        Args:
          p: the parameter.
          primitive: 'conv', 'sep_conv' or 'dil_conv'.
          source: the row that it reads.
          axes: role -> the axes of the value `p` that have it, for each dimension of PyTorch's
            shape.
          where: the module.
        """
        full = self.shapes[p.leaf]
        roles, sizes = {}, []
        for role, at in axes.items():
            atoms = [atom for axis in at for atom in p.axes[axis]]
            mine = {label: role for label, n in atoms if n > 1 and label != UNKNOWN}
            # Of a tensor used in parts, the shape is the whole one's.
            whole = len(mine) == sum(n > 1 for _, n in atoms)
            sizes.append(
                math.prod(full[a] for a in mine) if whole else math.prod(n for _, n in atoms)
            )
            roles |= mine
        if p.rescaled and not p.changed:
            self.note(
                "the model rescales {} before it is used (weight or spectral norm, "
                "standardisation)",
                self.names[p.leaf],
            )
        row = self.flow.add(
            primitive, [source], shape=tuple(sizes), name=self.name_of(p.key), weight=p.key
        )
        self.place(p, row, "kernel", roles)
        return row

    def weights(self, p: Parameter, axis: int, lanes: int, *row) -> int:
        """As `weight`, of the kernels of layers side by side: the row that stands for them all.

        Args:
          p: their parameter.
          axis: of it, along which they are stacked, before what else lies there.
          lanes: how many there are.
          *row: see `weight`.
        """
        primitive, source, axes, where = row
        if lanes == 1:
            return self.weight(p, *row)
        shape = self.shapes[p.leaf]
        layers = [p.at(axis, i, shape, atoms=1) for i in range(lanes)]
        sources = self.flow.lanes_of(source, lanes)
        return self.flow.abreast(
            [
                self.weight(layer, primitive, s, axes, where)
                for layer, s in zip(layers, sources, strict=True)
            ]
        )

    def forget_tokens(self) -> None:
        """Leaves class tokens that something is added to, as a residual does: they are no biases.

        A layer's bias that meets parameters alone as well (the layer is applied to zeros, or to a
        learned query) stays one.
        """
        tokens = self.tokens & self.roles.keys() & self.reasons.keys()
        for row in self.flow.rows:
            if row.primitive == "bias" and row.weight and row.weight[0] in tokens:
                self.roles.pop(row.weight[0], None)
                row.primitive, row.shape = THROUGH, None

    def tell_products(self) -> None:
        """Notes products of activations that turned out to be no attention's scores."""
        for where in self.products.values():
            self.note(
                "a product of activations in {} is no attention; edges pass through it", where
            )

    # --- Values ---

    def activation(self, value: Value) -> Activation:
        """A value as the input of a layer. A statistic over positions is a `glob_avg` node."""
        if isinstance(value, Activation):
            return value
        gone = value.scope.reduced - value.scope.kept
        if SPACE in value.scope.reduced and not gone & {BATCH, CHANNEL, UNKNOWN}:
            if SPACE in value.scope.kept:
                self.note("average pooling to a fixed size is taken for a global one")
            if value.other:
                self.note(f"global pooling by {value.other} is taken for an average (glob_avg)")
            return Activation(self.flow.join("glob_avg", [value.row]), value.axes)
        return Activation(value.row, value.axes)
