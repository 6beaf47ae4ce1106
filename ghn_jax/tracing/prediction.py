"""Parameters for any Flax model, unmodified.

    variables, report = ghn_jax.predict_model(ghn, ghn_variables, model, jnp.zeros((1, 32, 32, 3)))
    logits = model.apply(variables, images)

The model's call is traced to a computational graph (`tracing`), the hypernetwork predicts its
nodes' tensors (`GHN.tensors`), and each goes to its place in the model's tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.tiling import tile_kind
from ghn_jax.tracing.jaxpr_graph import Placement
from ghn_jax.tracing.model_graph import place_tensor, trace_once
from ghn_jax.tracing.report import (
    INITIAL,
    ParameterReport,
    PredictionReport,
    he_norm,
    how_made,
    primitive_of,
    shape_note,
    shape_of,
)


def predict_model(
    ghn: GHN,
    ghn_variables,
    model: nn.Module | nnx.Module,
    sample,
    *,
    initial: Mapping | None = None,
    keep_head: bool = False,
    strict: bool = False,
    seed: int = 0,
    **call,
) -> tuple[Any, PredictionReport]:
    """Predicts the parameters of any Flax model.

    What no node makes (class tokens, scales without a norm, kernels larger than the
    hypernetwork's) stays at its initial value, and the report says why. So does the classifier of a
    model with another number of classes than the hypernetwork's: to fine-tune it, its shape is
    encoded as if it had the hypernetwork's classes, as in the authors' code.

    Args:
      ghn, ghn_variables: the hypernetwork.
      model: a Linen or NNX module, as it is called to give logits.
      sample: an input (B, H, W, C), or its `jax.ShapeDtypeStruct`.
      initial: a Linen model's variables, for what is not predicted; None: `model.init`'s.
      keep_head: leave the classifier at its initial value whatever its classes.
      strict: raise an error where a parameter would stay at its initial value.
      seed: of the initial values.
      **call: keyword arguments of the model's call (train=False).

    Returns:
      For a Linen module its variables: 'params' predicted and all other collections at their
      initial values (batch norm's running averages: see `batch_statistics`). For an NNX module a
      new module; the one given is not changed. And the report.

    Raises:
      TypeError: the model is no Flax module.
      ValueError: the model cannot be traced (several outputs; loops or branches with parameters
        in them), no
        parameter belongs to a primitive, or `strict` and some parameter is left.
    """
    traced = trace_once(model, sample, ghn.virtual_edges, initial=initial, seed=seed, call=call)
    reading = traced.reading
    placements, reasons = dict(reading.placements), dict(reading.reasons)
    notes = list(reading.notes)
    if len(sample.shape) != 4:
        notes.append(
            f"the input {tuple(sample.shape)} is not a batch of images (B, H, W, C), which "
            "hypernetworks are trained for"
        )
    graph, why = _head(reading.graph, ghn.num_classes, keep_head)
    if not graph.classifier:
        notes.append("the output is not made by a linear layer; no node is a classifier")
    for leaf, placement in list(placements.items()):
        reason: str | None
        if why and placement.node in graph.classifier:
            reason = why
        else:
            reason = ghn.undecodable(shape_of(graph, placement.node))
        if reason:
            reasons[leaf] = reason
            del placements[leaf]
    if strict and reasons:
        listed = "; ".join(f"{traced.paths[i]}: {reasons[i]}" for i in sorted(reasons)[:10])
        raise ValueError(
            f"{len(reasons)} of {len(traced.paths)} parameters would be left at their initial "
            f"values ({listed}); give strict=False to leave them"
        )

    tensors = ghn.tensors(ghn_variables, graph, sorted({p.node for p in placements.values()}))
    kept = [leaf for leaf in range(len(traced.leaves)) if _needs_initial(placements.get(leaf))]
    values = dict(zip(kept, traced.initial(kept) if kept else [], strict=True))
    for leaf, placement in placements.items():
        tensor = tensors[placement.node][placement.tensor]
        values[leaf] = _laid_out(tensor, placement, traced.leaves[leaf], values.get(leaf))
    ordered = [values[leaf] for leaf in range(len(traced.leaves))]

    rows = []
    for leaf, value in enumerate(ordered):
        is_traced = isinstance(value, jax.core.Tracer)
        norm = None if is_traced else float(np.linalg.norm(np.asarray(value, np.float32)))
        rows.append(
            _row(
                ghn, graph, traced.paths[leaf], value.shape, placements.get(leaf),
                reasons.get(leaf, ""), norm,
            )
        )  # fmt: skip
    return traced.rebuild(ordered), PredictionReport(tuple(rows), tuple(notes), len(graph))


def _head(graph: Graph, num_classes: int, keep: bool) -> tuple[Graph, str]:
    """The graph with its classifier as it is to be encoded, and why that is not predicted."""
    if not graph.classifier:
        return graph, ""
    classes = shape_of(graph, graph.classifier[0])[0]
    if classes == num_classes:
        return graph, "keep_head" if keep else ""
    shapes = list(graph.param_shapes)
    for node in graph.classifier:
        shapes[node] = (num_classes, *shape_of(graph, node)[1:])
    graph = dataclasses.replace(graph, param_shapes=shapes)
    return graph, f"the classifier is for {classes} classes, the hypernetwork for {num_classes}"


def _needs_initial(placement: Placement | None) -> bool:
    return placement is None or placement.skip > 0


def _laid_out(tensor, placement: Placement, leaf, initial) -> jax.Array:
    """A parameter in the model's layout and type."""
    shape, roles, skip = tuple(leaf.shape), placement.roles, placement.skip
    if placement.tensor == "embedding":
        tensor = tensor.reshape(-1, tensor.shape[-1])
    if not skip:
        return jnp.asarray(place_tensor(tensor, roles, shape), leaf.dtype)
    axis = roles.index("s")
    grid = (*shape[:axis], shape[axis] - skip, *shape[axis + 1 :])
    first = jax.lax.slice_in_dim(initial, 0, skip, axis=axis)
    return jnp.concatenate(
        [first, jnp.asarray(place_tensor(tensor, roles, grid), leaf.dtype)], axis
    )


def _row(ghn, graph, path, shape, placement, reason, norm) -> ParameterReport:
    if placement is None:
        return ParameterReport(path, tuple(shape), (), "", "", INITIAL, reason, norm, None)
    node = placement.node
    node_shape, kind = shape_of(graph, node), tile_kind(graph, node)
    assert kind is not None
    note = shape_note(node_shape, ghn.num_classes, ghn.max_shape[2])
    if placement.skip:
        first = f"the first of {shape[placement.roles.index('s')]} positions is left"
        note = f"{first}; {note}" if note else first
    return ParameterReport(
        path,
        tuple(shape),
        node_shape,
        primitive_of(graph, node),
        kind.decoder,
        how_made(graph, node, ghn.max_shape),
        note,
        norm,
        he_norm(graph, node, placement.tensor),
    )
