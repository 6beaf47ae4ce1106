"""The operations of the design space by name, as units (paper Appendix A.1).

An operation is one or two units (`units.py`). This table and the units are the one place that
describes operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ghn_jax.deepnets1m.units import (
    Classifier,
    Convolution,
    Convolutions,
    FactorizedReduce,
    Identity,
    Node,
    Parameter,
    PatchEmbedding,
    Pool,
    SqueezeExcite,
    TransformerBlock,
    Unit,
)
from ghn_jax.deepnets1m.wiring import Head, Operation, StateInfo, Wiring


class Piece(NamedTuple):
    """A unit of an operation.

    Attributes:
      unit: what it computes.
      names: official names of its parameters; one that starts with a dot follows the operation's.
      norm: name of its batch norm's weight, '' without one.
    """

    unit: Unit
    names: tuple[str, ...] = ()
    norm: str = ""

    def parameters(self, norm: bool) -> list[tuple[str, Parameter]]:
        """Names and parameters, with `norm` those of its batch norm."""
        listed = list(zip(self.names, self.unit.parameters, strict=True))
        if norm and self.norm:
            listed.append((self.norm, Parameter("bn", (self.unit.features,))))
        return listed


def _weights(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.weight" for module in modules)


def _relu_conv(*convolutions: Convolution, first: int = 1) -> Piece:
    """ReLU, convolutions, batch norm: modules op.1, op.2, ... as in the official code."""
    last = first + len(convolutions)
    *names, norm = _weights(*(f".op.{i}" for i in range(first, last + 1)))
    return Piece(Convolutions(True, convolutions), tuple(names), norm)


def _separable(primitive: str, c_in: int, c_out: int, k: int, stride: int, first: int = 1) -> Piece:
    depthwise = Convolution(c_in, c_in, (k, k), (stride, stride), primitive)
    return _relu_conv(depthwise, Convolution(c_in, c_out), first=first)


def _stem(prefix: str, at: int, c_in: int, c_out: int, k: int, stride: int) -> Piece:
    """A convolution and its batch norm at a position of an official sequence."""
    unit = Convolutions(at > 0, (Convolution(c_in, c_out, (k, k), (stride, stride)),))
    return Piece(unit, _weights(f"{prefix}.{at}"), f"{prefix}.{at + 1}.weight")


Pieces = tuple[Piece, ...]


def _identity(c_in: int, c_out: int, stride: int) -> Pieces:
    return (Piece(Identity(stride)),)


def _pool(kind: str, c_in: int, c_out: int, stride: int) -> Pieces:
    return (Piece(Pool(kind, stride)),)


def _conv(k: int, c_in: int, c_out: int, stride: int) -> Pieces:
    return (_relu_conv(Convolution(c_in, c_out, (k, k), (stride, stride))),)


def _conv_7x1_1x7(c_in: int, c_out: int, stride: int) -> Pieces:
    first = Convolution(c_in, c_in, (1, 7), (1, stride))
    return (_relu_conv(first, Convolution(c_in, c_out, (7, 1), (stride, 1))),)


def _sep_conv(k: int, c_in: int, c_out: int, stride: int) -> Pieces:
    return (
        _separable("sep_conv", c_in, c_in, k, stride),
        _separable("sep_conv", c_in, c_out, k, 1, first=5),
    )


def _dil_conv(k: int, c_in: int, c_out: int, stride: int) -> Pieces:
    return (_separable("dil_conv", c_in, c_out, k, stride),)


def _factorized_reduce(c_in: int, c_out: int, stride: int) -> Pieces:
    return (Piece(FactorizedReduce(c_in, c_out), _weights(".conv_1", ".conv_2"), ".bn.weight"),)


def _cse(c_in: int, c_out: int, stride: int) -> Pieces:
    layers = (f".fc{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias"))
    return (Piece(SqueezeExcite(c_in, stride), tuple(layers)),)


def _msa(c_in: int, c_out: int, stride: int) -> Pieces:
    names = (
        *(".ln1.weight", ".to_qkv.weight", ".to_out.0.weight", ".to_out.0.bias", ".ln2.weight"),
        *(".ff.net.0.weight", ".ff.net.0.bias", ".ff.net.3.weight", ".ff.net.3.bias"),
    )
    return (Piece(TransformerBlock(c_in), names),)


_OPERATIONS: dict[str, Callable[[int, int, int], Pieces]] = {
    "max_pool_3x3": functools.partial(_pool, "max"),
    "avg_pool_3x3": functools.partial(_pool, "avg"),
    "skip_connect": _identity,
    "sep_conv_3x3": functools.partial(_sep_conv, 3),
    "sep_conv_5x5": functools.partial(_sep_conv, 5),
    "dil_conv_3x3": functools.partial(_dil_conv, 3),
    "dil_conv_5x5": functools.partial(_dil_conv, 5),
    "conv_1x1": functools.partial(_conv, 1),
    "conv_7x1_1x7": _conv_7x1_1x7,
    "conv_3x3": functools.partial(_conv, 3),
    "conv_5x5": functools.partial(_conv, 5),
    "conv_7x7": functools.partial(_conv, 7),
    "msa": _msa,
    "cse": _cse,
    # Of stems and at the inputs of cells.
    "stem_pool": functools.partial(_pool, "max"),
    "preprocess": functools.partial(_conv, 1),
    "factorized_reduce": _factorized_reduce,
    "subsample": _identity,
}


def _stem_conv(c_out: int, stride: int, kernel: int, positions: int) -> Pieces:
    return (_stem("stem", 0, 3, c_out, kernel, stride),)


def _stem_imagenet(c_out: int, stride: int, kernel: int, positions: int) -> Pieces:
    each, half = (2 if stride == 4 else 1), c_out // 2
    return _stem("stem0", 0, 3, half, kernel, each), _stem("stem0", 3, half, c_out, 3, each)


def _stem_reduce(c_out: int, stride: int, kernel: int, positions: int) -> Pieces:
    return (_stem("stem1", 1, c_out, c_out, 3, 2),)


def _stem_vit(c_out: int, stride: int, kernel: int, positions: int) -> Pieces:
    return (Piece(PatchEmbedding(c_out, kernel, positions), _weights("stem0", "pos_enc")),)


_STEMS: dict[str, Callable[[int, int, int, int], Pieces]] = {
    "stem_conv": _stem_conv,
    "stem_imagenet": _stem_imagenet,
    "stem_reduce": _stem_reduce,
    "stem_vit": _stem_vit,
}


@functools.lru_cache(maxsize=8192)
def pieces(
    kind: str, c_in: int, c_out: int, stride: int = 1, kernel: int = 0, positions: int = 0
) -> Pieces:
    """The units of an operation.

    Args:
      kind, c_in, c_out, stride, kernel: of a `wiring.Operation`.
      positions: height of what a ViT's stem writes.
    """
    if kind in _STEMS:
        return _STEMS[kind](c_out, stride, kernel, positions)
    return _OPERATIONS[kind](c_in, c_out, stride)


def operation_pieces(op: Operation, states: Sequence[StateInfo]) -> Pieces:
    """The units of an operation of a wiring; a name that starts with a dot follows `op.name`."""
    positions = states[op.output].size if op.kind == "stem_vit" else 0
    return pieces(op.kind, op.in_channels, op.out_channels, op.stride, op.kernel, positions)


@functools.lru_cache(maxsize=256)
def classifier_piece(head: Head) -> Piece:
    """The classifier of a wiring."""
    layers = (f"classifier.{3 * i}" for i in range(len(head.dims) - 1))
    names = tuple(f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias"))
    return Piece(Classifier(head.glob_avg, head.dims), names)


def _full(name: str, prefix: str) -> str:
    return prefix + name if name[:1] == "." else name


def network_pieces(wiring: Wiring) -> list[Pieces]:
    """The units of each operation of a network, then its classifier, under their full names."""
    network = [
        tuple(
            Piece(unit, tuple(_full(n, op.name) for n in names), _full(norm, op.name))
            for unit, names, norm in operation_pieces(op, wiring.states)
        )
        for op in wiring.operations
    ]
    return [*network, (classifier_piece(wiring.head),)]


@functools.lru_cache(maxsize=8192)
def piece_nodes(some: Pieces, norm: bool) -> tuple[Node, ...]:
    """The graph nodes of an operation, the last its output; none for the identity (§ 3, Table 1).

    Args:
      some: its units.
      norm: whether the network has batch norm.
    """
    nodes: list[Node] = []
    for unit, names, norm_name in some:
        first = len(nodes)
        for node in unit.nodes(names):
            # What reads the operation's input in a second unit reads the first unit's output.
            nodes.append(
                node._replace(
                    sources=tuple(first + s if s >= 0 else first - 1 for s in node.sources)
                )
            )
        if norm and norm_name:
            nodes.append(Node("bn", norm_name, (unit.features,), (len(nodes) - 1,)))
    return tuple(nodes)
