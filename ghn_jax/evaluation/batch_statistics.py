"""Batch norm with predicted parameters: their statistics are not predicted (paper C.1).

The paper runs networks on the statistics of each batch (`apply_on_batch`), or after some 200
training batches of statistics (`average_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
from flax import nnx

from ghn_jax.tracing.named_axes import bind_axes


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
    names = sorted(name for name, value in own.items() if not isinstance(value, Mapping))
    if names:
        path = "/".join(module.path) or "the model"
        raise ValueError(_not_ours(path, module, names, "'batch_stats'", "flax.linen.BatchNorm"))


def apply_on_batch(
    model: nn.Module | nnx.Module, variables, images: jax.Array, **call
) -> jax.Array:
    """A model's output with batch norm on the statistics of the batch.

    All else runs as it does without: dropout stays off unless `call` turns it on.

    Args:
      model: a module with `BatchNorm`s of Linen or NNX in it.
      variables: of the model; of an NNX model the module that holds them, as `predict_model`
        returns it, or None for the model's own. They are not changed.
      images: (B, H, W, C), a batch that statistics can be taken of; the paper's have 64.
      **call: keyword arguments of the model's call.

    Raises:
      ValueError: a batch norm that is not Flax's, whose statistics cannot be replaced.
    """
    if isinstance(model, nnx.Module):
        return _nnx_on_batch(model if variables is None else variables, images, call)[0]
    run = bind_axes(lambda variables, images: model.apply(variables, images, **call))
    with _on_batch(momentum=0.0):
        return cast(jax.Array, run(variables, images))


def average_statistics(
    model: nn.Module | nnx.Module, variables, batches: Iterable[jax.Array], **call
):
    """A model's variables with the statistics of all its batch norms averaged anew.

    Args:
      model: the model.
      variables: of the model, as `apply_on_batch` takes them; its statistics so far do not matter.
      batches: of images, (B, H, W, C) each; the paper takes 200 of the training set.
      **call: keyword arguments of the model's call.

    Returns:
      The variables with 'batch_stats' set to the means over the batches; a new module for an NNX
      module.

    Raises:
      ValueError: the model has no statistics, or there is no batch; or a batch norm is not Flax's.
    """
    if isinstance(model, nnx.Module):
        return _average_nnx(model if variables is None else variables, batches, call)
    if not variables.get("batch_stats"):
        raise ValueError("the variables have no 'batch_stats'; only batch norm has statistics")

    @jax.jit
    @bind_axes
    def update(variables, images):
        with _on_batch(momentum=0.0):
            _, updated = model.apply(variables, images, mutable=["batch_stats"], **call)
        return updated["batch_stats"]

    mean = _mean(update(variables, images) for images in batches)
    return {**variables, "batch_stats": mean}


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


def _call_on_batch(self: nnx.BatchNorm, x, use_running_average=None, **options):
    """Of a subclass made for it: on the statistics of its input, whatever it was told to use."""
    del use_running_average
    self.momentum = 0.0
    return super(type(self), self).__call__(x, use_running_average=False, **options)


def _put_on_batch(module: nnx.Module) -> None:
    """Makes all batch norms in a module run so, and keep these statistics."""
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            kind: Any = type(part)
            # By their class: an argument of the call comes before their attributes.
            part.__class__ = type(kind)(kind.__name__, (kind,), {"__call__": _call_on_batch})
        elif not isinstance(part, nnx.SpectralNorm):
            names = sorted(n for n, v in vars(part).items() if isinstance(v, nnx.BatchStat))
            if names:
                where = "/".join(map(str, path)) or "the model"
                raise ValueError(_not_ours(where, part, names, "nnx.BatchStat", "nnx.BatchNorm"))


def _not_ours(where: str, module, names: Sequence[str], kept: str, ours: str) -> str:
    return (
        f"{where} is a {type(module).__name__}, which keeps {', '.join(names)} in {kept} "
        f"and is no {ours}: how to run it on the batch is not known here; call the model in its "
        f"own training mode, or use {ours}"
    )


def _nnx_on_batch(module: nnx.Module, images: jax.Array, call: Mapping):
    """The output of an NNX module, and its statistics: those of the batch."""
    definition, *states = nnx.split(module, nnx.BatchStat, ...)

    @bind_axes
    def run(states, images):
        copy = nnx.merge(definition, *jax.tree.map(lambda x: x, states))
        _put_on_batch(copy)
        return copy(images, **call), nnx.state(copy, nnx.BatchStat)

    return run(states, images)


def _average_nnx(module: nnx.Module, batches: Iterable[jax.Array], call: Mapping) -> nnx.Module:
    definition, *states = nnx.split(module, nnx.BatchStat, ...)
    statistics, rest = states
    if not jax.tree.leaves(statistics):
        raise ValueError("the module has no nnx.BatchStat; only batch norm has statistics")

    @jax.jit
    def update(statistics, rest, images):
        return _nnx_on_batch(nnx.merge(definition, statistics, rest), images, call)[1]

    mean = _mean(update(statistics, rest, images) for images in batches)
    return nnx.merge(definition, mean, jax.tree.map(lambda x: x, rest))
