"""How the cells of an architecture connect: the one description that the rest is built from.

`wire(arch)` follows the design space (paper Appendix A.1) once and lists the operations that lie on
a path from the images to the logits, with their channels, strides and the tensors they read. The
graph (`graph.py`), the Flax network (`network.py`), the executor's instructions
(`executor/program.py`) and the parameter counts all read this list.

Tensors are numbered *states*. A state with two operations writing to it is their sum. A *feature*
is a tuple of states that stands for their concatenation along channels; `None` in it is an all-zero
part (a node whose edges are all `none`).
"""

from __future__ import annotations

import dataclasses

from ghn_jax.architecture import Architecture

State = int
Feature = tuple[State | None, ...]


class DisconnectedError(ValueError):
    """No path leads from the images to the logits: every edge to the output is `none`."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the network.

    Attributes:
      kind: 'stem_conv', 'stem_imagenet', 'stem_reduce', 'stem_vit', 'stem_pool', 'preprocess',
        'factorized_reduce', 'subsample', or an operation of `architecture.OPERATIONS`.
      name: the official module name, e.g. 'cells.0._ops.1' ('' where there is no module).
      cell: index of the cell that the graph counts it to.
      inputs: the feature it reads; more than one part only for 'preprocess' and
        'factorized_reduce', whose 1x1 convolutions mix the parts.
      output: the states it writes (adds) to; several only for the stem, whose output may have
        more channels than the cells.
      in_channels, out_channels: of the whole input feature and of the whole output.
      stride: 1 or 2 (4, 8 or 16 for stems of large images).
      kernel: size of the (first) kernel where `kind` leaves it open, else 0.
    """

    kind: str
    name: str
    cell: int
    inputs: Feature
    output: tuple[State, ...]
    in_channels: int
    out_channels: int
    stride: int = 1
    kernel: int = 0


@dataclasses.dataclass(frozen=True)
class StateInfo:
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
    image_size: int
    operations: tuple[Operation, ...]
    states: tuple[StateInfo, ...]
    outputs: tuple[Feature | None, ...]  # each cell's output feature
    head: Head

    @property
    def norm(self) -> bool:
        """Whether convolutions are followed by batch norm."""
        return self.arch.norm is not None


IMAGE: State = 0  # the state that holds the input images


class _Builder:
    def __init__(self, arch: Architecture, image_size: int, live_only: bool):
        self.arch = arch
        self.live_only = live_only
        self.large = image_size > 96  # ImageNet-style stems, as in the official code for 224
        self.operations: list[Operation] = []
        self.states = [StateInfo(3, image_size)]
        self.outputs: list[Feature | None] = []

    def state(self, channels: int, size: int) -> State:
        self.states.append(StateInfo(channels, size))
        return len(self.states) - 1

    def add(self, kind, name, cell, inputs, output, out_channels, **options) -> None:
        in_channels = sum(self.states[inputs[0]].channels for _ in inputs) if inputs else 0
        self.operations.append(
            Operation(kind, name, cell, tuple(inputs), output, in_channels, out_channels, **options)
        )

    def size(self, feature: Feature) -> int:
        return next(self.states[s].size for s in feature if s is not None)

    def stem(self) -> tuple[Feature, Feature]:
        """The stem (Appendix A.1): returns the two inputs of the first cell."""
        arch, image = self.arch, self.states[IMAGE].size
        if arch.has_attention:
            stride, padding = (16, 0) if self.large else (3, 1)
            size = (image + 2 * padding - stride) // stride + 1
            out = self.state(arch.C, size)
            self.add("stem_vit", "stem0", 0, (IMAGE,), (out,), arch.C, stride=stride, kernel=stride)
            return (out,), (out,)
        if arch.stem_type == 0:
            parts = 3 if arch.preproc and not self.large else 1
            stride = 4 if self.large else 1
            size = -(-image // stride)
            out = tuple(self.state(arch.C, size) for _ in range(parts))
            self.add(
                "stem_conv", "stem.0", 0, (IMAGE,), out, parts * arch.C, stride=stride,
                kernel=arch.ks,
            )  # fmt: skip
            if arch.stem_pool:
                pooled = tuple(self.state(arch.C, -(-size // 2)) for _ in range(parts))
                self.add("stem_pool", "", 0, out, pooled, parts * arch.C, stride=2, kernel=3)
                out = pooled
            return out, out
        stride = 4 if self.large else 1
        size = -(-image // stride)
        first = self.state(arch.C, size)
        second = self.state(arch.C, -(-size // 2))
        self.add(
            "stem_imagenet", "stem0", 0, (IMAGE,), (first,), arch.C, stride=stride, kernel=arch.ks
        )
        self.add("stem_reduce", "stem1", 0, (first,), (second,), arch.C, stride=2, kernel=3)
        return (first,), (second,)

    def preprocess(
        self, feature: Feature | None, name: str, cell: int, channels: int, halve: bool
    ) -> State | None:
        """Brings a cell's input to the cell's channels and, if `halve`, to half the resolution."""
        if feature is None:
            return None
        size = self.size(feature)
        out_size = -(-size // 2) if halve else size
        if not self.arch.preproc:
            if not halve:
                return feature[0]
            out = self.state(channels, out_size)
            self.add("subsample", "", cell, feature, (out,), channels, stride=2)
            return out
        out = self.state(channels, out_size)
        self._mix(
            "factorized_reduce" if halve else "preprocess", name, cell, feature, out, channels
        )
        return out

    def _mix(self, kind, name, cell, feature, out, channels) -> None:
        part = next(self.states[s].channels for s in feature if s is not None)
        stride = 2 if kind == "factorized_reduce" else 1
        self.operations.append(
            Operation(
                kind, name, cell, feature, (out,), part * len(feature), channels, stride=stride
            )
        )

    def cell(self, i: int, inputs: list[Feature | None], channels: int, halve_first: bool):
        arch = self.arch
        reduction = arch.is_reduction(i)
        genotype = arch.genotype
        edges = genotype.reduce if reduction else genotype.normal
        concat = genotype.reduce_concat if reduction else genotype.normal_concat
        states: list[State | None] = [
            self.preprocess(inputs[0], f"cells.{i}.preprocess0", i, channels, halve_first),
            self.preprocess(inputs[1], f"cells.{i}.preprocess1", i, channels, False),
        ]
        for node in range(len(edges) // 2):
            out = None
            for j in (2 * node, 2 * node + 1):
                kind, source = edges[j]
                # Without `live_only`, `none` still makes a (never written) state, so that what
                # reads it is listed too.
                if states[source] is None or (kind == "none" and self.live_only):
                    continue
                stride = 2 if reduction and source < 2 and not arch.has_attention else 1
                info = self.states[states[source]]
                if out is None:
                    out = self.state(channels, -(-info.size // stride))
                name = f"cells.{i}._ops.{j}"
                if kind == "none":
                    continue
                if kind == "skip_connect" and stride == 2:
                    self._mix("factorized_reduce", name, i, (states[source],), out, channels)
                else:
                    self.add(kind, name, i, (states[source],), (out,), channels, stride=stride)
            states.append(out)
        feature = tuple(states[s] for s in concat)
        self.outputs.append(feature if any(s is not None for s in feature) else None)

    def build(self, num_classes: int) -> Wiring:
        arch = self.arch
        before, last = self.stem()
        channels = arch.C
        halve = arch.stem_type == 1
        for i in range(arch.n_cells):
            if arch.is_reduction(i):
                channels *= arch.C_mult
            self.cell(i, [before, last], channels, halve and not arch.has_attention)
            before, last = last, self.outputs[-1]
            halve = arch.is_reduction(i)
        if last is None:
            raise DisconnectedError(
                "the architecture's graph is disconnected: no path of operations other than "
                "'none' leads from the images to the classifier; choose another genotype"
            )
        width = channels * len(last)
        if not arch.glob_avg:
            width *= self.size(last) ** 2
        hidden = (arch.fc_dim,) * (max(arch.fc_layers, 1) - 1)
        head = Head(last, arch.glob_avg, (width, *hidden, num_classes))
        operations = self.operations
        if self.live_only:
            operations = _live(operations, last)
        return Wiring(
            arch, self.states[IMAGE].size, tuple(operations), tuple(self.states),
            tuple(self.outputs), head,
        )  # fmt: skip


def _live(operations: list[Operation], output: Feature) -> list[Operation]:
    """The operations that the output depends on: only their parameters exist and are predicted."""
    needed = {s for s in output if s is not None}
    live = []
    for op in reversed(operations):
        if needed.intersection(op.output):
            live.append(op)
            needed.update(s for s in op.inputs if s is not None)
    return live[::-1]


def wire(
    arch: Architecture, *, num_classes: int = 10, image_size: int = 32, live_only: bool = True
) -> Wiring:
    """Lists the operations of an architecture, in execution order.

    Args:
      arch: the architecture.
      num_classes: number of classes.
      image_size: height and width of the images in pixels; above 96 the stems are the strided ones
        for ImageNet.
      live_only: leave out what cannot influence the logits.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: num_classes or image_size is out of range.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; allowed: 2 or more")
    if image_size < 8:
        raise ValueError(f"image_size is {image_size}; allowed: 8 or more pixels")
    return _Builder(arch, image_size, live_only).build(num_classes)


# --- What an operation's parameters are ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of the computational graph that an operation expands to.

    Attributes:
      primitive: name of one of the paper's 15 primitives (Table 1).
      name: official parameter name, e.g. 'cells.0._ops.1.op.1.weight'; '' without parameters.
      shape: parameter shape in PyTorch's order (out, in, height, width), or None.
      sources: what it reads: indices of nodes within the operation, or -1 for the operation's
        input, or () for none.
    """

    primitive: str
    name: str = ""
    shape: tuple[int, ...] | None = None
    sources: tuple[int, ...] = (-1,)


def _chain(nodes: list[Node], *more: Node) -> None:
    """Appends nodes each of which reads the one before it (the first: the last node so far)."""
    for node in more:
        previous = len(nodes) - 1
        nodes.append(dataclasses.replace(node, sources=(previous,)))


def _norm(name: str, channels: int, norm: bool) -> list[Node]:
    return [Node("bn", f"{name}.weight", (channels,))] if norm else []


def _linear(name: str, out: int, in_: int, bias: bool = True) -> list[Node]:
    weight = [Node("conv", f"{name}.weight", (out, in_))]
    return weight + ([Node("bias", f"{name}.bias", (out,))] if bias else [])


def _conv_nodes(op: Operation, norm: bool) -> list[Node]:
    name, c_in, c_out = op.name + ".op", op.in_channels, op.out_channels
    if op.kind == "preprocess" or op.kind == "conv_1x1":
        kernels = [(c_out, c_in, 1, 1)]
    elif op.kind == "conv_7x1_1x7":
        kernels = [(c_in, c_in, 1, 7), (c_out, c_in, 7, 1)]
    else:
        k = int(op.kind[-1])
        kernels = [(c_out, c_in, k, k)]
    nodes: list[Node] = []
    for j, shape in enumerate(kernels, 1):
        _chain(nodes, Node("conv", f"{name}.{j}.weight", shape))
    _chain(nodes, *_norm(f"{name}.{len(kernels) + 1}", c_out, norm))
    return nodes


def _separable_nodes(op: Operation, norm: bool) -> list[Node]:
    """sep_conv: (depthwise, pointwise, BN) twice; dil_conv: once."""
    primitive, k = op.kind[:8], int(op.kind[-1])
    nodes: list[Node] = []
    outs = (op.in_channels, op.out_channels) if primitive == "sep_conv" else (op.out_channels,)
    for j, c_out in enumerate(outs):
        at = [f"{op.name}.op.{4 * j + n}" for n in (1, 2, 3)]
        _chain(
            nodes,
            Node(primitive, f"{at[0]}.weight", (op.in_channels, 1, k, k)),
            Node("conv", f"{at[1]}.weight", (c_out, op.in_channels, 1, 1)),
            *_norm(at[2], c_out, norm),
        )
    return nodes


def _reduce_nodes(op: Operation, norm: bool) -> list[Node]:
    shape = (op.out_channels // 2, op.in_channels, 1, 1)
    bn = _norm(f"{op.name}.bn", op.out_channels, norm)
    return [
        Node("conv", f"{op.name}.conv_1.weight", shape),
        Node("conv", f"{op.name}.conv_2.weight", shape),
        Node("concat", sources=(0, 1)),
        *(dataclasses.replace(node, sources=(2,)) for node in bn),
    ]


def _excite_nodes(op: Operation) -> list[Node]:
    nodes: list[Node] = []
    c = op.in_channels
    _chain(nodes, *_linear(f"{op.name}.fc1", c // 2, c), *_linear(f"{op.name}.fc2", c, c // 2))
    nodes.append(Node("cse", sources=(-1, 3)))
    return nodes


def _attention_nodes(op: Operation) -> list[Node]:
    c, name = op.in_channels, op.name
    nodes: list[Node] = []
    _chain(
        nodes,
        Node("ln", f"{name}.ln1.weight", (c,)),
        *_linear(f"{name}.to_qkv", 3 * c, c, bias=False),
        Node("msa"),
        *_linear(f"{name}.to_out.0", c, c),
    )
    nodes.append(Node("sum", sources=(4, -1)))
    _chain(
        nodes,
        Node("ln", f"{name}.ln2.weight", (c,)),
        *_linear(f"{name}.ff.net.0", op.out_channels, c),
        *_linear(f"{name}.ff.net.3", c, op.out_channels),
    )
    nodes.append(Node("sum", sources=(10, 5)))
    return nodes


def _stem_nodes(op: Operation, norm: bool, positions: int) -> list[Node]:
    c, k = op.out_channels, op.kernel
    nodes: list[Node] = []
    if op.kind == "stem_vit":
        _chain(nodes, Node("conv", "stem0.weight", (c, 3, k, k)))
        nodes.append(Node("pos_enc", "pos_enc.weight", (1, c, positions, positions), sources=()))
        nodes.append(Node("sum", sources=(0, 1)))
    elif op.kind == "stem_conv":
        _chain(nodes, Node("conv", "stem.0.weight", (c, 3, k, k)), *_norm("stem.1", c, norm))
    elif op.kind == "stem_imagenet":
        _chain(
            nodes,
            Node("conv", "stem0.0.weight", (c // 2, 3, k, k)),
            *_norm("stem0.1", c // 2, norm),
            Node("conv", "stem0.3.weight", (c, c // 2, 3, 3)),
            *_norm("stem0.4", c, norm),
        )
    else:
        _chain(nodes, Node("conv", "stem1.1.weight", (c, c, 3, 3)), *_norm("stem1.2", c, norm))
    return nodes


def operation_nodes(op: Operation, wiring: Wiring) -> list[Node]:
    """The graph nodes of one operation, in execution order (paper § 3, Table 1).

    The last node is the operation's output; an empty list means that it is its input (identity).
    """
    if op.kind in ("skip_connect", "subsample"):
        return []
    if op.kind in ("max_pool_3x3", "avg_pool_3x3", "stem_pool"):
        # Pooling nodes carry their kernel as their shape.
        return [Node("avg_pool" if op.kind[0] == "a" else "max_pool", shape=(1, 1, 3, 3))]
    if op.kind == "cse":
        return _excite_nodes(op)
    if op.kind == "msa":
        return _attention_nodes(op)
    if op.kind == "factorized_reduce":
        return _reduce_nodes(op, wiring.norm)
    if op.kind.startswith("stem"):
        return _stem_nodes(op, wiring.norm, wiring.states[op.output[0]].size)
    if op.kind.startswith(("sep_conv", "dil_conv")):
        return _separable_nodes(op, wiring.norm)
    return _conv_nodes(op, wiring.norm)


def head_nodes(head: Head) -> list[Node]:
    """The graph nodes of the classifier; the last two are its weight and its bias."""
    nodes: list[Node] = []
    if head.glob_avg:
        _chain(nodes, Node("glob_avg"))
    for j, (in_, out) in enumerate(zip(head.dims[:-1], head.dims[1:], strict=True)):
        _chain(nodes, *_linear(f"classifier.{3 * j}", out, in_))
    return nodes


def count_parameters(arch: Architecture, *, num_classes: int = 10, image_size: int = 32) -> int:
    """Number of parameters of the network with every operation built, used or not.

    This is the official files' `num_params`; the parameters of unused operations are counted there
    although they are never predicted.
    """
    wiring = wire(arch, num_classes=num_classes, image_size=image_size, live_only=False)
    total = 0
    nodes = [n for op in wiring.operations for n in operation_nodes(op, wiring)]
    for node in nodes + head_nodes(wiring.head):
        if node.name:
            size = 1
            for dim in node.shape:
                size *= dim
            # A norm layer is one node, its weight; its bias has none.
            total += size * (2 if node.primitive in ("bn", "ln") else 1)
    return total
