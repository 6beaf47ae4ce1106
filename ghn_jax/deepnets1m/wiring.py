"""How the cells of an architecture connect: the one description that the rest is built from.

`wire(arch)` follows the design space (paper Appendix A.1) once and lists the operations that lie on
a path from the images to the logits, with their channels, strides and the tensors they read. The
graph (`graph.py`), the Flax network (`network.py`), the engine's steps (`engine/plan.py`) and the
counts of FLOPs all read this list; what its operations are is in `operations.py`.

Tensors are numbered *states*. A state with two operations writing to it is their sum. A *feature*
is a tuple of states that stands for their concatenation along channels; `None` in it is an all-zero
part (a node whose edges are all `none`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from ghn_jax.deepnets1m.architecture import Architecture, Edge
from ghn_jax.deepnets1m.task import Task
from ghn_jax.files.messages import what_is

State = int
Feature = tuple[State | None, ...]


class DisconnectedError(ValueError):
    """No path leads from the images to the logits: every edge to the output is `none`."""


class Operation(NamedTuple):
    """One operation of the network.

    Attributes:
      kind: 'stem_conv', 'stem_imagenet', 'stem_reduce', 'stem_vit', 'stem_pool', 'preprocess',
        'factorized_reduce', 'subsample', or an operation of `architecture.OPERATIONS`.
      name: the official module name, e.g. 'cells.0._ops.1' ('' where there is no module).
      cell: index of the cell that the graph counts it to.
      inputs: the feature it reads; more than one part only for 'preprocess' and
        'factorized_reduce', whose 1x1 convolutions mix the parts.
      output: the state it writes (adds) to.
      in_channels, out_channels: of the whole input feature and of the whole output.
      stride: 1 or 2 (4, 8 or 16 for stems of large images).
      kernel: size of the (first) kernel where `kind` leaves it open, else 0.
    """

    kind: str
    name: str
    cell: int
    inputs: Feature
    output: State
    in_channels: int
    out_channels: int
    stride: int = 1
    kernel: int = 0


class StateInfo(NamedTuple):
    """Channels and height (= width, in pixels) of a state."""

    channels: int
    size: int


@dataclasses.dataclass(frozen=True)
class Head:
    """The classifier: its input and the sizes of its fully connected layers.

    Attributes:
      feature: the last cell's output.
      glob_avg: whether it is averaged over positions; else flattened in (channel, row, column)
        order.
      dims: sizes of the fully connected layers, input first: (in, [hidden, ...], classes).
    """

    feature: Feature
    glob_avg: bool
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Wiring:
    """A network as a list of operations in execution order; see the module's docstring."""

    arch: Architecture
    task: Task
    operations: tuple[Operation, ...]
    states: tuple[StateInfo, ...]
    outputs: tuple[Feature | None, ...]  # each cell's output feature
    head: Head

    @property
    def norm(self) -> bool:
        """Whether convolutions are followed by batch norm."""
        return self.arch.norm is not None


IMAGE: State = 0  # the state that holds the input images


def classifier_dims(arch: Architecture, channels: int, size: int, task: Task) -> tuple[int, ...]:
    """`Head.dims` for a last cell's output of some channels and height."""
    width = channels if arch.glob_avg else channels * size**2
    hidden = (arch.fc_dim,) * (max(arch.fc_layers, 1) - 1)
    return (width, *hidden, task.num_classes)


class Builder:
    """Follows an architecture from its stem to its last cell."""

    def __init__(self, arch: Architecture, task: Task):
        if not isinstance(arch, Architecture):
            raise TypeError(
                f"the architecture is {what_is(arch)}; allowed: an Architecture, as "
                "sample_architecture and evaluation_set give it (for a Flax model there is "
                "predict_model)"
            )
        self.arch, self.task = arch, task
        self.operations: list[Operation] = []
        self.states = [StateInfo(3, task.image_size)]
        self.outputs: list[Feature | None] = []

    def state(self, channels: int, size: int) -> State:
        """A new state."""
        self.states.append(StateInfo(channels, size))
        return len(self.states) - 1

    def part(self, feature: Feature) -> StateInfo:
        """Of any part of a feature: all are alike."""
        for state in feature:
            if state is not None:
                return self.states[state]
        raise AssertionError("a feature without parts is None")

    def add(self, kind, name, cell, inputs, output, out_channels, stride=1, kernel=0) -> None:
        """Lists an operation."""
        in_channels = self.part(inputs).channels * len(inputs)
        self.operations.append(
            Operation(kind, name, cell, inputs, output, in_channels, out_channels, stride, kernel)
        )

    def stem(self) -> tuple[Feature, Feature]:
        """The stem (Appendix A.1): returns the two inputs of the first cell."""
        arch, image = self.arch, self.states[IMAGE].size
        if arch.has_attention:
            stride, padding = (16, 0) if self.task.large else (3, 1)
            size = (image + 2 * padding - stride) // stride + 1
            out = self.state(arch.C, size)
            self.add("stem_vit", "stem0", 0, (IMAGE,), out, arch.C, stride=stride, kernel=stride)
            return (out,), (out,)
        if arch.stem_type == 0:
            channels = arch.C * (3 if arch.preproc and not self.task.large else 1)
            stride = 4 if self.task.large else 1
            size = -(-image // stride)
            out = self.state(channels, size)
            self.add(
                "stem_conv", "stem.0", 0, (IMAGE,), out, channels, stride=stride, kernel=arch.ks
            )
            if arch.stem_pool:
                pooled = self.state(channels, -(-size // 2))
                self.add("stem_pool", "", 0, (out,), pooled, channels, stride=2)
                out = pooled
            return (out,), (out,)
        stride = 4 if self.task.large else 1
        size = -(-image // stride)
        first = self.state(arch.C, size)
        second = self.state(arch.C, -(-size // 2))
        self.add(
            "stem_imagenet", "stem0", 0, (IMAGE,), first, arch.C, stride=stride, kernel=arch.ks
        )
        self.add("stem_reduce", "stem1", 0, (first,), second, arch.C, stride=2)
        return (first,), (second,)

    def preprocess(
        self, feature: Feature | None, name: str, cell: int, channels: int, halve: bool
    ) -> State | None:
        """Brings a cell's input to the cell's channels and, if `halve`, to half the resolution."""
        if feature is None:
            return None
        if not self.arch.preproc and not halve:
            return feature[0]
        size = self.part(feature).size
        out = self.state(channels, -(-size // 2) if halve else size)
        if not self.arch.preproc:
            kind, name = "subsample", ""
        else:
            kind = "factorized_reduce" if halve else "preprocess"
        self.add(kind, name, cell, feature, out, channels, 2 if halve else 1)
        return out

    def cell(
        self, i: int, inputs: tuple[Feature | None, Feature | None], channels: int, halve: bool
    ) -> None:
        """Cell i; `halve` where its first input has twice the resolution of its second."""
        arch = self.arch
        reduction = arch.is_reduction(i)
        genotype = arch.genotype
        edges = genotype.reduce if reduction else genotype.normal
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        strided = reduction and not arch.has_attention
        states: list[State | None] = [
            self.preprocess(inputs[0], f"cells.{i}.preprocess0", i, channels, halve),
            self.preprocess(inputs[1], f"cells.{i}.preprocess1", i, channels, False),
        ]
        for node in range(len(edges) // 2):
            out = None
            for j in (2 * node, 2 * node + 1):
                kind, source = edges[j]
                read = states[source]
                if read is None or kind == "none":
                    continue
                stride = 2 if strided and source < 2 else 1
                if out is None:
                    out = self.state(channels, -(-self.states[read].size // stride))
                if kind == "skip_connect" and stride == 2:
                    kind = "factorized_reduce"
                name = f"cells.{i}._ops.{j}"
                self.add(kind, name, i, (read,), out, channels, stride)
            states.append(out)
        feature = tuple(states[s] for s in concat)
        self.outputs.append(feature if any(s is not None for s in feature) else None)

    def build(self) -> Wiring:
        """The whole network."""
        arch = self.arch
        inputs: tuple[Feature | None, Feature | None] = self.stem()
        channels = arch.C
        halve = arch.stem_type == 1
        for i in range(arch.n_cells):
            if arch.is_reduction(i):
                channels *= arch.C_mult
            self.cell(i, inputs, channels, halve and not arch.has_attention)
            inputs = inputs[1], self.outputs[-1]
            halve = arch.is_reduction(i)
        last = inputs[1]
        if last is None:
            raise DisconnectedError(
                "the architecture's graph is disconnected: no path of operations other than "
                "'none' leads from the images to the classifier; choose another genotype"
            )
        dims = classifier_dims(arch, channels * len(last), self.part(last).size, self.task)
        head = Head(last, arch.glob_avg, dims)
        operations = _live(self.operations, last)
        return Wiring(
            arch, self.task, tuple(operations), tuple(self.states), tuple(self.outputs), head
        )  # fmt: skip


def _live(operations: list[Operation], output: Feature) -> list[Operation]:
    """The operations that the output depends on: only their parameters exist and are predicted."""
    needed = {s for s in output if s is not None}
    live = []
    for op in reversed(operations):
        if op.output in needed:
            live.append(op)
            needed.update(s for s in op.inputs if s is not None)
    return live[::-1]


def _passes(edges: tuple[Edge, ...], concat: tuple[int, ...], *inputs: bool) -> bool:
    """Whether a cell's output depends on anything, given which of its inputs do."""
    states = list(inputs)
    for first, second in zip(edges[::2], edges[1::2], strict=True):
        states.append(any(kind != "none" and states[source] for kind, source in (first, second)))
    return any(states[s] for s in concat)


def is_connected(arch: Architecture) -> bool:
    """Whether a path of operations other than `none` leads from the images to the logits."""
    genotype = arch.genotype
    if "none" not in genotype.operations:
        return True
    passes = functools.cache(
        lambda reduction, *inputs: (
            _passes(genotype.reduce, genotype.reduce_concat, *inputs)
            if reduction
            else _passes(genotype.normal, genotype.normal_concat, *inputs)
        )
    )
    before = last = True
    for i in range(arch.n_cells):
        before, last = last, passes(arch.is_reduction(i), before, last)
    return last


def wire(arch: Architecture, task: Task | None = None) -> Wiring:
    """Lists the operations of an architecture, in execution order.

    Args:
      arch: the architecture.
      task: what the network is for; 10 classes of 32x32 images if not given.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: the number of classes or the size of images is out of range.
    """
    return Builder(arch, (task or Task()).check()).build()
