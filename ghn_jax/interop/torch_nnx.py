"""NNX modules as PyTorch has them: each layer by its own type, under its path in the module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

_STATISTICS = {"mean": "running_mean", "var": "running_var"}
_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm)


def module_to_torch(module: nnx.Module) -> dict[str, np.ndarray]:
    """A module's parameters and running statistics as the state dict of the same net in PyTorch.

    Args:
      module: an NNX module whose attributes have the names of the PyTorch net's.

    Returns:
      For each name ('blocks.0.conv.weight') an array: (out, in, height, width) for convolutions,
      (out, in) for linear layers; `MultiHeadAttention` as PyTorch's, query, key and value in one
      ('in_proj_weight'). Parameters of the module's own stay as they are.

    Raises:
      TypeError: a layer that PyTorch computes otherwise (a transposed convolution, a linear layer
        of several axes, attention that normalises queries and keys, or whose sizes differ).
      ValueError: layers are stacked in one, as by `nnx.vmap`; PyTorch has a module for each.
    """
    arrays: dict[str, np.ndarray] = {}
    inside: set[int] = set()  # layers of attention, which is converted as a whole
    for path, part in sorted(nnx.iter_modules(module), key=lambda found: len(found[0])):
        if id(part) in inside:
            continue
        where = ".".join(map(str, path)) or "the module"
        _check_is_one(part, where)
        if isinstance(part, nnx.MultiHeadAttention):
            inside |= {id(below) for _, below in nnx.iter_modules(part)}
            tensors = _attention(part, where)
        else:
            tensors = _layer(part, where)
        for name, array in tensors:
            # An array of its own: JAX's may not be written to.
            arrays[".".join([*_names(module, path), name])] = np.array(array, order="C")
    return arrays


def _variables(layer: nnx.Module) -> dict[str, tuple[Any, int]]:
    """(variable, axes that it has in one layer) of the layers that are known, by their names."""
    ranks: dict[str, int] = {}
    if isinstance(layer, nnx.Linear):
        ranks = {"kernel": 2, "bias": 1}
    elif isinstance(layer, nnx.Conv):
        ranks = {"kernel": len(layer.kernel_size) + 2, "bias": 1}
    elif isinstance(layer, nnx.Embed):
        ranks = {"embedding": 2}
    elif isinstance(layer, _NORMS):
        ranks = dict.fromkeys(("scale", "bias", *_STATISTICS), 1)
    found = {name: (getattr(layer, name, None), rank) for name, rank in ranks.items()}
    if isinstance(layer, nnx.MultiHeadAttention):
        for part in ("query", "key", "value", "out"):
            inner = getattr(layer, part)
            found[f"{part}.kernel"] = inner.kernel, 3
            found[f"{part}.bias"] = inner.bias, 1 if part == "out" else 2
    return found


def _check_is_one(layer: nnx.Module, where: str) -> None:
    """Raises ValueError for stacked layers: their axis would be taken for one of PyTorch's."""
    for name, (variable, rank) in _variables(layer).items():
        if variable is not None and variable[...].ndim > rank:
            raise ValueError(
                f"{where} is {type(layer).__name__} layers stacked in one, as nnx.vmap makes them: "
                f"its {name} is {variable[...].shape}, but {rank}-dimensional in a single layer; "
                "PyTorch has a module for each, so make them one by one, in an nnx.List, or give "
                "each alone: graphdef, state = nnx.split(stacked); "
                "nnx.merge(graphdef, jax.tree.map(lambda x: x[0], state)) is the first"
            )


def _names(module: nnx.Module, path: Sequence) -> Iterator[str]:
    """A path as PyTorch has it, whose Sequential has its layers without a name in between."""
    inside: Any = module
    for part in path:
        if not (isinstance(inside, nnx.Sequential) and part == "layers"):
            yield str(part)
        inside = inside[part] if isinstance(part, int) else getattr(inside, part)


def _layer(layer: nnx.Module, where: str) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of a layer's own variables."""
    for name, variable in vars(layer).items():
        if not isinstance(variable, (nnx.Param, nnx.BatchStat)):
            continue
        value = np.asarray(variable[...])
        if name == "kernel" and isinstance(layer, (nnx.Conv, nnx.Linear)):
            spatial = range(value.ndim - 2)  # (height, width, in, out)
            yield "weight", value.transpose(value.ndim - 1, value.ndim - 2, *spatial)
        elif name == "kernel":
            raise TypeError(
                f"{where} is a {type(layer).__name__}, whose kernel has no form in PyTorch that is "
                "known here; use nnx.Conv, nnx.Linear or nnx.MultiHeadAttention"
            )
        elif isinstance(layer, _NORMS):
            yield {"scale": "weight", **_STATISTICS}.get(name, name), value
        else:
            yield "weight" if isinstance(layer, nnx.Embed) else name, value


def _attention(layer: nnx.MultiHeadAttention, where: str) -> Iterator[tuple[str, np.ndarray]]:
    if layer.normalize_qk:
        raise TypeError(
            f"{where} is a MultiHeadAttention that normalises queries and keys, which PyTorch's "
            "has not; use normalize_qk=False, or convert its layers one by one"
        )
    parts = (layer.query, layer.key, layer.value)
    sizes = {"in": layer.in_features, "in_kv": layer.in_kv_features, "qkv": layer.qkv_features,
             "out": layer.out_features}  # fmt: skip
    if len(set(sizes.values())) > 1:
        given = ", ".join(f"{name}_features {size}" for name, size in sizes.items())
        raise TypeError(
            f"{where} is a MultiHeadAttention with {given}; PyTorch's has one number for all of "
            "them, so make them equal, or convert its layers one by one"
        )
    kernels = [np.asarray(part.kernel[...]) for part in parts]  # (in, heads, features)
    yield "in_proj_weight", np.concatenate([k.reshape(len(k), -1).T for k in kernels])
    out = np.asarray(layer.out.kernel[...])  # (heads, features, out)
    yield "out_proj.weight", out.reshape(-1, out.shape[-1]).T
    if layer.out.bias is not None:
        biases = [np.asarray(part.bias[...]).reshape(-1) for part in parts]
        yield "in_proj_bias", np.concatenate(biases)
        yield "out_proj.bias", np.asarray(layer.out.bias[...])
