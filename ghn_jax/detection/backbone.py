"""Networks without pooling and classifier: what a detector looks at images with."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax import zoo
from ghn_jax.deepnets1m import layers
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.layers import concatenate
from ghn_jax.deepnets1m.names import parameter_path
from ghn_jax.deepnets1m.network import parameter_arrays
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import NormSum, PatchEmbedding
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.engine import cpu_layers
from ghn_jax.engine.plan import IMAGES, make_plan

_MOMENTUM = 0.9  # of running averages


class ArchitectureBackbone(nn.Module):
    """A network of the design space up to its last cell, for images of any height and width.

    Its parameters are those of `build_network(arch, ..., image_size)` but the classifier. Batch
    norm keeps running averages in the collection `batch_stats`, as networks that are trained do.

    Attributes:
      arch: the architecture.
      image_size: of the images that the network is for, which decides on its stem. A ViT's
        encoding of positions is for them as well, and resized to other images.
    """

    arch: Architecture
    image_size: int = 224

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, h, w, C); `train`: batch norm on the statistics of the batch."""
        *steps, head = make_plan(wire(self.arch, Task(image_size=self.image_size))).steps
        parameters = {
            name: parameter
            for step in steps
            for name, parameter in zip(step.names, step.unit.parameters, strict=True)
        }
        wanted = tuple((parameter_path(name), p) for name, p in parameters.items())
        arrays = dict(zip(parameters, parameter_arrays(self, wanted), strict=True))
        operations = cpu_layers if jax.default_backend() == "cpu" else layers
        values = {IMAGES: images}
        for unit, names, inputs, output in steps:
            params = tuple(array for name in names for array in arrays[name])
            read = tuple(None if v is None else values[v] for v in inputs)
            if isinstance(unit, NormSum) and names:
                values[output] = self._norm(unit, names, params, read, train)
                continue
            if isinstance(unit, PatchEmbedding):
                kernel, encoding = params
                grid = [unit.size(side) for side in images.shape[1:3]]
                shape = (*grid, encoding.shape[-1])
                params = kernel, jax.image.resize(encoding, shape, "linear", antialias=False)
            values[output] = unit.apply(params, read, operations)
        return concatenate([None if v is None else values[v] for v in head.inputs])

    def _norm(self, unit: NormSum, names, params, inputs, train: bool) -> jax.Array:
        initial = jnp.stack([jnp.zeros(unit.channels), jnp.ones(unit.channels)])
        running = [self.variable("batch_stats", name, lambda: initial) for name in names]
        if not train:
            averages = tuple(variable.value for variable in running)
            return dataclasses.replace(unit, running=True).apply(params + averages, inputs)
        y, statistics = unit.with_statistics(params, inputs)
        count = inputs[0].size // unit.channels
        for variable, batch in zip(running, statistics, strict=True):
            batch = batch.at[1].multiply(count / max(count - 1, 1))  # as PyTorch
            variable.value = _MOMENTUM * variable.value + (1 - _MOMENTUM) * batch
        return y


def make_backbone(network: Architecture | str, image_size: int = 224) -> nn.Module:
    """A network as a feature map.

    Args:
      network: an architecture, or the name of a ResNet of the zoo.
      image_size: of the images that the network is for, in pixels.

    Raises:
      ValueError: another model of the zoo.
    """
    if isinstance(network, Architecture):
        return ArchitectureBackbone(network, image_size)
    models = {name: constructor(image_size=image_size) for name, constructor in zoo.MODELS.items()}
    resnets = [name for name, model in models.items() if isinstance(model, zoo.ResNet)]
    if network not in resnets:
        raise ValueError(f"{network} is no backbone of a detector; allowed: networks of the design "
                         f"space, {', '.join(resnets)}")  # fmt: skip
    return models[network].clone(head=False)
