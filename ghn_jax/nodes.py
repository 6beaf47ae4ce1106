"""What an operation is in the computational graph: its primitives and parameters (paper § 3).

`operation_nodes` expands an operation of a wiring to nodes. Cells repeat, so that a network has few
different operations: expansions are kept, without the names' first part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from ghn_jax.wiring import Head, Operation, StateInfo, Wiring


class Node(NamedTuple):
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
        nodes.append(node._replace(sources=(len(nodes) - 1,)))


def _norm(name: str, channels: int, norm: bool) -> list[Node]:
    return [Node("bn", f"{name}.weight", (channels,))] if norm else []


def _linear(name: str, out: int, in_: int, bias: bool = True) -> list[Node]:
    weight = [Node("conv", f"{name}.weight", (out, in_))]
    return weight + ([Node("bias", f"{name}.bias", (out,))] if bias else [])


# Names below that start with a dot follow the operation's own ('cells.0._ops.1').


def _conv_nodes(kind: str, c_in: int, c_out: int, norm: bool) -> list[Node]:
    if kind in ("preprocess", "conv_1x1"):
        kernels = [(c_out, c_in, 1, 1)]
    elif kind == "conv_7x1_1x7":
        kernels = [(c_in, c_in, 1, 7), (c_out, c_in, 7, 1)]
    else:
        k = int(kind[-1])
        kernels = [(c_out, c_in, k, k)]
    nodes: list[Node] = []
    for j, shape in enumerate(kernels, 1):
        _chain(nodes, Node("conv", f".op.{j}.weight", shape))
    _chain(nodes, *_norm(f".op.{len(kernels) + 1}", c_out, norm))
    return nodes


def _separable_nodes(kind: str, c_in: int, c_out: int, norm: bool) -> list[Node]:
    """sep_conv: (depthwise, pointwise, BN) twice; dil_conv: once."""
    primitive, k = kind[:8], int(kind[-1])
    nodes: list[Node] = []
    for j, out in enumerate((c_in, c_out) if primitive == "sep_conv" else (c_out,)):
        at = [f".op.{4 * j + n}" for n in (1, 2, 3)]
        _chain(
            nodes,
            Node(primitive, f"{at[0]}.weight", (c_in, 1, k, k)),
            Node("conv", f"{at[1]}.weight", (out, c_in, 1, 1)),
            *_norm(at[2], out, norm),
        )
    return nodes


def _reduce_nodes(c_in: int, c_out: int, norm: bool) -> list[Node]:
    shape = (c_out // 2, c_in, 1, 1)
    return [
        Node("conv", ".conv_1.weight", shape),
        Node("conv", ".conv_2.weight", shape),
        Node("concat", sources=(0, 1)),
        *(node._replace(sources=(2,)) for node in _norm(".bn", c_out, norm)),
    ]


def _excite_nodes(c: int) -> list[Node]:
    nodes: list[Node] = []
    _chain(nodes, *_linear(".fc1", c // 2, c), *_linear(".fc2", c, c // 2))
    nodes.append(Node("cse", sources=(-1, 3)))
    return nodes


def _attention_nodes(c: int, c_out: int) -> list[Node]:
    nodes: list[Node] = []
    _chain(
        nodes,
        Node("ln", ".ln1.weight", (c,)),
        *_linear(".to_qkv", 3 * c, c, bias=False),
        Node("msa"),
        *_linear(".to_out.0", c, c),
    )
    nodes.append(Node("sum", sources=(4, -1)))
    _chain(
        nodes,
        Node("ln", ".ln2.weight", (c,)),
        *_linear(".ff.net.0", c_out, c),
        *_linear(".ff.net.3", c, c_out),
    )
    nodes.append(Node("sum", sources=(10, 5)))
    return nodes


def _stem_nodes(kind: str, c: int, k: int, norm: bool, positions: int) -> list[Node]:
    nodes: list[Node] = []
    if kind == "stem_vit":
        _chain(nodes, Node("conv", "stem0.weight", (c, 3, k, k)))
        nodes.append(Node("pos_enc", "pos_enc.weight", (1, c, positions, positions), sources=()))
        nodes.append(Node("sum", sources=(0, 1)))
    elif kind == "stem_conv":
        _chain(nodes, Node("conv", "stem.0.weight", (c, 3, k, k)), *_norm("stem.1", c, norm))
    elif kind == "stem_imagenet":
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


@functools.lru_cache(maxsize=8192)
def expansion(
    kind: str, c_in: int, c_out: int, kernel: int, norm: bool, positions: int
) -> tuple[Node, ...]:
    """The nodes of an operation; a name that starts with a dot follows the operation's.

    Args:
      kind, c_in, c_out, kernel: of an `Operation`.
      norm: whether convolutions are followed by batch norm.
      positions: height of what a ViT's stem writes, else 0.
    """
    if kind in ("skip_connect", "subsample"):
        return ()
    if kind in ("max_pool_3x3", "avg_pool_3x3", "stem_pool"):
        # Pooling nodes carry their kernel as their shape.
        return (Node("avg_pool" if kind[0] == "a" else "max_pool", shape=(1, 1, 3, 3)),)
    if kind == "cse":
        return tuple(_excite_nodes(c_in))
    if kind == "msa":
        return tuple(_attention_nodes(c_in, c_out))
    if kind == "factorized_reduce":
        return tuple(_reduce_nodes(c_in, c_out, norm))
    if kind.startswith("stem"):
        return tuple(_stem_nodes(kind, c_out, kernel, norm, positions))
    if kind.startswith(("sep_conv", "dil_conv")):
        return tuple(_separable_nodes(kind, c_in, c_out, norm))
    return tuple(_conv_nodes(kind, c_in, c_out, norm))


def operation_expansion(op: Operation, norm: bool, states: Sequence[StateInfo]) -> tuple[Node, ...]:
    """The expansion of an operation of a wiring."""
    positions = states[op.output[0]].size if op.kind == "stem_vit" else 0
    return expansion(op.kind, op.in_channels, op.out_channels, op.kernel, norm, positions)


def operation_nodes(op: Operation, wiring: Wiring) -> list[Node]:
    """The graph nodes of one operation, in execution order (paper § 3, Table 1).

    The last node is the operation's output; an empty list means that it is its input (identity).
    """
    return [
        node._replace(name=op.name + node.name) if node.name[:1] == "." else node
        for node in operation_expansion(op, wiring.norm, wiring.states)
    ]


def head_nodes(head: Head) -> list[Node]:
    """The graph nodes of the classifier; the last two are its weight and its bias."""
    nodes: list[Node] = []
    if head.glob_avg:
        _chain(nodes, Node("glob_avg"))
    for j, (in_, out) in enumerate(zip(head.dims[:-1], head.dims[1:], strict=True)):
        _chain(nodes, *_linear(f"classifier.{3 * j}", out, in_))
    return nodes
