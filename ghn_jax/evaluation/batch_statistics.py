"""Batch norm with predicted parameters: their statistics are not predicted (paper C.1).

The paper runs networks on the statistics of each batch (`apply_on_batch`), or after some 200
training batches of statistics (`average_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import flax.linen as nn
import jax

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
        raise ValueError(
            f"{path} is a {type(module).__name__}, which keeps {', '.join(names)} in 'batch_stats' "
            "and is no flax.linen.BatchNorm: how to run it on the batch is not known here; call "
            "the model in its own training mode, with mutable=['batch_stats'], or use nn.BatchNorm"
        )


def apply_on_batch(model: nn.Module, variables: Mapping, images: jax.Array, **call) -> jax.Array:
    """A Linen model's output with batch norm on the statistics of the batch.

    All else runs as it does without: dropout stays off unless `call` turns it on.

    Args:
      model: a module with `nn.BatchNorm`s in it.
      variables: of the model.
      images: (B, H, W, C), a batch that statistics can be taken of; the paper's have 64.
      **call: keyword arguments of the model's call.

    Raises:
      ValueError: a batch norm that is not `nn.BatchNorm`, whose statistics cannot be replaced.
    """
    run = bind_axes(lambda variables, images: model.apply(variables, images, **call))
    with _on_batch(momentum=0.0):
        return cast(jax.Array, run(variables, images))


def average_statistics(
    model: nn.Module, variables: Mapping, batches: Iterable[jax.Array], **call
) -> dict:
    """A Linen model's variables with the statistics of all its `nn.BatchNorm`s averaged anew.

    Args:
      model: the model; NNX modules do the same in training mode:
        `model.set_attributes(use_running_average=False)`.
      variables: of the model; its statistics so far do not matter.
      batches: of images, (B, H, W, C) each; the paper takes 200 of the training set.
      **call: keyword arguments of the model's call.

    Returns:
      The variables with 'batch_stats' set to the means over the batches.

    Raises:
      ValueError: the model has no statistics, or there is no batch; or a batch norm is not
        `nn.BatchNorm`.
    """
    if not variables.get("batch_stats"):
        raise ValueError("the variables have no 'batch_stats'; only batch norm has statistics")

    @jax.jit
    @bind_axes
    def update(variables, images, momentum):
        with _on_batch(momentum):
            _, updated = model.apply(variables, images, mutable=["batch_stats"], **call)
        return updated["batch_stats"]

    count = 0
    variables = dict(variables)
    for images in batches:
        # The first batch replaces what was there, the n-th has a weight of 1 / n.
        variables["batch_stats"] = update(variables, images, count / (count + 1))
        count += 1
    if not count:
        raise ValueError("no batch was given; the paper takes 200 of the training set")
    return variables
