"""Activations of a network, layer by layer: whether predicted tensors keep them in range (B.2.2).

    variables, report = ghn_jax.predict_model(ghn, ghn_variables, model, images)
    for layer in ghn_jax.activation_statistics(model, variables, images):
        print(layer.layer, layer.variance)
    ghn_jax.norm_check(model, variables, images)  # warns where they explode or vanish

Batch norm is on the statistics of the batch, as predicted parameters are evaluated (C.1).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.scope import union_filters
from jax.extend.core import get_opaque_trace_state

from ghn_jax.deepnets1m.network import Network
from ghn_jax.deepnets1m.units import NormSum
from ghn_jax.engine.engine import Engine, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.evaluation.accuracy import draw_parameter
from ghn_jax.evaluation.batch_statistics import given, linen_on_batch, put_on_batch
from ghn_jax.files.messages import what_is
from ghn_jax.tracing.given import copied_nodes
from ghn_jax.tracing.model_graph import map_parameters, trace, unwrap
from ghn_jax.tracing.named_axes import bind_axes
from ghn_jax.tracing.report import shape_of
from ghn_jax.tracing.sample import check_images, input_fits


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Of all numbers that a layer puts out for a batch.

    Attributes:
      layer: its path in the model, 'layer1_0/conv1'; of a network of the design space, the official
        names of the parameters. A layer that is called again has ' (2)' behind its name.
      kind: its class, 'Conv'.
      mean, variance: NaN or infinite where numbers are, or where they overflow.
      zeros: share of numbers that are 0.
      non_finite: share of numbers that are NaN or infinite.
      normalised: whether a norm reads them, which undoes their scale.
    """

    layer: str
    kind: str
    mean: float
    variance: float
    zeros: float
    non_finite: float
    normalised: bool = False


@flax.struct.dataclass
class _Output:
    """A layer's name, known when its program is traced, and its (4,) numbers."""

    layer: str = flax.struct.field(pytree_node=False)
    kind: str = flax.struct.field(pytree_node=False)
    normalised: bool = flax.struct.field(pytree_node=False)
    numbers: jax.Array


def _numbers(output) -> jax.Array:
    """(4,) mean, variance, and shares of zeros and of what is not finite."""
    leaves = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
    x = jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in leaves])
    return jnp.stack([x.mean(), x.var(), (x == 0).mean(), (~jnp.isfinite(x)).mean()])


_of_value = jax.jit(_numbers)

_LINEN_NORMS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm, nn.RMSNorm)
_NNX_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.RMSNorm)


def _is_in(output, arrays: Sequence) -> bool:
    """Whether it is one of some arrays: not equal to it, but the same."""
    return any(output is array for array in arrays)


# (variables, images) -> what every layer puts out.
Recorder = Callable[[Any, jax.Array], list[LayerStatistics]]


def _linen(model: nn.Module, call: Mapping[str, Any]) -> Callable[..., list[_Output]]:
    mutable = union_filters(call.get("mutable", False), ["intermediates"])

    def run(variables, images):
        order: dict[tuple[str, ...], str] = {}
        normed = []  # what norms read

        def watch(call, args, kwargs, context):
            if isinstance(context.module, _LINEN_NORMS) and context.method_name == "__call__":
                normed.extend(args[:1])
            return call(*args, **kwargs)

        def is_layer(module: nn.Module, method: str) -> bool:
            own = module.variables.get("params", {}).values()
            if method != "__call__" or all(isinstance(value, Mapping) for value in own):
                return False
            order[module.path] = type(module).__name__
            return True

        with nn.intercept_methods(watch):
            _, state = cast(
                tuple,
                linen_on_batch(
                    model, variables, images,
                    {**call, "capture_intermediates": is_layer, "mutable": mutable},
                ),
            )  # fmt: skip
        found = []
        for path, kind in order.items():
            kept = state["intermediates"]
            for part in path:
                kept = kept.get(part, {})  # what `nn.scan` repeats does not come out of it
            for i, output in enumerate(kept.get("__call__", ()), 1):
                name = "/".join(path) + (f" ({i})" if i > 1 else "")
                found.append(_Output(name, kind, _is_in(output, normed), _numbers(output)))
        return found

    return jax.jit(run)


def _nnx(call: Mapping[str, Any]) -> Callable[..., list[_Output]]:
    arguments = copied_nodes(call)

    # No static argument of `jax.jit`: definitions with a dict in them cannot be hashed.
    programs: list[tuple[Any, Callable]] = []

    def run(module, images):
        definition, state = nnx.split(module)
        program = next((program for known, program in programs if known == definition), None)
        if program is None:
            program = jax.jit(bind_axes(functools.partial(look_at, definition)))
            programs.append((definition, program))
        return program(state, images)

    def look_at(definition, state, images):
        # The model is this program's own copy.
        model = nnx.merge(definition, jax.tree.map(lambda x: x, state))
        put_on_batch(model)
        ended: list[tuple[str, str, Any]] = []
        normed: list[jax.Array] = []
        here = get_opaque_trace_state(convention="nnx")

        def is_within() -> bool:
            """Whether a layer is called in a transformation, which arrays must not come out of."""
            return get_opaque_trace_state(convention="nnx") != here

        def record(cls: type, name: str) -> type:
            """A class that does the same and leaves its output here."""

            def called(self, *args, **kwargs):
                output = cls.__call__(self, *args, **kwargs)
                if is_within():
                    return output
                if isinstance(self, _NNX_NORMS):
                    normed.extend(args[:1])
                ended.append((name, cls.__name__, output))
                return output

            return type(cls.__name__, (cls,), {"__call__": called})

        for path, node in list(nnx.iter_modules(model)):
            if any(isinstance(value, nnx.Param) for value in vars(node).values()):
                recorded = record(type(node), "/".join(map(str, path)))
                object.__setattr__(node, "__class__", recorded)
        model(images, **arguments())
        calls: dict[str, int] = {}
        found = []
        for name, kind, output in ended:
            calls[name] = calls.get(name, 0) + 1
            again = f" ({calls[name]})" if calls[name] > 1 else ""
            found.append(_Output(name + again, kind, _is_in(output, normed), _numbers(output)))
        # The classes outlive the trace, whose arrays must not.
        ended.clear()
        normed.clear()
        return found

    return run


def _engine(network: Network, engine: Engine) -> Callable[..., list[_Output]]:
    """Of a network of the design space, which nothing is compiled for."""
    plan = make_plan(network.wiring())
    normed = {
        value
        for step in plan.steps
        if isinstance(step.unit, NormSum)
        for value in step.inputs[: step.unit.normed_terms]
    }

    def run(variables, images):
        images = jax.device_put(images, engine.split)
        ready = engine.prepare(plan, len(images), gradient=False)
        weights = weights_of(plan, variables["params"])
        logits, trace = engine.forward(ready, weights, images, keep=True)
        values = {**trace.values, plan.steps[-1].output: logits}
        return [
            _Output(
                " + ".join(step.names), type(step.unit).__name__, step.output in normed,
                _of_value(values[step.output]),
            )
            for step in plan.steps if step.names
        ]  # fmt: skip

    return run


def recorder(model: nn.Module | nnx.Module, *, engine: Engine | None = None, **call) -> Recorder:
    """`activation_statistics` of a model for several sets of variables, compiled once.

    Raises:
      TypeError: the model is no Flax module.
    """
    module, _ = unwrap(model, {})
    if isinstance(module, Network):
        run = _engine(module, engine or Engine())
    elif isinstance(module, nn.Module):
        run = _linen(module, call)
    elif isinstance(module, nnx.Module):
        run = _nnx(call)
    else:
        raise TypeError(f"the model is {what_is(model)}; give a Linen or an NNX module")

    def statistics(variables, images) -> list[LayerStatistics]:
        _, variables = given(model, variables)
        check_images(images)
        with input_fits(module, images, "images"):
            if not len(images):
                raise ValueError("the batch has no images; the paper's have 64")
            outputs = jax.device_get(run(variables, images))
        if not outputs:
            raise ValueError(
                f"{type(model).__name__} has no layer with parameters of its own to look at "
                "outside of scans (NNX: of all transformations)"
            )
        found = []
        for o in outputs:
            mean, variance, zeros, broken = map(float, o.numbers)
            found.append(
                LayerStatistics(o.layer, o.kind, mean, variance, zeros, broken, o.normalised)
            )
        return found

    return statistics


def activation_statistics(
    model: nn.Module | nnx.Module, variables, images: jax.Array, **call
) -> list[LayerStatistics]:
    """Mean and variance of what each layer of a model puts out (B.2.2, Fig. 8).

    Layers are modules that have parameters of their own, norms among them. Those inside `nn.scan`
    are not seen, nor, of an NNX model, those inside `nnx.scan`, `nnx.vmap`, `nnx.remat`, `nnx.jit`
    and `nnx.cond`. Batch norms take the statistics of the batch; all else runs as `call` says.

    Args:
      model: a Linen or NNX module; networks of the design space (`build_network`) are not compiled.
      variables: a Linen model's variables or an NNX module, as `predict_model` returns them; None:
        those that an NNX module, or a wrapper of a Linen module, holds.
      images: (B, H, W, C), a batch as the model takes it; the paper's have 64.
      **call: keyword arguments of the model's call (train=False).

    Returns:
      One for each layer, in the order in which they end.

    Raises:
      TypeError: the model is no Flax module, or the variables are not of its kind.
      ValueError: it has no layers, or there are no images; or a batch norm is not Flax's, or the
        variables have no 'params', or are shapes.
    """
    return recorder(model, **call)(variables, images)


@dataclasses.dataclass(frozen=True)
class NormFinding:
    """A layer whose activations are out of range.

    Attributes:
      layer: as in `LayerStatistics`.
      problem: what they do.
      factor: their standard deviation, in the reference's; NaN where they are not finite.
    """

    layer: str
    problem: Literal["explodes", "vanishes", "not finite"]
    factor: float


def compare_activations(
    found: Sequence[LayerStatistics], reference: Sequence[LayerStatistics], factor: float
) -> list[NormFinding]:
    """Layers whose activations are `factor` times the reference's or more, or as much less.

    A norm undoes the scale of what it reads: there, only what is not finite is found.
    """
    findings = []
    for ours, theirs in zip(found, reference, strict=True):
        if ours.non_finite or math.isnan(ours.variance):
            findings.append(NormFinding(ours.layer, "not finite", math.nan))
            continue
        if ours.normalised or ours.variance == theirs.variance:
            continue
        ratio = math.sqrt(ours.variance / theirs.variance) if theirs.variance else math.inf
        if ratio >= factor:
            findings.append(NormFinding(ours.layer, "explodes", ratio))
        elif ratio <= 1 / factor:
            findings.append(NormFinding(ours.layer, "vanishes", ratio))
    return findings


def _he(model: nn.Module | nnx.Module, variables, images, call: Mapping[str, Any]):
    """The same with weights as He initialisation draws them; what it does not define stays."""
    rng = np.random.default_rng(0)
    roles, failed = _roles(model, variables, images, call)
    unknown: list[str] = []

    def draw(path: str, leaf):
        name = path.rpartition("/")[2]
        if path in roles:
            value = _draw(*roles[path], leaf.shape, rng)
        elif name in _NAMES:
            value = draw_parameter(name, leaf.shape, rng)
        else:
            unknown.append(path)
            return leaf
        return jnp.asarray(value, leaf.dtype)

    drawn = map_parameters(variables, draw)
    if failed and unknown:
        listed = ", ".join(unknown[:3]) + (", ..." if unknown[3:] else "")
        warnings.warn(
            f"norm_check cannot judge {listed}: what they are for is told neither by their names "
            f"(known: {', '.join(_NAMES)}) nor by tracing the model ({failed}); give what it is "
            "initialised with as reference",
            RuntimeWarning,
            stacklevel=3,
        )
    return drawn


_NAMES = ("kernel", "embedding", "scale", "bias")


def _draw(tensor: str, fan_in: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """`draw_parameter` of a kernel that says its fan-in, whatever its axes are for."""
    if tensor != "kernel":
        return draw_parameter(tensor, shape, rng)
    return rng.standard_normal(shape, np.float32) * np.float32(math.sqrt(2 / fan_in))


def _roles(model, variables, images, call) -> tuple[dict[str, tuple[str, int]], str]:
    """What a model's parameters are for: path -> (kernel, scale or bias; fan-in).

    Names do not tell of kernels that are called otherwise, and shapes not of axes of stacks and of
    heads. He initialisation does not define encodings of positions.

    Returns:
      With why the model could not be traced; '' where it could.
    """
    if isinstance(model, Network):  # its names and shapes tell all
        return {}, ""
    is_nnx = isinstance(model, nnx.Module)
    try:
        traced = trace(
            variables if is_nnx else model, images, 0,
            initial=None if is_nnx else variables, call=call,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        return {}, str(error)
    reading = traced.reading
    return {
        traced.paths[leaf]: (
            places[0].tensor,
            math.prod(shape_of(reading.graph, places[0].node)[1:]),
        )
        for leaf, places in reading.placements.items()
        if places[0].tensor != "embedding"
    }, ""


def norm_check(
    model: nn.Module | nnx.Module,
    variables,
    images: jax.Array,
    *,
    reference=None,
    factor: float = 10.0,
    **call,
) -> list[NormFinding]:
    """Warns where predicted tensors would make activations explode or vanish (B.2.2).

    The standard deviation of each layer's output is compared with the same layer's under a
    reference, but for what a norm reads. Networks whose activations are far from those of He
    initialisation are hard to fine-tune (§ 5.3).

    Args:
      model, variables, images: as for `activation_statistics`.
      reference: variables (or an NNX module) to compare with, such as those of `model.init`; None:
        He initialisation of `variables`' kernels, norms at 1 and biases at 0. Which are these is
        found by tracing the model, as `predict_model` does; what it would leave stays as given,
        unless it is called kernel, embedding, scale or bias. Many layers without norms in a row
        that are initialised with another gain (attention, LeCun's) are far from it: give theirs.
      factor: how many times larger, or smaller, a standard deviation may be; more than 1.
      **call: keyword arguments of the model's call.

    Returns:
      The layers that are out of range, in order of execution; one warning names the first. Another
      names parameters that cannot be judged, as the model cannot be traced.

    Raises:
      TypeError, ValueError: as `activation_statistics`; or the factor is not above 1.
    """
    if not factor > 1:
        raise ValueError(f"factor is {factor}; allowed: more than 1")
    statistics = recorder(model, **call)
    found = statistics(variables, images)
    if reference is None:
        reference = _he(*given(model, variables), images, call)
    expected = statistics(reference, images)
    findings = compare_activations(found, expected, factor)
    if findings:
        warnings.warn(_message(findings, len(found)), RuntimeWarning, stacklevel=2)
    return findings


def _message(findings: Sequence[NormFinding], layers: int) -> str:
    parts = [
        f"{f.layer or 'the model'} "
        + ("is not finite" if math.isnan(f.factor) else f"{f.problem} ({f.factor:.3g} times)")
        for f in findings[:3]  # later ones mostly follow from these
    ]
    more = f" and {len(findings) - 3} more" if len(findings) > 3 else ""
    return (
        f"activations of {len(findings)} of {layers} layers are out of range, standard deviations "
        f"compared with the reference's: {', '.join(parts)}{more}; use a hypernetwork that "
        "normalises what it predicts (GHN-2), or scale the kernels of these layers"
    )
