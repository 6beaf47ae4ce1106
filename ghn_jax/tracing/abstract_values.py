"""What a value of a traced model comes from, and what is laid out along its axes.

`jaxpr_graph` interprets a model with these in place of arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# The axes of a value: for each the (label, size) of what is laid out along it, major first. Labels
# of activations are BATCH, SPACE, CHANNEL, LANE (layers side by side, of `vmap`) or UNKNOWN, of
# parameters the axis of the tensor.
BATCH, SPACE, CHANNEL, LANE, UNKNOWN = "bscl?"
_REPEATED = "="  # while a value is reshaped: along it, all is the same
Axes = tuple[tuple[tuple[Any, int], ...], ...]

# A parameter, or a part of one that layers are stacked in: its number, and (axis, index) of each
# axis that layers are stacked along.
Key = tuple[int, tuple[tuple[int, int], ...]]


class Scope(NamedTuple):
    """What a statistic is taken over, and what it still depends on: labels of axes."""

    reduced: frozenset[str]
    kept: frozenset[str]

    def __or__(self, other):
        return Scope(self.reduced | other.reduced, self.kept | other.kept)

    def beyond(self, other: Scope) -> Scope:
        """Of a statistic of reduced values: what it is taken over in addition."""
        return Scope(self.reduced - other.reduced, self.kept)


RUNNING = Scope(frozenset((BATCH, SPACE)), frozenset(CHANNEL))  # of running averages


@dataclasses.dataclass(frozen=True)
class Constant:
    """Neither from the input nor from parameters.

    Attributes:
      state: from the model's other variables.
      value: of integers, such as the number of a loop's turn; None where it is not known.
    """

    state: bool = False
    value: np.ndarray | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as it is, or reshaped, transposed, sliced, scaled.

    Attributes:
      leaf: which one.
      axes: what of it lies along the axes.
      part: of a stack; see `Key`.
      others: parameters that it was combined with.
      scope: of the statistic that it was multiplied with: a norm's weight.
      changed: an operation after which the tensor's values are no weights any more.
      rescaled: by a number or by factors, its own norm or other parameters.
    """

    leaf: int
    axes: Axes
    part: tuple[tuple[int, int], ...] = ()
    others: frozenset[Key] = frozenset()
    scope: Scope | None = None
    changed: str = ""
    rescaled: bool = False

    @property
    def key(self) -> Key:
        """Which parameter, and which part of it."""
        return self.leaf, self.part

    def at(self, axis: int, index: int | None, shape: Sequence[int], atoms: int | None = None):
        """One of the layers that are stacked along an axis, which gets size 1.

        Args:
          axis: of this value.
          index: of the layer; None where it is not known.
          shape: of the parameter.
          atoms: how many of what lies along the axis is stacked; None for all.
        """
        stacked, kept = self.axes[axis][:atoms], self.axes[axis][len(self.axes[axis][:atoms]) :]
        part = dict(self.part)
        axes = (*self.axes[:axis], kept, *self.axes[axis + 1 :])
        for label, n in reversed(stacked):
            if n == 1:
                continue
            if index is None or not isinstance(label, int) or shape[label] != n:
                return dataclasses.replace(self, axes=axes)  # a part, but which is not known
            index, part[label] = divmod(index, n)
        return dataclasses.replace(self, axes=axes, part=tuple(sorted(part.items())))


@dataclasses.dataclass(frozen=True)
class Activation:
    """The output of a row, or a function of it.

    Attributes:
      row: of the flow.
      axes: see `Axes`.
      scope: of the statistic that it was divided by, as in a norm.
      fresh: nothing but reshaping has happened since the row was added.
    """

    row: int
    axes: Axes
    scope: Scope | None = None
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A row's output reduced over some axes.

    Attributes:
      row, axes, scope: see `Activation` and `Scope`.
      other: by what, and where, unless it is a sum.
      deviation: a root or a quotient, as the deviation or the length that norms divide by.
      gate: a sigmoid or the like, which no norm divides by.
    """

    row: int
    axes: Axes
    scope: Scope
    other: str = ""
    deviation: bool = False
    gate: bool = False


Value = Constant | Parameter | Activation | Statistic


def regroup(axes: Sequence, shape: Sequence[int]) -> Axes:
    """The axes of a reshaped value."""
    atoms = [atom for axis in axes for atom in axis][::-1]
    result = []
    for size in shape:
        group, have = [], 1
        while have < size and atoms:
            label, n = atoms.pop()
            if n == 1 and label == SPACE:  # of an image of one pixel: nothing lies along it
                continue
            if size % (have * n):  # the atom is split
                part = size // have
                if part == 0 or n % part:
                    return unknown_axes(shape)
                atoms.append((label, n // part))
                n = part
            group.append((label, n))
            have *= n
        if size == 1 and atoms and atoms[-1][1] == 1:
            group.append(atoms.pop())
        if have != size:
            return unknown_axes(shape)
        result.append(tuple(group))
    return tuple(result)


def regroup_repeated(axes: Sequence, before: Sequence[int], shape: Sequence[int]) -> Axes:
    """As `regroup`, of a value that may be the same along some axes (it was broadcast).

    What is repeated next to something lies along its axis: it is the same, laid out larger.

    Args:
      axes, before: of the value that is reshaped, and its shape.
      shape: the new one.
    """
    repeated = [
        axis or (((_REPEATED, n),) if n > 1 else ()) for axis, n in zip(axes, before, strict=True)
    ]
    return tuple(_absorbed(group) for group in regroup(repeated, shape))


def _absorbed(group) -> tuple[tuple[Any, int], ...]:
    """What lies along an axis, with repetitions as a part of their neighbours."""
    found: list[tuple[Any, int]] = []
    ahead = 1  # repetitions before all else
    for label, n in group:
        if label != _REPEATED:
            found.append((label, n * ahead))
            ahead = 1
        elif found:
            found[-1] = (found[-1][0], found[-1][1] * n)
        else:
            ahead *= n
    return tuple(found)


def unknown_axes(shape: Sequence[int]) -> Axes:
    """Axes of which nothing is known but their sizes."""
    return tuple(((UNKNOWN, size),) for size in shape)


def resize(axes: Sequence, shape: Sequence[int]) -> Axes:
    """The axes of a value of which each axis was cut, padded or repeated."""
    return tuple(
        axis
        if math.prod(n for _, n in axis) == size
        else tuple((label, size) for label, _ in axis[:1])
        for axis, size in zip(axes, shape, strict=True)
    )


def drop(axes: Axes, axis: int) -> Axes:
    """All axes but one."""
    return (*axes[:axis], *axes[axis + 1 :])


def merge(axes: Sequence[Axes], shape: Sequence[int]) -> Axes:
    """The axes of an elementwise function of values that broadcast against each other."""
    result = []
    for i, size in enumerate(shape):
        groups = [a[i] for a in axes if len(a) == len(shape) and a[i]]
        fitting = [g for g in groups if math.prod(n for _, n in g) == size]
        result.append((fitting or [()])[0])
    return tuple(result)


def labels_of(axes: Axes) -> frozenset[str]:
    """Labels of what varies along some axes (the batch may be of size 1)."""
    return frozenset(label for axis in axes for label, n in axis if n > 1 or label == BATCH)


def image_axes(shape: Sequence[int]) -> Axes:
    """The axes of an input: the batch first, channels last."""
    labels = [BATCH, *[SPACE] * (len(shape) - 2), CHANNEL][: len(shape)]
    return tuple(((label, size),) for label, size in zip(labels, shape, strict=True))


def spatial_axes(spec: Sequence[int], shape) -> Axes:
    """The axes of a convolution's output: spec lists those of batch, channels and space."""
    labels = {spec[0]: BATCH, spec[1]: CHANNEL}
    return tuple(((labels.get(i, SPACE), n),) for i, n in enumerate(shape))


def product_axes(a: Value, b: Value, contract, batch, shape) -> Axes:
    """The axes of dot_general's output: batch, free axes of the left, of the right.

    Of a constant, the free axis lies where the axis was that it contracts, as in a resize.
    """
    parts: list[tuple] = []
    known = [getattr(x, "axes", None) for x in (a, b)]
    reference = 0 if known[0] is not None else 1
    parts += [known[reference][i] for i in batch[reference]]
    for x, side in zip(known, (0, 1), strict=True):
        if x is None:
            (other,) = [y for y in known if y is not None]
            free = len(shape) - len(other) + len(contract[side])
            mapped = [other[i][:1] for i in contract[1 - side]]
            parts += mapped if free == len(mapped) == 1 else [((UNKNOWN, 1),)] * free
            continue
        used = {*contract[side], *batch[side]}
        parts += [axis for i, axis in enumerate(x) if i not in used]
    if len(parts) != len(shape):
        return unknown_axes(shape)
    return resize(tuple(parts), shape)


def looked_up_axes(axes: Axes, numbers, sizes: Sequence[int], shape) -> Axes:
    """The axes of a gather's output: rows of one axis (or slices), in the places of the indices."""
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    if len(gone) != 1 or len(numbers.offset_dims) != len(axes) - 1:
        return resize(axes, shape) if len(axes) == len(shape) else unknown_axes(shape)
    at = [i for i in range(len(shape)) if i not in numbers.offset_dims]
    places = [shape[i] for i in at]
    (row,) = resize((axes[gone[0]],), [math.prod(places)])
    found = dict(zip(at, regroup((row,), places), strict=True))
    rest = [i for i in range(len(axes)) if i not in gone]
    kept = resize([axes[i] for i in rest], [sizes[i] for i in rest])
    found |= zip(numbers.offset_dims, kept, strict=True)
    return tuple(found[i] for i in range(len(shape)))


# --- Integers that are known while a model is traced: which layer of a stack is used --------------

_FOLDED = {
    "add": lambda a, b, **_: a + b,
    "sub": lambda a, b, **_: a - b,
    "mul": lambda a, b, **_: a * b,
    "rem": lambda a, b, **_: np.fmod(a, b),
    "neg": lambda a, **_: -a,
    "min": lambda a, b, **_: np.minimum(a, b),
    "max": lambda a, b, **_: np.maximum(a, b),
    "clamp": lambda low, a, high, **_: np.clip(a, low, high),
    "lt": lambda a, b, **_: a < b,
    "le": lambda a, b, **_: a <= b,
    "gt": lambda a, b, **_: a > b,
    "ge": lambda a, b, **_: a >= b,
    "eq": lambda a, b, **_: a == b,
    "ne": lambda a, b, **_: a != b,
    "not": lambda a, **_: np.logical_not(a),
    "and": lambda a, b, **_: a & b,
    "or": lambda a, b, **_: a | b,
    "select_n": lambda which, *cases, **_: np.choose(which.astype(int), cases),
    "convert_element_type": lambda a, new_dtype, **_: a.astype(new_dtype),
    "reshape": lambda a, new_sizes, dimensions, **_: a.transpose(dimensions).reshape(new_sizes),
    "squeeze": lambda a, dimensions, **_: a.squeeze(tuple(dimensions)),
    "broadcast_in_dim": lambda a, shape, broadcast_dimensions, **_: np.broadcast_to(
        np.expand_dims(a, [i for i in range(len(shape)) if i not in broadcast_dimensions]), shape
    ),
    "iota": lambda dtype, shape, dimension, **_: np.broadcast_to(
        np.expand_dims(
            np.arange(shape[dimension], dtype=dtype),
            [i for i in range(len(shape)) if i != dimension],
        ),
        shape,
    ),
}
_LARGEST_FOLDED = 4096


def fold(name: str, operands: Sequence[Constant], params: dict, aval) -> Constant:
    """The value of a function of constants, where it is made of integers."""
    state = any(x.state for x in operands)
    known = [x.value for x in operands if x.value is not None]
    small = math.prod(getattr(aval, "shape", ())) <= _LARGEST_FOLDED
    if name not in _FOLDED or len(known) < len(operands) or not small or not is_integer(aval):
        return Constant(state)
    return Constant(state, np.asarray(_FOLDED[name](*known, **params)))


def is_integer(aval) -> bool:
    """Whether a value is of integers or Booleans."""
    return getattr(getattr(aval, "dtype", None), "kind", "") in ("i", "u", "b")
