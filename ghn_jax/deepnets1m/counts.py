"""Parameters and FLOPs of an architecture, counted without building the network."""

from __future__ import annotations

import functools
import itertools
import math

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.operations import Piece, classifier_piece, operation_pieces, pieces
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.wiring import Builder, classifier_dims, wire


def _total(some: tuple[Piece, ...], norm: bool) -> int:
    """Parameters of units, those of their batch norms counted with `norm`."""
    parameters = (p for piece in some for _, p in piece.parameters(norm))
    return sum(math.prod(shape) for p in parameters for shape in p.leaves.values())


@functools.lru_cache(maxsize=8192)
def _parameters(kind: str, c_in: int, c_out: int, norm: bool) -> int:
    return _total(pieces(kind, c_in, c_out), norm)


def count_parameters(arch: Architecture, *, num_classes: int = 10, image_size: int = 32) -> int:
    """Number of parameters of the network with every operation built, used or not.

    This is the official files' `num_params`; the parameters of unused operations are counted there
    although they are never predicted, so it is not the sum over a graph's nodes.
    """
    task = Task(num_classes, image_size)
    builder = Builder(arch, task)
    genotype, norm = arch.genotype, arch.norm is not None
    inputs = [(builder.part(f).channels * len(f)) for f in builder.stem()]
    size = builder.states[-1].size
    total = sum(_total(operation_pieces(op, builder.states), norm) for op in builder.operations)
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
    dims = classifier_dims(arch, inputs[1], size, task)
    return total + sum((c_in + 1) * c_out for c_in, c_out in itertools.pairwise(dims))


def count_flops(arch: Architecture, *, num_classes: int = 10, image_size: int = 32) -> int:
    """Floating-point operations of the network for one image.

    Two for each multiply-add of its convolutions, fully connected layers and attention. As is
    usual, norms, activations, sums and pooling do not count; nor does what the logits do not depend
    on.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: num_classes or image_size is out of range.
    """
    wiring = wire(arch, Task(num_classes, image_size))
    total = classifier_piece(wiring.head).unit.multiply_adds(0)
    for op in wiring.operations:
        size = next(wiring.states[s].size for s in op.inputs if s is not None)
        for piece in operation_pieces(op, wiring.states):
            total += piece.unit.multiply_adds(size)
            size = piece.unit.size(size)
    return 2 * total
