"""Parameters for any Flax model, unmodified.

    variables, report = ghn_jax.predict_model(ghn, ghn_variables, model, jnp.zeros((1, 32, 32, 3)))
    logits = model.apply(variables, images)

The model's call is traced to a computational graph (`tracing`), the hypernetwork predicts its
nodes' tensors (`GHN.tensors`), and each goes to its place in the model's tree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.hypernet.ghn import GHN, check_hypernetwork
from ghn_jax.hypernet.tiling import tile_kind
from ghn_jax.tracing.findings import Placement
from ghn_jax.tracing.model_graph import place_tensor, trace_once
from ghn_jax.tracing.report import (
    CONSTANT,
    INITIAL,
    ParameterReport,
    PredictionReport,
    he_norm,
    how_made,
    primitive_of,
    shape_note,
    shape_of,
)


def _channels(graph: Graph) -> int | None:
    """How many channels the first layer that has a kernel reads."""
    return next((shape[1] for shape in graph.param_shapes if shape and len(shape) > 1), None)


def predict_model(
    ghn: GHN,
    ghn_variables,
    model: nn.Module | nnx.Module,
    sample,
    *,
    initial: Mapping | None = None,
    keep_head: bool = False,
    predict_constants: bool = False,
    strict: bool = False,
    seed: int = 0,
    output: str | int | None = None,
    **call,
) -> tuple[Any, PredictionReport]:
    """Predicts the parameters of any Flax model.

    What no node makes (class tokens, scales without a norm, kernels larger than the
    hypernetwork's) stays at its initial value, and the report says why. So does what the model
    fills with one number on purpose, as LoRA does with zeros, and the classifier of a model with
    another number of classes than the hypernetwork's: to fine-tune it, its shape is encoded as if
    it had the hypernetwork's classes, as in the authors' code.

    Args:
      ghn, ghn_variables: the hypernetwork.
      model: a Linen or NNX module, as it is called to give logits; or one of Hugging Face's models,
        for its `module` and `params`.
      sample: an input (B, H, W, C), also PyTorch's, or its `jax.ShapeDtypeStruct`.
      initial: a Linen model's variables, for what is not predicted; None: `model.init`'s.
      keep_head: leave the classifier at its initial value whatever its classes.
      predict_constants: predict also what the model fills with one number on purpose (but for the
        zeros of biases and the ones of norms' weights): LoRA's zeros, last layers of zeros.
      strict: raise an error where a parameter would stay at its initial value.
      seed: of the initial values.
      output: which of the arrays that the model returns are the logits: 'logits', 0, '1/features'.
        None where it is clear: the only array, the one called 'logits', or the only one that is not
        in another container, as in (logits, {...}).
      **call: keyword arguments of the model's call (train=False); of a Linen module also those of
        `apply` (method, rngs, mutable).

    Returns:
      For a Linen module its variables: 'params' predicted and all other collections at their
      initial values (batch norm's running averages: see `batch_statistics`). For an NNX module a
      new module; the one given is not changed. And the report.

    Raises:
      TypeError: the model is no Flax module, or the hypernetwork is none; the sample is not of
        numbers, the model takes no array, or a seed or an option of the call is of another kind.
      ValueError: the sample is no array with sizes, or the model cannot be called with its shape;
        the model has no such method, or cannot be traced (several outputs, of which none
        is named; parameters in loops or branches that depend on values; values that it reads),
        `initial` is not of the model, no parameter belongs to a primitive, or `strict` and some
        parameter is left.
    """
    check_hypernetwork(ghn, ghn_variables)
    options = {"initial": initial, "seed": seed, "output": output}
    traced = trace_once(model, sample, ghn.virtual_edges, **options, call=call)
    reading = traced.reading
    placements, reasons = dict(reading.placements), dict(reading.reasons)
    notes = list(reading.notes)
    if len(sample.shape) != 4:
        notes.append(
            f"the input {tuple(sample.shape)} is not a batch of images (B, H, W, C), which "
            "hypernetworks are trained for"
        )
    elif sample.shape[1] <= 4 < sample.shape[3] == _channels(reading.graph):
        notes.append(
            f"the input {tuple(sample.shape)} has {sample.shape[3]} channels; PyTorch's order is "
            "(B, C, H, W), Flax's (B, H, W, C)"
        )
    graph, why = _head(reading.graph, reading.outputs, ghn.num_classes, keep_head)
    if not graph.classifier:
        notes.append("no linear layer alone makes the output; no node is a classifier")
    for leaf, places in list(placements.items()):
        reason: str | None
        if why and any(place.node in graph.classifier for place in places):
            reason = why
        else:
            reason = ghn.undecodable(shape_of(graph, places[0].node))
        constant = None if predict_constants else traced.constant(leaf)
        if not reason and constant not in (None, _USUAL.get(places[0].tensor)):
            reason = f"{CONSTANT} {constant:g}; predict_constants=True predicts it"
        if reason:
            reasons[leaf] = reason
            del placements[leaf]
    if strict and reasons:
        listed = "; ".join(f"{traced.paths[i]}: {reasons[i]}" for i in sorted(reasons)[:10])
        raise ValueError(
            f"{len(reasons)} of {len(traced.paths)} parameters would be left at their initial "
            f"values ({listed}); give strict=False to leave them"
        )

    nodes = sorted({place.node for places in placements.values() for place in places})
    tensors = ghn.tensors(ghn_variables, graph, nodes)
    kept = [
        leaf
        for leaf, value in enumerate(traced.leaves)
        if leaf not in placements or not _is_whole(placements[leaf], value.shape)
    ]
    values = dict(zip(kept, traced.initial(kept) if kept else [], strict=True))
    for leaf, places in placements.items():
        made = [tensors[place.node][place.tensor] for place in places]
        values[leaf] = _stacked(made, places, traced.leaves[leaf], values.get(leaf))
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


# What tensors are filled with as a rule.
_USUAL = {"scale": 1.0, "bias": 0.0}


def _head(graph: Graph, outputs: int, num_classes: int, keep: bool) -> tuple[Graph, str]:
    """The graph with its classifier as it is to be encoded, and why that is not predicted."""
    if not graph.classifier:
        return graph, ""
    classes = shape_of(graph, graph.classifier[0])[0]
    if classes == num_classes:
        return graph, "keep_head" if keep else ""
    why = f"the classifier is for {classes} classes, the hypernetwork for {num_classes}"
    if classes != outputs:  # the heads of an ensemble in one tensor
        why = f"the last layer makes {classes} values, of which come {outputs} outputs; the "
        why += f"hypernetwork's classifiers are for {num_classes} classes"
    shapes = list(graph.param_shapes)
    for node in graph.classifier:
        shapes[node] = (num_classes, *shape_of(graph, node)[1:])
    graph = dataclasses.replace(graph, param_shapes=shapes)
    return graph, why


def _is_whole(places: Sequence[Placement], shape) -> bool:
    """Whether all of a parameter's values are predicted."""
    axes = [axis for axis, _ in places[0].part]
    return len(places) == math.prod(shape[axis] for axis in axes) and not places[0].skip


def _stacked(made: Sequence, places: Sequence[Placement], leaf, initial) -> jax.Array:
    """A parameter in the model's layout and type, of the tensors of its layers."""
    axes = [axis for axis, _ in places[0].part]
    shape = tuple(leaf.shape)
    layer = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    found = {
        place.part: _laid_out(tensor, place, layer, leaf.dtype, _part(initial, place.part))
        for tensor, place in zip(made, places, strict=True)
    }

    def stack(part: tuple, axes: Sequence[int]):
        if not axes:
            return found[part] if part in found else _part(initial, part)
        axis, *rest = axes
        layers = [stack((*part, (axis, i)), rest) for i in range(shape[axis])]
        return jnp.concatenate(layers, axis)

    return stack((), axes)


def _part(value, part):
    """One of the layers that are stacked in an array, whose axes get size 1."""
    if value is None:
        return None
    at = dict(part)
    return value[
        tuple(slice(at[i], at[i] + 1) if i in at else slice(None) for i in range(value.ndim))
    ]


def _laid_out(tensor, placement: Placement, shape, dtype, initial) -> jax.Array:
    """A layer's tensor in the model's layout and type."""
    roles, skip = placement.roles, placement.skip
    if placement.tensor == "embedding":
        tensor = tensor.reshape(-1, tensor.shape[-1])
    if not skip:
        return jnp.asarray(place_tensor(tensor, roles, shape), dtype)
    axis = roles.index("s")
    grid = (*shape[:axis], shape[axis] - skip, *shape[axis + 1 :])
    first = jax.lax.slice_in_dim(initial, 0, skip, axis=axis)
    return jnp.concatenate([first, jnp.asarray(place_tensor(tensor, roles, grid), dtype)], axis)


def _row(ghn, graph, path, shape, places, reason, norm) -> ParameterReport:
    if places is None:
        return ParameterReport(path, tuple(shape), (), "", "", INITIAL, reason, norm, None)
    placement = places[0]
    node = placement.node
    node_shape, kind = shape_of(graph, node), tile_kind(graph, node)
    assert kind is not None
    note = shape_note(node_shape, ghn.num_classes, ghn.max_shape[2])
    if placement.skip:
        first = f"the first of {shape[placement.roles.index('s')]} positions is left"
        note = f"{first}; {note}" if note else first
    layers = math.prod(shape[axis] for axis, _ in placement.part)
    if len(places) < layers:
        left = f"{layers - len(places)} of {layers} layers stacked in it are left"
        note = f"{left}; {note}" if note else left
    he = he_norm(graph, node, placement.tensor)
    return ParameterReport(
        path,
        tuple(shape),
        node_shape,
        primitive_of(graph, node),
        kind.decoder,
        how_made(graph, node, ghn.max_shape),
        note,
        norm,
        he * math.sqrt(len(places)),
    )
