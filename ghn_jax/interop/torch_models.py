"""Weights of the zoo's models under the names and in the layouts of PyTorch's libraries, and back.

Modules have PyTorch's names ('layer1.0.conv1.weight' is params/layer1_0/conv1/kernel), so one rule,
`torch_name`, the inverse of `names.parameter_path`, makes the name of every leaf, and its
dimensions say how it is laid out (`torch_shape`). Only Flax's attention differs: PyTorch joins
query, key and value in one tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ghn_jax.deepnets1m.names import check_names
from ghn_jax.files.messages import in_a_line, what_is
from ghn_jax.tracing.given import check_model_and_variables
from ghn_jax.zoo import GoogLeNet, Model, VisionTransformer
from ghn_jax.zoo.swin import relative_position_index

# A leaf's name there; others, like class_token, keep theirs.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
ATTENTION = ("query", "key", "value")  # in PyTorch's order
# The end of an attention module's paths -> the end of its names.
ATTENTION_NAMES = {
    ("query", "kernel"): "in_proj_weight",
    ("query", "bias"): "in_proj_bias",
    ("out", "kernel"): "out_proj.weight",
    ("out", "bias"): "out_proj.bias",
}
UNSPLIT = re.compile(r"encoder_layer_\d+|ln_\d+")  # names of torchvision's, no places in a sequence
COUNTER = "num_batches_tracked"
AUXILIARY = ("aux1.", "aux2.")  # heads of GoogLeNet that training alone uses

# torchvision -> timm, replaced in this order.
TIMM = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln.": "norm.",
    "heads.head": "head",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "ln_": "norm",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


class Tensor(NamedTuple):
    """One tensor of a model.

    Attributes:
      name: in PyTorch.
      shape: in PyTorch.
      paths: in the variables, collection first; several are joined along the first axis.
      shapes: of each of these.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]


def torch_name(path: tuple[str, ...]) -> str:
    """The name of a leaf's tensor.

    Args:
      path: of the leaf, without its collection.

    >>> torch_name(("features_1_0", "block_0", "kernel"))
    'features.1.0.block.0.weight'
    """
    *modules, leaf = path
    parts = []
    for module in modules:
        if UNSPLIT.fullmatch(module):
            parts.append(module)
        else:
            parts.append(re.sub(r"_(?=\d+(_|$))", ".", module))
    if path[-3:-2] == ("self_attention",):
        return ".".join([*parts[:-1], ATTENTION_NAMES[path[-2:]]])
    return ".".join([*parts, LEAVES.get(leaf, leaf)])


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of a leaf (for attention: of its part of a tensor)."""
    leaf = path[-1]
    if leaf == "kernel" and len(shape) == 4:  # (height, width, in, out)
        return shape[3], shape[2], shape[0], shape[1]
    if leaf == "kernel" and len(shape) == 3 and path[-2] == "out":  # (heads, features, out)
        return shape[2], shape[0] * shape[1]
    if leaf == "kernel" and len(shape) == 3:  # (in, heads, features)
        return shape[1] * shape[2], shape[0]
    if leaf == "kernel":  # (in, out)
        return shape[::-1]
    if leaf == "bias":  # of attention: (heads, features)
        return (int(np.prod(shape)),)
    if leaf == "layer_scale":
        return (*shape, 1, 1)
    return shape


def check_arrays(arrays: Any) -> None:
    """Checks that something has arrays under names.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"arrays is {what_is(arrays)}; allowed: arrays under PyTorch's names, as to_torch "
            "returns them and a module's state_dict() is"
        )


def as_array(tensor: Any, name: str) -> np.ndarray:
    """A tensor of PyTorch, or any array, as NumPy has it; it may share the tensor's memory.

    Args:
      tensor: of any device; whether it requires a gradient makes no difference.
      name: of it, for the error.

    Raises:
      TypeError: it is of a kind that NumPy has none of: sparse, quantized, without data.
    """
    try:
        if hasattr(tensor, "detach"):
            tensor = tensor.detach().cpu()
        if str(getattr(tensor, "dtype", None)) == "torch.bfloat16":
            # PyTorch gives NumPy none; float32 holds its numbers, so that every bit stays.
            return np.asarray(tensor.float()).astype(jnp.bfloat16)
        return np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TypeError(
            f"{name} is {what_is(tensor)} that NumPy cannot read ({in_a_line(error)}); allowed: "
            "arrays, and dense tensors of PyTorch with a type of number that NumPy has, or bfloat16"
        ) from error


def _leaf_to_torch(leaf: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if leaf != "kernel":
        return x.reshape(shape)
    return x.transpose(3, 2, 0, 1) if len(shape) == 4 else x.reshape(shape[::-1]).T


def _leaf_from_torch(leaf: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if leaf != "kernel":
        return x.reshape(shape)
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T.reshape(shape)


def abstract_variables(model: Model) -> dict:
    """A model's variables as shapes: `jax.ShapeDtypeStruct` for each array."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


@functools.lru_cache(maxsize=64)
def tensors(model: Model) -> tuple[Tensor, ...]:
    """All tensors of a model's state dict but its `buffers`.

    Args:
      model: of `ghn_jax.zoo`.

    Raises:
      TypeError: it is another module.
    """
    if not isinstance(model, Model):
        raise TypeError(
            f"weights of {type(model).__name__} are not converted; allowed: the models of "
            "ghn_jax.zoo, an Architecture or its Graph"
        )
    leaves = {path: x.shape for path, x in flatten_dict(abstract_variables(model)).items()}
    found = []
    for path in leaves:
        if path[-2] in ATTENTION[1:]:
            continue
        paths = (path,)
        if path[-2] == ATTENTION[0]:
            paths = tuple((*path[:-2], part, path[-1]) for part in ATTENTION)
        rows, *rest = torch_shape(path, leaves[path])
        shapes = tuple(leaves[p] for p in paths)
        found.append(Tensor(torch_name(path[1:]), (rows * len(paths), *rest), paths, shapes))
    return tuple(found)


def _is_statistic(tensor: Tensor) -> bool:
    return tensor.paths[0][0] == "batch_stats"


def buffers(model: Model) -> dict[str, np.ndarray]:
    """What state dicts hold and Flax has none of, as it is the same in every model.

    Batch norm's counters of batches, which are 0 here, and of relative positions their places in
    the table of biases.

    Raises:
      TypeError: the model is not the zoo's.
    """
    found = {}
    for t in tensors(model):
        module, _, leaf = t.name.rpartition(".")
        if leaf == "running_mean":
            found[f"{module}.{COUNTER}"] = np.zeros((), np.int64)
        elif leaf == "relative_position_bias_table":
            found[f"{module}.relative_position_index"] = relative_position_index()
    return found


def _check_buffers(arrays: Mapping[str, np.ndarray], model: Model) -> None:
    for name, ours in buffers(model).items():
        if not ours.ndim or name not in arrays:
            continue
        if not np.array_equal(as_array(arrays[name], name), ours):
            raise ValueError(
                f"{name} is not that of {type(model).__name__}; allowed: torchvision's, or none"
            )


def _check_no_heads(arrays: Mapping[str, np.ndarray], model: Model) -> None:
    heads = [name for name in arrays if name.startswith(AUXILIARY)]
    if isinstance(model, GoogLeNet) and heads:
        raise ValueError(
            f"{len(heads)} of the tensors ({heads[0]}, ...) are of GoogLeNet's auxiliary heads, "
            "which training alone uses and this model has none of; leave them out: {name: x for "
            f"name, x in state_dict.items() if not name.startswith({AUXILIARY})}}"
        )


def to_torch(variables: Mapping, model: Model) -> dict[str, np.ndarray]:
    """A model's variables as the state dict of torchvision's model of that name.

    Args:
      variables: of the model. Without the collection 'batch_stats', as a hypernetwork predicts
        them, the statistics are left out, and `load_state_dict` needs `strict=False`.
      model: of `ghn_jax.zoo`.

    Returns:
      An array for each name: (out, in, height, width) for convolutions, (out, in) for linear
      layers, (3 features, features) for the input of attention; and the model's `buffers`, counters
      of batches only where there are statistics.

    Raises:
      TypeError: the model is not the zoo's, or the variables are none of a Linen model.
      ValueError: the variables are not the model's; the message lists what differs. Or they are the
        parameters alone, without their collection.
    """
    found = tensors(model)
    check_model_and_variables(model, variables)
    leaves = flatten_dict(variables)
    expected = [t for t in found if "batch_stats" in variables or not _is_statistic(t)]
    want = {"/".join(path) for t in expected for path in t.paths}
    check_names({"/".join(path) for path in leaves}, want, "variables")
    arrays: dict[str, np.ndarray] = {}
    for t in expected:
        parts = []
        for path, shape in zip(t.paths, t.shapes, strict=True):
            leaf = np.asarray(leaves[path])
            if leaf.shape != shape:
                raise ValueError(f"{'/'.join(path)} is {leaf.shape}, expected {shape}")
            parts.append(_leaf_to_torch(path[-1], leaf, torch_shape(path, shape)))
        array = np.concatenate(parts) if parts[1:] else parts[0]
        arrays[t.name] = np.array(array, order="C")  # of its own: JAX's may not be written to
    counted = "batch_stats" in variables
    return arrays | {n: x for n, x in buffers(model).items() if counted or not n.endswith(COUNTER)}


def from_torch(arrays: Mapping[str, np.ndarray], model: Model) -> dict:
    """The way back: a model's variables from torchvision's state dict.

    Args:
      arrays: as `to_torch` returns them; tensors of PyTorch will do, `dict(net.named_parameters())`
        as well. `buffers` may be missing; counters of batches are passed over.
      model: of `ghn_jax.zoo`.

    Returns:
      The collection 'params' and, if there are running statistics, 'batch_stats', with the arrays'
      types of numbers.

    Raises:
      TypeError: the model is not the zoo's, or the arrays are something else.
      ValueError: names, shapes or buffers are not the model's; the message lists them. Or there are
        auxiliary heads, which the model has none of.
    """
    check_arrays(arrays)
    _check_buffers(arrays, model)
    _check_no_heads(arrays, model)
    have = set(arrays) - buffers(model).keys()
    statistics = any(t.name in have for t in tensors(model) if _is_statistic(t))
    expected = [t for t in tensors(model) if statistics or not _is_statistic(t)]
    check_names(have, {t.name for t in expected}, "tensors")
    leaves = {}
    for t in expected:
        array = as_array(arrays[t.name], t.name)
        if array.shape != t.shape:
            raise ValueError(f"{t.name} is {array.shape}, expected {t.shape}")
        parts = np.split(array, len(t.paths))
        for path, shape, part in zip(t.paths, t.shapes, parts, strict=True):
            # Of its own: PyTorch may write to what it gave. Not `jnp.asarray`, which compiles a
            # program for each shape.
            leaves[path] = np.array(_leaf_from_torch(path[-1], part, shape), order="C")
    return jax.device_put(unflatten_dict(leaves))


def timm_name(name: str) -> str:
    """What timm calls a tensor of torchvision's vision transformer."""
    for torchvision, timm in TIMM.items():
        name = name.replace(torchvision, timm)
    return name


def to_timm(variables: Mapping, model: VisionTransformer) -> dict[str, np.ndarray]:
    """As `to_torch`, for timm's vision transformers ('vit_base_patch16_224', 'vit_small_...').

    timm's ResNets and DenseNets have torchvision's names; `to_torch` is for them.
    """
    _check_vit(model)
    return {timm_name(name): array for name, array in to_torch(variables, model).items()}


def from_timm(arrays: Mapping[str, np.ndarray], model: VisionTransformer) -> dict:
    """The way back: see `from_torch`."""
    _check_vit(model)
    check_arrays(arrays)
    names = {timm_name(t.name): t.name for t in tensors(model)}
    check_names(set(arrays), set(names), "tensors")
    return from_torch({names[name]: array for name, array in arrays.items()}, model)


def _check_vit(model: object) -> None:
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"timm's names are known for VisionTransformer, not for {type(model).__name__}; "
            "to_torch gives torchvision's names"
        )
