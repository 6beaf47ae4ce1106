"""Parameters of target networks under the authors' PyTorch names and layouts, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVE_ID, Graph, build_graph
from ghn_jax.deepnets1m.names import check_names, insert, parameter_path
from ghn_jax.files.messages import what_is
from ghn_jax.interop import torch_models
from ghn_jax.interop.torch_nnx import module_to_torch
from ghn_jax.zoo import Model


class _Parameter(NamedTuple):
    """One parameter: its PyTorch name and shape, its Flax path, and how each becomes the other."""

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


def _same(x):
    return x


def _kernel_to_torch(x):  # (height, width, in, out) -> (out, in, height, width)
    return x.transpose(3, 2, 0, 1)


def _kernel_from_torch(x):
    return x.transpose(2, 3, 1, 0)


def _matrix(x):
    return x.T


def _position_to_torch(x):  # (height, width, channels) -> (1, channels, height, width)
    return x.transpose(2, 0, 1)[None]


def _position_from_torch(x):
    return x[0].transpose(1, 2, 0)


def _parameters(graph: Graph) -> list[_Parameter]:
    """Every parameter of a graph's network, in the order of its nodes."""
    found = []
    for primitive, name, shape in zip(
        graph.primitives, graph.names, graph.param_shapes, strict=True
    ):
        if shape is None or not name.endswith((".weight", ".bias")):
            continue
        path, shape = parameter_path(name), tuple(shape)
        if primitive in (PRIMITIVE_ID["bn"], PRIMITIVE_ID["ln"]):
            bias = name.removesuffix("weight") + "bias"
            found.append(_Parameter(name, shape, (*path, "scale"), _same, _same))
            found.append(_Parameter(bias, shape, (*path, "bias"), _same, _same))
        elif primitive == PRIMITIVE_ID["pos_enc"]:
            ways = _position_to_torch, _position_from_torch
            found.append(_Parameter(name, shape, (*path, "embedding"), *ways))
        elif len(shape) == 1:
            found.append(_Parameter(name, shape, (*path, "bias"), _same, _same))
        else:
            ways = (_matrix, _matrix) if len(shape) == 2 else (_kernel_to_torch, _kernel_from_torch)
            found.append(_Parameter(name, shape, (*path, "kernel"), *ways))
    return found


def _checked(arch) -> Architecture | Graph:
    if not isinstance(arch, Architecture | Graph):
        raise TypeError(
            f"arch is {what_is(arch)}; allowed: an Architecture, a Graph, a model of the zoo"
        )
    return arch


def _graph(arch: Architecture | Graph, num_classes: int, image_size: int) -> Graph:
    if isinstance(arch, Graph):
        return arch
    return build_graph(arch, 1, num_classes=num_classes, image_size=image_size)


def _leaves(tree: Mapping, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """All arrays of a tree by their path."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found.update(_leaves(value, (*path, key)))
        else:
            found[*path, key] = value
    return found


def abstract_params(graph: Graph) -> dict:
    """The `params` tree of a graph's network as shapes: `jax.ShapeDtypeStruct` for each array."""
    params: dict = {}
    for p in _parameters(graph):
        shape = p.from_torch(np.broadcast_to(np.float32(0), p.shape)).shape
        insert(params, p.path, jax.ShapeDtypeStruct(shape, jnp.float32))
    return params


def to_torch(
    params: Mapping | nnx.Module,
    arch: Architecture | Graph | Model | nnx.Module | None = None,
    num_classes: int = 10,
    image_size: int = 32,
) -> dict[str, np.ndarray]:
    """A network's parameters as the authors' PyTorch code, or torchvision, has them.

    Args:
      params: the `params` tree of `build_network(arch, num_classes, image_size)`, or all variables
        of a model of the zoo (`torch_models.to_torch`), or any NNX module
        (`torch_nnx.module_to_torch`).
      arch: its architecture, its graph, or the model; an NNX module needs none.
      num_classes: classes of the network; a graph or a model has its own.
      image_size: height and width of the images, in pixels; a graph or a model has its own.

    Returns:
      For each name (`cells.0._ops.1.op.1.weight`) an array: (out, in, height, width) for
      convolutions, (out, in) for linear layers. PyTorch's own entries that are no parameters
      (batch norm's running statistics) are not among them, but for models of the zoo.

    Raises:
      TypeError: the network or its parameters are of another type.
      ValueError: the tree is not that of the architecture; the message lists what differs. Or the
        NNX module has layers stacked in one, as by `nnx.vmap`.
    """
    if isinstance(params, nnx.Module):
        return module_to_torch(params)
    if isinstance(arch, nn.Module):
        return torch_models.to_torch(params, arch)
    arch = _checked(arch)
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params is {what_is(params)}; allowed: the params tree of an architecture's network, "
            "all variables of a model of the zoo, or an NNX module"
        )
    leaves = _leaves(params)
    expected = _parameters(_graph(arch, num_classes, image_size))
    check_names({"/".join(p) for p in leaves}, {"/".join(p.path) for p in expected}, "parameters")
    arrays = {}
    for p in expected:
        # An array of its own: JAX's may not be written to.
        array = np.array(p.to_torch(np.asarray(leaves[p.path])), order="C")
        if array.shape != p.shape:
            raise ValueError(f"{'/'.join(p.path)} is {array.shape} as {p.name}, expected {p.shape}")
        arrays[p.name] = array
    return arrays


def from_torch(
    arrays: Mapping[str, np.ndarray],
    arch: Architecture | Graph | Model,
    num_classes: int = 10,
    image_size: int = 32,
) -> dict:
    """The way back: a `params` tree, or a model's variables, from arrays under PyTorch's names.

    Args:
      arrays: as `to_torch` returns them; tensors of PyTorch will do, `dict(net.named_parameters())`
        as well. Running statistics of batch norm are passed over: the networks run on batch
        statistics.
      arch: the architecture, its graph, or a model of the zoo, whose running statistics are kept
        (`torch_models.from_torch`).
      num_classes: classes of the network; a graph or a model has its own.
      image_size: height and width of the images, in pixels; a graph or a model has its own.

    Raises:
      TypeError: the network or the arrays are of another type.
      ValueError: names or shapes are not those of the architecture; the message lists them.
    """
    torch_models.check_arrays(arrays)
    if isinstance(arch, nn.Module):
        return torch_models.from_torch(arrays, arch)
    arch = _checked(arch)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    arrays = {name: x for name, x in arrays.items() if not name.endswith(statistics)}
    expected = _parameters(_graph(arch, num_classes, image_size))
    check_names(set(arrays), {p.name for p in expected}, "tensors")
    params: dict = {}
    for p in expected:
        array = torch_models.as_array(arrays[p.name], p.name)
        if array.shape != p.shape:
            raise ValueError(f"{p.name} is {array.shape}, expected {p.shape}")
        insert(params, p.path, jnp.array(p.from_torch(array)))  # a copy: PyTorch may write to its
    return params
