"""Batch norm with predicted parameters: their statistics are not predicted (paper C.1).

The paper runs networks on the statistics of each batch (`apply_on_batch`), or after some 200
training batches of statistics (`average_statistics`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
from flax import nnx
from flax.core.scope import union_filters

from ghn_jax.files.messages import what_is
from ghn_jax.tracing.given import (
    check_model_and_variables,
    copied_nodes,
    with_collection,
)
from ghn_jax.tracing.model_graph import unwrap
from ghn_jax.tracing.named_axes import bind_axes
from ghn_jax.tracing.sample import check_images, input_fits


def given(model, variables) -> tuple[nn.Module | nnx.Module, Any]:
    """A model and its variables, out of the objects that users have, checked for batch norm, too.

    Args:
      model: a Linen or NNX module, or what wraps one, as Hugging Face's models do.
      variables: of the model; None: those that an NNX module or a wrapper holds.

    Raises:
      TypeError, ValueError: as `check_model_and_variables`; or statistics that are not of a batch
        norm of Flax's.
    """
    if isinstance(model, nnx.Module):
        variables = model if variables is None else variables
    elif not isinstance(variables, (Mapping, type(None))):
        check_model_and_variables(unwrap(model, {})[0], variables)
    module, variables = unwrap(model, variables)
    check_model_and_variables(module, variables)
    if isinstance(module, nnx.Module):
        _check_elsewhere(_kept_by_nnx(variables), "nnx.BatchNorm")
    else:
        _check_elsewhere(_kept_elsewhere(variables), "flax.linen.BatchNorm")
    return module, variables


def _on_batch(momentum):
    """Calls every `nn.BatchNorm` on the statistics of its input, whatever it was told to use."""
    ours: list[nn.BatchNorm] = []  # the call that replaces another comes by here as well

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or ours:
            _check_statistics(module)
            return call(*args, **kwargs)
        kwargs = {**kwargs, "use_running_average": None}
        norm = module.clone(parent=None, name=None, use_running_average=False, momentum=momentum)
        ours.append(norm)
        try:
            # The second argument is use_running_average.
            y, updated = norm.apply(module.variables, *args[:1], mutable=["batch_stats"], **kwargs)
        finally:
            ours.pop()
        if module.is_mutable_collection("batch_stats"):
            for name, value in updated["batch_stats"].items():
                module.put_variable("batch_stats", name, value)
        return y

    return nn.intercept_methods(intercept)


def _check_statistics(module: nn.Module) -> None:
    """Raises ValueError for a module that keeps statistics of a batch, but is no `nn.BatchNorm`."""
    if isinstance(module, (nn.BatchNorm, nn.SpectralNorm)) or module.scope is None:
        return
    own = module.variables.get("batch_stats", {})
    # What an NNX module in Linen keeps is in one collection, however deep.
    within = isinstance(module, nnx.bridge.ToLinen)
    names = sorted(name for name, value in own.items() if within or not isinstance(value, Mapping))
    if names:
        path = "/".join(module.path) or "the model"
        who = f"{path} is a {type(module).__name__}, which"
        raise ValueError(_not_ours(who, names, "'batch_stats'", "flax.linen.BatchNorm"))


# Names of running statistics. A variance is one of batch norm; a mean and a standard deviation may
# be those of pixels, which a model keeps to normalise its input.
_MOMENT = r"(mean|avg|average|mu|std|stddev|sigma|var|variance)\d*"
_RUNNING = r"(running|moving|ema|population|pop|batch)"
_OF_NORMS = re.compile(
    rf"var\d*|variance\d*|running_?\w+|{_RUNNING}_?{_MOMENT}|{_MOMENT}_?{_RUNNING}"
)
_MAY_BE = re.compile(_MOMENT)
# Where, by its name, nothing is updated.
_FIXED = re.compile(r"const|buffer|fixed|frozen")


def _check_elsewhere(kept: Iterable[tuple[str, str, str, Any]], ours: str) -> None:
    """Looks for running statistics outside of where Flax's batch norm keeps them.

    Args:
      kept: (path of the layer, where it is kept, its name, value) of variables that are neither
        parameters nor of a batch norm of Flax's.
      ours: Flax's batch norm.

    Raises:
      ValueError: some are named as batch norm's; where it may be something else, a warning.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for path, where, name, value in kept:
        floats = jax.numpy.issubdtype(getattr(value, "dtype", int), jax.numpy.floating)
        lower = name.lower()
        if floats and value.ndim and (_OF_NORMS.fullmatch(lower) or _MAY_BE.fullmatch(lower)):
            layers.setdefault((path, where), []).append(name)
    for (path, where), names in layers.items():
        message = _not_ours(path or "the model", sorted(names), where, ours)
        sure = any(_OF_NORMS.fullmatch(name.lower()) for name in names)
        if sure and not _FIXED.search(where.lower()):
            raise ValueError(message)
        warnings.warn(
            f"if these are running statistics of batch norm, they are not replaced: {message}",
            RuntimeWarning,
            stacklevel=4,
        )


def _kept_elsewhere(variables: Mapping) -> Iterator[tuple[str, str, str, Any]]:
    """What `_check_elsewhere` takes, of a Linen model."""
    for collection, tree in variables.items():
        if collection in ("params", "batch_stats", "intermediates", "perturbations"):
            continue
        for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
            # An attribute is the array in a box of Linen's.
            named = tuple(k for k in path if not isinstance(k, jax.tree_util.GetAttrKey))
            parts = jax.tree_util.keystr(named, simple=True, separator="/").split("/")
            yield "/".join(parts[:-1]), repr(collection), parts[-1], value


def apply_on_batch(
    model: nn.Module | nnx.Module, variables, images: jax.Array, **call
) -> jax.Array:
    """A model's output with batch norm on the statistics of the batch.

    All else runs as it does without: dropout stays off unless `call` turns it on.

    Args:
      model: a module with `BatchNorm`s of Linen or NNX in it, or one of Hugging Face's models.
      variables: of the model; of an NNX model the module that holds them, as `predict_model`
        returns it, or None for the model's own. They are not changed.
      images: (B, H, W, C), a batch that statistics can be taken of; the paper's have 64.
      **call: keyword arguments of the model's call. `nnx.Rngs` among them are not used up.

    Raises:
      TypeError: the model is no module, the variables are not of its kind, or the images are no
        array of numbers where the model takes one.
      ValueError: the model cannot be called with images of this shape; a batch norm that is not
        Flax's, whose statistics cannot be replaced; or the variables have no 'params', or are
        shapes. Where variables may be statistics by their names ('mean' alone, or in a collection
        of constants), a warning.
    """
    model, variables = given(model, variables)
    check_images(images)
    if isinstance(model, nnx.Module):
        return _nnx_on_batch(variables, images, copied_nodes(call))[0]
    return linen_on_batch(model, variables, images, call)


def linen_on_batch(model: nn.Module, variables: Mapping, images: jax.Array, call: Mapping):
    """`apply_on_batch` of what `given` gave: with what was updated, where `call` says so."""
    run = bind_axes(lambda variables, images: model.apply(variables, images, **call))
    with input_fits(model, images, "images"), _on_batch(momentum=0.0):
        return cast(jax.Array, run(variables, images))


def average_statistics(
    model: nn.Module | nnx.Module, variables, batches: Iterable[jax.Array], **call
):
    """A model's variables with the statistics of all its batch norms averaged anew.

    Args:
      model: the model.
      variables: of the model, as `apply_on_batch` takes them; its statistics so far do not matter.
      batches: of images, (B, H, W, C) each; the paper takes 200 of the training set.
      **call: keyword arguments of the model's call. What else is updated (`mutable`) is not kept.

    Returns:
      The variables with 'batch_stats' set to the means over the batches, in a tree as they came; a
      new module for an NNX module.

    Raises:
      TypeError: the model is no module, the variables are not of its kind, or the batches are not
        several.
      ValueError: the model has no statistics, or there is no batch; or as `apply_on_batch`.
    """
    model, variables = given(model, variables)
    if hasattr(batches, "shape") and len(batches.shape) <= 4:
        raise ValueError(
            f"batches is one array {tuple(batches.shape)}; give several batches of images "
            "(B, H, W, C), or [images] for one"
        )
    if isinstance(batches, (str, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is {what_is(batches)}; allowed: several batches of images (B, H, W, C), or "
            "[images] for one"
        )
    batches = map(_check_batch, batches)
    if isinstance(model, nnx.Module):
        return _average_nnx(variables, batches, call)
    if not variables.get("batch_stats"):
        raise ValueError("the variables have no 'batch_stats'; only batch norm has statistics")
    call = {**call, "mutable": union_filters(call.get("mutable", False), ["batch_stats"])}

    @jax.jit
    def update(variables, images):
        return linen_on_batch(model, variables, images, call)[1]["batch_stats"]

    mean = _mean(update(variables, images) for images in batches)
    return with_collection(variables, "batch_stats", jax.tree.leaves(mean))


def _check_batch(images):
    if not hasattr(images, "shape"):
        raise ValueError(
            f"a batch is a {type(images).__name__}; give arrays of images (B, H, W, C), "
            "without their labels"
        )
    check_images(images)
    return images


def _mean(trees: Iterable):
    """The mean of trees of arrays, without keeping them all."""
    mean = None
    for count, tree in enumerate(trees, start=1):
        weight = 1 / count
        mean = tree if mean is None else jax.tree.map(
            lambda old, new, weight=weight: old + (new - old) * weight, mean, tree
        )  # fmt: skip
    if mean is None:
        raise ValueError("no batch was given; the paper takes 200 of the training set")
    return mean


# --- NNX: modules that hold their statistics ------------------------------------------------------


def put_on_batch(module: nnx.Module) -> None:
    """Makes all batch norms in a module run on the batch, and keep these statistics."""
    for _, part in list(nnx.iter_modules(module)):
        if isinstance(part, nnx.BatchNorm):
            # By their class: an argument of the call comes before their attributes.
            part.__class__ = _on_batch_class(type(part))


def _on_batch_class(kind: Any) -> Any:
    """A subclass that runs on the statistics of its input, whatever it is told to use."""

    def on_batch(self, x, use_running_average=None, **options):
        del use_running_average
        self.momentum = 0.0
        return kind.__call__(self, x, use_running_average=False, **options)

    return type(kind)(kind.__name__, (kind,), {"__call__": on_batch})


def _kept_by_nnx(module: nnx.Module) -> list[tuple[str, str, str, Any]]:
    """What `_check_elsewhere` takes, of an NNX model.

    Raises:
      ValueError: an `nnx.BatchStat` is not of an `nnx.BatchNorm`.
    """
    parts = dict(nnx.iter_modules(module))
    own: dict[tuple, list[str]] = {}
    others = []
    for path, value in nnx.iter_graph(module):
        if not isinstance(value, nnx.Variable) or isinstance(value, (nnx.Param, nnx.RngState)):
            continue
        # The module that it is in, perhaps within its lists and dicts.
        owner = next(path[:n] for n in range(len(path) - 1, -1, -1) if path[:n] in parts)
        if isinstance(parts[owner], (nnx.BatchNorm, nnx.SpectralNorm)):
            continue
        if isinstance(value, nnx.BatchStat):
            own.setdefault(owner, []).append("/".join(map(str, path[len(owner) :])))
        elif not isinstance(value, nnx.Intermediate):
            kind = type(value)
            kept = f"nnx.{kind.__name__}" if kind.__module__.startswith("flax.") else kind.__name__
            where = "/".join(map(str, path[:-1]))
            others.append((where, kept, str(path[-1]), value.get_value()))
    for owner, names in own.items():
        where = "/".join(map(str, owner)) or "the model"
        who = f"{where} is a {type(parts[owner]).__name__}, which"
        raise ValueError(_not_ours(who, sorted(names), "nnx.BatchStat", "nnx.BatchNorm"))
    return others


def _not_ours(who: str, names: Sequence[str], kept: str, ours: str) -> str:
    return (
        f"{who} keeps {', '.join(names)} in {kept} and is no {ours}: how to run it on the batch, "
        "as a batch norm, is not known here; call the model in its own training mode, or use "
        f"{ours}"
    )


def _nnx_on_batch(module: nnx.Module, images: jax.Array, arguments: Callable[[], Mapping]):
    """The output of an NNX module, and its statistics: those of the batch.

    Args:
      module: is not changed.
      images: a batch.
      arguments: makes the call's keyword arguments, for each trace its own.
    """
    definition, *states = nnx.split(module, nnx.BatchStat, ...)

    @bind_axes
    def run(states, images):
        copy = nnx.merge(definition, *jax.tree.map(lambda x: x, states))
        put_on_batch(copy)
        return copy(images, **arguments()), nnx.state(copy, nnx.BatchStat)

    with input_fits(module, images, "images"):
        return run(states, images)


def _average_nnx(module: nnx.Module, batches: Iterable[jax.Array], call: Mapping) -> nnx.Module:
    definition, *states = nnx.split(module, nnx.BatchStat, ...)
    statistics, rest = states
    if not jax.tree.leaves(statistics):
        raise ValueError("the module has no nnx.BatchStat; only batch norm has statistics")
    arguments = copied_nodes(call)

    @jax.jit
    def update(statistics, rest, images):
        return _nnx_on_batch(nnx.merge(definition, statistics, rest), images, arguments)[1]

    mean = _mean(update(statistics, rest, images) for images in batches)
    return nnx.merge(definition, mean, jax.tree.map(lambda x: x, rest))
