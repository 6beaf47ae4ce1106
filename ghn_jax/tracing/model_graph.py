"""Flax models, Linen's and NNX's, as the graph reader and `predict` need them.

    graph = ghn_jax.model_graph(model, jnp.zeros((1, 32, 32, 3)))

A model is traced with shapes only: nothing is executed, whatever its size.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.files.messages import what_is
from ghn_jax.tracing.calls import (
    check_linen_options,
    check_nnx_call,
    check_seed,
    method_exists,
    values_are_not_read,
)
from ghn_jax.tracing.given import check_variables, copied_nodes, with_collection
from ghn_jax.tracing.initial_values import filled_with, read_init
from ghn_jax.tracing.jaxpr_graph import Reading, read_graph
from ghn_jax.tracing.named_axes import bind_axes
from ghn_jax.tracing.outputs import choose_output
from ghn_jax.tracing.sample import check_sample, input_fits

# Of the settings of JAX and Flax, those that decide on types, initial values and trees.
_SETTINGS = (
    (jax.config, ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")),
    (flax.config, ("flax_return_frozendict", "flax_fix_rng_separator", "flax_array_ref")),
)


class TracedModel(NamedTuple):
    """A model as its graph and its parameters, numbered as in `jax.tree.leaves`.

    Attributes:
      reading: the graph, and where its nodes' tensors go.
      paths: of the parameters, 'layer1_0/conv1/kernel'.
      leaves: of the parameters; shapes and types are read.
      initial: numbers of parameters -> their initial values.
      constant: number of a parameter -> what it is filled with at first; None: with several
        numbers, or it is not known.
      rebuild: new values of all parameters -> what the model is called with (Linen: all its
        variables; NNX: a module).
    """

    reading: Reading
    paths: list[str]
    leaves: list[Any]
    initial: Callable[[Sequence[int]], list[jax.Array]]
    constant: Callable[[int], float | None]
    rebuild: Callable[[Sequence[jax.Array]], Any]


def _paths(tree) -> list[str]:
    """'layer1_0/conv1/kernel' for each leaf."""

    def part(key) -> str:
        if isinstance(key, jax.tree_util.GetAttrKey):
            return ""  # the array in a box: Linen's metadata, NNX's variables
        return str(next(getattr(key, a) for a in ("key", "idx") if hasattr(key, a)))

    return [
        "/".join(filter(None, map(part, path)))
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def trace(
    model: nn.Module | nnx.Module,
    sample,
    virtual_edges: int,
    *,
    initial: Mapping | None = None,
    seed: int = 0,
    output: str | int | None = None,
    call: Mapping[str, Any],
) -> TracedModel:
    """Traces a model; see `predict_model` for the arguments and errors.

    Args:
      model: a Linen or NNX module, or what wraps one.
      sample: an input, or its shape.
      virtual_edges: see `graph.build_graph`.
      initial: a Linen model's variables; None: those that its `init` makes.
      seed: of `init`.
      output: which of the arrays that it returns; see `outputs.choose_output`.
      call: keyword arguments of the model's call.
    """
    sample = check_sample(sample)
    check_seed(seed)
    model, initial = unwrap(model, initial)
    if isinstance(model, nnx.Module):
        if initial is not None:
            raise ValueError("an NNX module holds its initial values; initial is for Linen models")
        check_nnx_call(model)
        with input_fits(model, sample, "a sample"), values_are_not_read(model):
            return _trace_nnx(model, sample, virtual_edges, output, call)
    if isinstance(model, nn.Module):
        return _trace_linen(model, sample, virtual_edges, initial, seed, output, call)
    raise TypeError(
        f"the model is {what_is(model)}; allowed: an instance of a module of flax.linen or flax.nnx"
    )


def unwrap(model, initial: Mapping | None):
    """The module and the variables of an object that holds both, as Hugging Face's models do."""
    if isinstance(model, (nn.Module, nnx.Module, type)):
        return model, initial
    module = getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        return model, initial
    if initial is not None and not isinstance(initial, Mapping):
        return module, initial
    if initial is None:
        try:
            initial = model.params
        except (AttributeError, ValueError):  # made without parameters
            return module, None
    return module, initial if "params" in initial else {"params": initial}


class _Identity:
    """An object as a key: itself, not what equals it, as classes that it uses may be redefined."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value is other.value

    def __hash__(self):
        return id(self.value)


def _argument_key(value):
    """What is the same for arguments that are the same to a model, and for these alone.

    `==` will not do: True == 1, and classes say themselves what is equal, or how it is written.

    Raises:
      TypeError: the argument is none of which that can be told, as it may change.
    """
    if isinstance(value, (type, FunctionType, enum.Enum)):
        return _Identity(value)
    if type(value) in (str, int, float, bool, type(None)):
        return type(value), repr(value)
    if type(value) in (tuple, list):
        return type(value), tuple(_argument_key(part) for part in value)
    raise TypeError(f"{type(value).__name__} is no key")


class _Call:
    """Arguments of a call, as a key; see `_argument_key`."""

    def __init__(self, call: Mapping[str, Any]):
        self.call = dict(call)
        self._key = tuple((name, _argument_key(call[name])) for name in sorted(call))

    def __eq__(self, other):
        return self._key == other._key

    def __hash__(self):
        return hash(self._key)


@functools.lru_cache(maxsize=8)
def _trace_linen_once(model: _Identity, sample, virtual_edges, seed, output, call: _Call, settings):
    del settings
    return _trace_linen(model.value, sample, virtual_edges, None, seed, output, call.call)


def trace_once(
    model, sample, virtual_edges: int, *, initial, seed, output=None, call
) -> TracedModel:
    """`trace`, or what it gave for the same Linen module before; not to be changed.

    Tracing takes most of the time of a prediction. NNX modules may have changed since, and are
    traced again.
    """
    if isinstance(model, nn.Module) and initial is None:
        settings = tuple(
            getattr(config, name, None) for config, names in _SETTINGS for name in names
        )
        sizes = check_sample(sample), virtual_edges
        check_seed(seed)
        try:
            key = _Identity(model), *sizes, seed, output, _Call(call), settings
            hash(key)
        except TypeError:  # an argument of the call, say an array
            pass
        else:
            return _trace_linen_once(*key)
    options = {"initial": initial, "seed": seed, "output": output}
    return trace(model, sample, virtual_edges, **options, call=call)


_ALLOWED_INITIAL = "allowed: all that model.init gives, {'params': {...}, 'batch_stats': {...}}"


def _trace_linen(model, sample, virtual_edges, initial, seed, output, call) -> TracedModel:
    check_linen_options(call)
    with (
        input_fits(model, sample, "a sample"),
        values_are_not_read(model),
        method_exists(model, call.get("method")),
        _initial_fits(model, initial),
    ):
        return _trace_variables(model, sample, virtual_edges, initial, seed, output, call)


@contextlib.contextmanager
def _initial_fits(model, initial):
    """Says so where the variables given are not a model's."""
    if initial is None:
        yield
        return
    name = type(model).__name__
    if not isinstance(initial, Mapping):
        raise ValueError(f"initial is a {type(initial).__name__}; {_ALLOWED_INITIAL}")
    if not isinstance(initial.get("params"), Mapping):
        keys = ", ".join(map(str, [*initial][:5])) or "nothing"
        raise ValueError(
            f"initial is not of this model ({name}): it has {keys}, not 'params'; "
            f"{_ALLOWED_INITIAL}. Parameters alone are initial={{'params': ...}}"
        )
    try:
        yield
    except (
        flax.errors.ScopeParamNotFoundError,
        flax.errors.ScopeParamShapeError,
        flax.errors.ScopeCollectionNotFound,
        flax.errors.ScopeVariableNotFoundError,
        flax.errors.ModifyScopeVariableError,
    ) as error:
        raise ValueError(
            f"initial is not of this model ({name}) called with this sample and these arguments: "
            f"{str(error).partition(' (https')[0]} {_ALLOWED_INITIAL}"
        ) from error


def _trace_variables(model, sample, virtual_edges, initial, seed, output, call) -> TracedModel:
    key = jax.random.key(seed)
    # What `apply` takes beside the call's own arguments.
    call = dict(call)
    rngs = {"params": key, **_rngs(call.pop("rngs", None))}
    mutable = call.pop("mutable", False)
    if initial is None:
        # Other streams of random numbers than 'params' (dropout) fall back to it.
        init = bind_axes(functools.partial(_init_linen, model, call, rngs, sample))
        variables, compute, constant = read_init(init, key)
    else:
        variables = initial
        values = jax.tree.leaves(variables)

        def compute(wanted):
            return [values[i] for i in wanted]

        constant = _constants(values)

    if not jax.tree.leaves(variables.get("params", {})):
        raise ValueError(f"{type(model).__name__} has no parameters; nothing to predict")
    structure = jax.tree.structure(variables)  # of dicts, FrozenDicts, boxes: so it is given back
    count = len(jax.tree.leaves(variables))
    numbers = jax.tree.unflatten(structure, range(count))
    number_of = jax.tree.leaves(numbers["params"])
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def apply(params, rest, x):
        # Batch norm may be told to update its statistics; what it updates is of no interest.
        variables = {"params": params, **rest}
        return choose_output(
            model.apply(variables, x, rngs=rngs, mutable=_mutable(rest, mutable), **call)[0], output
        )

    def rebuild(leaves):
        others = sorted(set(range(count)) - set(number_of))
        values = dict(zip(number_of, leaves, strict=True))
        values |= zip(others, compute(others) if others else [], strict=True)
        return jax.tree.unflatten(structure, [values[i] for i in range(count)])

    params = variables["params"]
    paths = _paths(params)
    return TracedModel(
        read_graph(bind_axes(apply), params, rest, sample, paths, virtual_edges),
        paths,
        jax.tree.leaves(params),
        lambda wanted: compute([number_of[i] for i in wanted]),
        lambda leaf: constant(number_of[leaf]),
        rebuild,
    )


def _rngs(given) -> Mapping:
    """Random keys by name, as `apply` takes them: a single one is for all."""
    return given if isinstance(given, Mapping) else {} if given is None else {"params": given}


def _mutable(own: Mapping, given):
    """What may be updated: a model's own collections, and those given as `apply` takes them."""
    if isinstance(given, (str, list, tuple, set)):
        return [*own, *([given] if isinstance(given, str) else given)]
    return bool(given) or list(own)


def _init_linen(model, call, rngs, sample, key):
    rngs = {**rngs, "params": key}
    return model.init(rngs, jax.numpy.zeros(sample.shape, sample.dtype), **call)


def _trace_nnx(model, sample, virtual_edges, output, call) -> TracedModel:
    definition, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:
        raise ValueError(f"{type(model).__name__} has no nnx.Param; nothing to predict")

    arguments = copied_nodes(call)

    def apply(params, rest, x):
        module = nnx.merge(definition, _copy(params), _copy(rest))  # of this trace, to be updated
        return choose_output(module(x, **arguments()), output)

    def initial(wanted):
        abstract = [paths[i] for i in wanted if isinstance(leaves[i], jax.ShapeDtypeStruct)]
        if abstract:
            raise ValueError(
                f"the module is abstract (nnx.eval_shape), but {abstract[0]} stays at its initial "
                "value; give a module with arrays"
            )
        return [leaves[i] for i in wanted]

    paths = _paths(params)
    return TracedModel(
        read_graph(bind_axes(apply), params, rest, sample, paths, virtual_edges),
        paths,
        leaves,
        initial,
        _constants(leaves),
        lambda values: nnx.merge(definition, jax.tree.unflatten(treedef, values), _copy(rest)),
    )


def _constants(leaves: Sequence) -> Callable[[int], float | None]:
    """`TracedModel.constant` of given values; of placeholders, all of them constant, none is."""

    def constant(leaf: int) -> float | None:
        value = leaves[leaf]
        return filled_with(value) if np.size(value) > 1 else None

    @functools.cache
    def placeholders() -> bool:
        return all(constant(i) is not None for i, v in enumerate(leaves) if np.ndim(v) > 1)

    return lambda leaf: None if placeholders() else constant(leaf)


def _copy(state):
    """The same arrays in new variables: what a new module updates is not the old one's."""
    return jax.tree.map(lambda x: x, state)


def model_graph(
    model: nn.Module | nnx.Module,
    sample,
    virtual_edges: int = 50,
    *,
    output: str | int | None = None,
    **call,
) -> Graph:
    """The computational graph of any Flax model (§ 3), for `draw` or `GHN.embed`.

    Args:
      model: a Linen or NNX module; see `predict_model`.
      sample: an input (B, H, W, C), or its `jax.ShapeDtypeStruct`.
      virtual_edges: see `build_graph`.
      output: which of the arrays that the model returns; see `predict_model`.
      **call: keyword arguments of the model's call (train=False).

    Raises:
      TypeError, ValueError: as `predict_model`.
    """
    return trace(model, sample, virtual_edges, output=output, call=call).reading.graph


def map_parameters(variables, function: Callable[[str, jax.Array], jax.Array]):
    """Applies a function of (path, array) to all parameters.

    Args:
      variables: a Linen model's variables, or an NNX module.
      function: gets paths as reports have them: 'layer1_0/conv1/kernel'.

    Returns:
      New variables, in a tree as they came (a FrozenDict of a FrozenDict), or a new module; those
      given are not changed.

    Raises:
      TypeError, ValueError: they are no variables, or parameters alone, or the module is abstract.
    """
    check_variables(variables)
    if isinstance(variables, nnx.Module):
        definition, *states = nnx.split(variables, nnx.Param, ...)
        params, rest = states
        return nnx.merge(definition, _map_tree(params, function), _copy(rest))
    if "params" not in variables:
        return _copy(variables)
    mapped = _map_tree(variables["params"], function)
    return with_collection(variables, "params", jax.tree.leaves(mapped))


def _map_tree(tree, function):
    leaves, treedef = jax.tree.flatten(tree)
    mapped = [function(p, leaf) for p, leaf in zip(_paths(tree), leaves, strict=True)]
    return jax.tree.unflatten(treedef, mapped)


def place_tensor(tensor, roles: Sequence[str], shape: tuple[int, ...]):
    """A node's tensor in the layout of a model's parameter.

    Args:
      tensor: as `tiling.node_tensors` makes it; an embedding as (positions, channels).
      roles: of the parameter's axes (`findings.Placement`).
      shape: of the parameter.
    """
    axes = sorted(range(len(shape)), key=lambda axis: ("hwsioc".find(roles[axis]), axis))
    back = [int(i) for i in np.argsort(axes)]
    return tensor.reshape([shape[axis] for axis in axes]).transpose(back)
