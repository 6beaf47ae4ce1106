"""Parameters and FLOPs of an architecture, counted without building the network."""

from __future__ import annotations

import functools
import itertools
import math

from ghn_jax.architecture import Architecture
from ghn_jax.nodes import Node, expansion, operation_expansion
from ghn_jax.wiring import Builder, Operation, Wiring, classifier_dims, wire


def _total(nodes: tuple[Node, ...]) -> int:
    # A norm layer is one node, its weight; its bias has none.
    return sum(
        math.prod(node.shape) * (2 if node.primitive in ("bn", "ln") else 1)
        for node in nodes
        if node.name
    )


@functools.lru_cache(maxsize=8192)
def _parameters(kind: str, c_in: int, c_out: int, norm: bool) -> int:
    return _total(expansion(kind, c_in, c_out, 0, norm, 0))


def count_parameters(arch: Architecture, *, num_classes: int = 10, image_size: int = 32) -> int:
    """Number of parameters of the network with every operation built, used or not.

    This is the official files' `num_params`; the parameters of unused operations are counted there
    although they are never predicted, so it is not the sum over a graph's nodes.
    """
    builder = Builder(arch, image_size)
    genotype, norm = arch.genotype, arch.norm is not None
    inputs = [(builder.part(f).channels * len(f)) for f in builder.stem()]
    size = builder.states[-1].size
    total = sum(_total(operation_expansion(op, norm, builder.states)) for op in builder.operations)
    channels = arch.C
    halve = arch.stem_type == 1 and not arch.has_attention
    cells: dict[tuple[bool, int], int] = {}  # parameters of a cell's edges
    for i in range(arch.n_cells):
        reduction = arch.is_reduction(i)
        channels *= arch.C_mult if reduction else 1
        if arch.preproc:
            first = "factorized_reduce" if halve else "preprocess"
            total += _parameters(first, inputs[0], channels, norm)
            total += _parameters("preprocess", inputs[1], channels, norm)
        halve = reduction and not arch.has_attention
        if (reduction, channels) not in cells:
            edges = genotype.reduce if reduction else genotype.normal
            cells[reduction, channels] = sum(
                _parameters(
                    "factorized_reduce"
                    if kind == "skip_connect" and halve and source < 2
                    else kind,
                    channels,
                    channels,
                    norm,
                )
                for kind, source in edges
                if kind != "none"
            )
        total += cells[reduction, channels]
        size = -(-size // 2) if halve else size
        inputs = [inputs[1], channels * len(genotype.normal_concat)]
    dims = classifier_dims(arch, inputs[1], size, num_classes)
    return total + sum((c_in + 1) * c_out for c_in, c_out in itertools.pairwise(dims))


def _multiply_adds(op: Operation, wiring: Wiring) -> int:
    before = next(wiring.states[s].size for s in op.inputs if s is not None)
    after = wiring.states[op.output[0]].size
    total = 0
    for node in operation_expansion(op, wiring.norm, wiring.states):
        if node.primitive == "msa":
            total += 2 * after**4 * op.in_channels  # queries by keys, and weights by values
        if node.primitive not in ("conv", "sep_conv", "dil_conv"):
            continue
        if op.kind == "cse":
            positions = 1
        elif node.shape[2:] == (1, 7):  # the first of two, strided along rows only
            positions = before * after
        elif node.name == "stem0.0.weight":  # with a stride of 4, each of two halves
            positions = (-(-before // 2) if op.stride == 4 else before) ** 2
        else:
            positions = after**2
        total += math.prod(node.shape) * positions
    return total


def count_flops(arch: Architecture, *, num_classes: int = 10, image_size: int = 32) -> int:
    """Floating-point operations of the network for one image.

    Two for each multiply-add of its convolutions, fully connected layers and attention. As is
    usual, norms, activations, sums and pooling do not count; nor does what the logits do not depend
    on.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: num_classes or image_size is out of range.
    """
    wiring = wire(arch, num_classes=num_classes, image_size=image_size)
    head = sum(c_in * c_out for c_in, c_out in itertools.pairwise(wiring.head.dims))
    return 2 * (head + sum(_multiply_adds(op, wiring) for op in wiring.operations))
