"""Target networks as Flax modules (paper § 2.1, Appendix A.1): their definition.

`build_network(arch)` has parameters for exactly the operations that the output depends on, under
the official names (`names.parameter_path`), so that a predicted tree fits. Images are NHWC.
What runs many networks without compiling any of them is the engine (`engine/`).
"""

from __future__ import annotations

import flax.linen as nn
import jax

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.layers import concatenate
from ghn_jax.deepnets1m.names import parameter_path
from ghn_jax.deepnets1m.operations import network_pieces
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import Arrays, Classifier, NormSum, Parameter
from ghn_jax.deepnets1m.wiring import IMAGE, Wiring, wire

_INITIALISERS = {
    "kernel": nn.initializers.he_normal(),
    "embedding": nn.initializers.normal(1.0),
    "scale": nn.initializers.ones,
    "bias": nn.initializers.zeros,
}
Wanted = tuple[tuple[tuple[str, ...], Parameter], ...]  # path of a module, and what it has


def parameter_arrays(module: nn.Module, wanted: Wanted) -> list[Arrays]:
    """The arrays of parameters at paths below a module, which is in its compact call."""
    below: dict[str, list] = {}
    for path, parameter in wanted:
        if path:
            below.setdefault(path[0], []).append((path[1:], parameter))
    found = {name: iter(_Scope(tuple(some), name=name)()) for name, some in below.items()}
    return [
        next(found[path[0]])
        if path
        else tuple(
            module.param(leaf, _INITIALISERS[leaf], shape)
            for leaf, shape in parameter.leaves.items()
        )
        for path, parameter in wanted
    ]


class _Scope(nn.Module):
    """Parameters whose names start alike."""

    wanted: Wanted

    @nn.compact
    def __call__(self) -> list[Arrays]:
        return parameter_arrays(self, self.wanted)


class Network(nn.Module):
    """A network of the DeepNets-1M design space; see `build_network`.

    Attributes:
      arch: the architecture.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels.
    """

    arch: Architecture
    num_classes: int
    image_size: int

    def wiring(self) -> Wiring:
        """Its operations."""
        return wire(self.arch, Task(self.num_classes, self.image_size))

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits.

        Batch norm is on the statistics of the batch, as predicted parameters are evaluated (C.1).
        `train` turns on the dropout between fully connected layers (rng stream 'dropout').
        """
        wiring = self.wiring()
        pieces = network_pieces(wiring)
        parameters = {
            name: p
            for some in pieces
            for piece in some
            for name, p in piece.parameters(wiring.norm)
        }
        wanted = tuple((parameter_path(name), p) for name, p in parameters.items())
        params = dict(zip(parameters, parameter_arrays(self, wanted), strict=True))

        def of(names) -> Arrays:
            return tuple(array for name in names for array in params[name])

        states = {IMAGE: images}
        *operations, (head,) = pieces
        for op, some in zip(wiring.operations, operations, strict=True):
            x = concatenate([None if s is None else states[s] for s in op.inputs])
            for unit, names, norm in some:
                x = unit.apply(of(names), (x,))
                if wiring.norm and norm:
                    x = NormSum(x.shape[-1], 1).apply(of([norm]), (x,))
            states[op.output] = states[op.output] + x if op.output in states else x
        last = concatenate([None if s is None else states[s] for s in wiring.head.feature])
        key = self.make_rng("dropout") if train and len(wiring.head.dims) > 2 else None
        assert isinstance(head.unit, Classifier)
        return head.unit.apply(of(head.names), (last,), key=key)


def build_network(arch: Architecture, num_classes: int = 10, image_size: int = 32) -> Network:
    """The Flax module of an architecture.

    Args:
      arch: the architecture.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; above 96 the stems are ImageNet's.

    Returns:
      A Linen module; `init` gives He-initialised parameters.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
      ValueError: num_classes or image_size is out of range.
    """
    network = Network(arch, num_classes, image_size)
    network.wiring()
    return network
