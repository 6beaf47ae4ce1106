"""Runs any network of the design space, and takes its gradients, without compiling it.

The host walks a network's steps (`plan.py`) and calls a compiled program for each: forwards, and
backwards where gradients are wanted. A program belongs to a unit and the shapes that it meets, so
that after a few hundred of them hardly any is new, whatever architectures come. Programs are queued
on the device one behind the other; nothing waits for a result before the loss is read.

A value is kept as long as somebody reads it: in a forward walk until its last reader, with
gradients until its writer's backward program has run. Programs compute again what is cheap (ReLUs,
depthwise convolutions before pointwise ones), so that values are all that is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ghn_jax.deepnets1m import layers
from ghn_jax.deepnets1m.layers import concatenate
from ghn_jax.deepnets1m.names import insert, parameter_path
from ghn_jax.deepnets1m.units import Arrays, Classifier, NormSum, Unit
from ghn_jax.engine import cpu_layers, gpu_layers
from ghn_jax.engine.compilation import program_options
from ghn_jax.engine.plan import IMAGES, Plan, Step
from ghn_jax.engine.programs import Program, Programs

DATA = "data"  # mesh axis that images are divided along

Weights = Mapping[str, Arrays]  # official parameter name -> arrays


def array_operations(platform: str) -> types.ModuleType:
    """The module of array operations that is fast on a platform: 'cpu', 'gpu', or others."""
    return {"cpu": cpu_layers, "gpu": gpu_layers}.get(platform, layers)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Parameters as Flax has them: what a network trains on its own, or was predicted whole."""

    def shapes(self, unit: Unit) -> list[tuple[tuple[int, ...], ...]]:
        """Of the arrays of each parameter of a unit."""
        return [tuple(p.leaves.values()) for p in unit.parameters]

    def tensors(self, unit: Unit, params: Arrays) -> Arrays:
        """The arrays that `Unit.apply` takes."""
        return params


TENSORS = Tensors()


class _StepPrograms(NamedTuple):
    """What a step calls."""

    forward: Program
    backward: Program | None


class Prepared(NamedTuple):
    """A network that is ready to run: see `Engine.prepare`.

    Attributes:
      plan: its steps.
      programs: of each step.
      sums: value with several readers -> the program that adds up its cotangents.
    """

    plan: Plan
    programs: tuple[_StepPrograms, ...]
    sums: dict[int, Program]


class Trace(NamedTuple):
    """What a forward walk leaves for the backward one.

    Attributes:
      values: those kept, by number.
      statistics: step -> the batch's statistics of its norms.
      seed: of the classifier's dropout.
      drop: step -> factors of its terms, under drop path.
    """

    values: dict[int, jax.Array]
    statistics: dict[int, Arrays]
    seed: Any
    drop: Mapping[int, Any]


class Engine:
    """Programs for this process's devices, and the walks that call them.

    Args:
      devices: share the images of every network that runs; JAX's first if not given.
      dtype: of images and values; parameters, statistics and losses are float32 in any case.
      programs: where compiled programs are kept; new ones if not given.
      options: for XLA's compiler; `compilation.program_options` of the device if not given.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,
        *,
        dtype=jnp.float32,
        programs: Programs | None = None,
        options: Mapping[str, str | bool] | None = None,
    ):
        devices = list(devices or jax.local_devices()[:1])
        self.mesh = Mesh(np.array(devices), (DATA,))
        self.whole, self.split = (NamedSharding(self.mesh, spec) for spec in (P(), P(DATA)))
        self.layers = array_operations(devices[0].platform)
        self.dtype = jnp.dtype(dtype)
        self._options = program_options(devices[0]) if options is None else dict(options)
        self.programs = Programs() if programs is None else programs

    # --- Programs ---------------------------------------------------------------------------------

    def program(self, key, function, inputs, outputs=None, donate=()) -> Program:
        """A program of this engine.

        Args:
          key: what `function` computes, besides the shapes of its arguments.
          function: pure; traced when the program is compiled.
          inputs: of the arguments, trees of (shape, dtype, sharding).
          outputs: tree of shardings, or a prefix of it; `whole` if not given.
          donate: arguments whose memory may be used for results.
        """
        leaves, tree = jax.tree.flatten(inputs, is_leaf=is_spec)
        # The caller's; the thread that compiles would have the default.
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        key = (key, tuple(leaves), tree, self.mesh, self.dtype, precision)
        outputs = self.whole if outputs is None else outputs

        def make():
            with jax.default_matmul_precision(precision):
                return compiled()

        def compiled():
            avals = [jax.ShapeDtypeStruct(s, d, sharding=where) for s, d, where in leaves]
            jitted = jax.jit(function, out_shardings=outputs, donate_argnums=donate)
            lowered = jitted.lower(*jax.tree.unflatten(tree, avals))
            return lowered.compile(compiler_options=self._options)

        return self.programs.get(key, make)

    def _value(self, shape: tuple[int, ...], dtype=None):
        return (shape, jnp.dtype(dtype or self.dtype), self.split)

    def _params(self, step: Step, form) -> tuple:
        shapes = [shape for some in form.shapes(step.unit) for shape in some]
        extra = []
        if isinstance(step.unit, NormSum) and step.unit.running:
            extra = [(2, step.unit.channels)] * step.unit.normed_terms
        return tuple((s, jnp.dtype(jnp.float32), self.whole) for s in [*shapes, *extra])

    def prepare(
        self, plan: Plan, images: int, form=TENSORS, *, gradient: bool, dropout: bool = False
    ) -> Prepared:
        """Looks up the programs of a network; those that are new are compiled in the background.

        Args:
          plan: the network.
          images: how many run at once.
          form: what parameters are given as: `Tensors`, or tiles (`decoding.Tiles`).
          gradient: whether `backward` will be called.
          dropout: whether the classifier's hidden layers drop units.
        """

        def shape(value):
            channels, size = plan.values[value]
            return (images, size, size, channels)

        programs, readers = [], dict.fromkeys(range(len(plan.values)), 0)
        for step in plan.steps:
            inputs = tuple(
                None if v is None else self._value(shape(v), jnp.float32 if v == IMAGES else None)
                for v in step.inputs
            )
            params = self._params(step, form)
            if isinstance(step.unit, NormSum):
                found = self._norm_programs(step, form, params, inputs, gradient)
            elif isinstance(step.unit, Classifier):
                classes = self._value((images, step.unit.dims[-1]), jnp.float32)
                seed = (((), jnp.dtype(jnp.int32), self.whole),) * 3 if dropout else None
                found = self._classifier_programs(
                    step, form, params, inputs, seed, classes, gradient
                )
            else:
                out = self._value(shape(step.output))
                found = self._unit_programs(step, form, params, inputs, out, gradient)
            programs.append(found)
            for v in step.inputs:
                if v is not None:
                    readers[v] += 1
        sums = {}
        if gradient:
            for value, count in readers.items():
                if count > 1 and value != IMAGES:
                    sums[value] = self._sum_program(count, self._value(shape(value)))
        return Prepared(plan, tuple(programs), sums)

    def _apply(self, unit: Unit, form, params: Arrays, inputs: tuple, **options) -> jax.Array:
        """A unit in the engine's dtype."""
        tensors = [w.astype(self.dtype) for w in form.tensors(unit, params)]
        inputs = tuple(x if x is None else x.astype(self.dtype) for x in inputs)
        return unit.apply(tuple(tensors), inputs, self.layers, **options).astype(self.dtype)

    def _unit_programs(self, step, form, params, inputs, out, gradient) -> _StepPrograms:
        unit, from_images = step.unit, step.inputs[0] == IMAGES

        def forward(params, inputs):
            return self._apply(unit, form, params, inputs)

        def backward(params, inputs, g):
            if from_images:  # nobody asks for the gradient of the images
                _, vjp = jax.vjp(lambda p: self._apply(unit, form, p, inputs), params)
                return *vjp(g), None
            return jax.vjp(lambda p, x: self._apply(unit, form, p, x), params, inputs)[1](g)

        name = type(unit).__name__
        forward.__name__, backward.__name__ = f"{name}_forward", f"{name}_backward"
        key = (unit, form)
        return _StepPrograms(
            self.program(("forward", *key), forward, (params, inputs), self.split),
            self.program(
                ("backward", *key, from_images), backward, (params, inputs, out),
                (self.whole, self.split),
            )
            if gradient
            else None,
        )  # fmt: skip

    def _norm_programs(self, step, form, params, inputs, gradient) -> _StepPrograms:
        unit, key = step.unit, (step.unit, form)
        n = unit.normed_terms
        if unit.dropped:
            return self._dropped_programs(step, form, params, inputs, gradient)

        def NormSum_forward(params, inputs):
            if unit.running:
                own = form.tensors(unit, params[:-n])
                return unit.apply((*own, *params[-n:]), inputs), ()
            return unit.with_statistics(form.tensors(unit, params), inputs)

        def NormSum_backward(params, inputs, statistics, g):
            tensors, vjp = jax.vjp(lambda p: form.tensors(unit, p), params)
            dtensors, dinputs = unit.gradient(tensors, inputs, statistics, g)
            return *vjp(tuple(dtensors)), dinputs

        statistics = (((2, unit.channels), jnp.dtype(jnp.float32), self.whole),) * n
        return _StepPrograms(
            self.program(
                ("forward", *key), NormSum_forward, (params, inputs), (self.split, self.whole)
            ),
            self.program(
                ("backward", *key), NormSum_backward, (params, inputs[:n], statistics, inputs[0]),
                (self.whole, self.split), donate=(1,),
            )
            if gradient and n and not unit.running
            else None,
        )  # fmt: skip

    def _dropped_programs(self, step, form, params, inputs, gradient) -> _StepPrograms:
        unit, key = step.unit, (step.unit, form)
        scales = ((unit.dropped, inputs[0][0][0]), jnp.dtype(jnp.float32), self.whole)

        def Dropped_forward(params, inputs, scales):
            return unit.with_statistics(form.tensors(unit, params), inputs, scales)

        def Dropped_backward(params, inputs, scales, g):
            return jax.vjp(lambda p, x: Dropped_forward(p, x, scales)[0], params, inputs)[1](g)

        return _StepPrograms(
            self.program(
                ("forward", *key), Dropped_forward, (params, inputs, scales),
                (self.split, self.whole),
            ),
            self.program(
                ("backward", *key), Dropped_backward, (params, inputs, scales, inputs[0]),
                (self.whole, self.split),
            )
            if gradient
            else None,
        )  # fmt: skip

    def _classifier_programs(
        self, step, form, params, inputs, seed, classes, gradient
    ) -> _StepPrograms:
        unit = step.unit

        def logits(params, inputs, seed):
            key = None
            if seed is not None:
                key = jax.random.key(seed[0])
                key = jax.random.fold_in(jax.random.fold_in(key, seed[1]), seed[2])
            return self._apply(unit, form, params, inputs, key=key).astype(jnp.float32)

        def Classifier_forward(params, inputs, seed):
            return logits(params, inputs, seed)

        def Classifier_backward(params, inputs, seed, g):
            return jax.vjp(lambda p, x: logits(p, x, seed), params, inputs)[1](g)

        key = (unit, form)
        return _StepPrograms(
            self.program(("forward", *key), Classifier_forward, (params, inputs, seed), self.split),
            self.program(
                ("backward", *key), Classifier_backward, (params, inputs, seed, classes),
                (self.whole, self.split),
            )
            if gradient
            else None,
        )  # fmt: skip

    def _sum_program(self, count: int, value) -> Program:
        def add_up(*cotangents):
            return functools.reduce(jnp.add, cotangents)

        return self.program("sum", add_up, (value,) * count, self.split)

    # --- Walks ------------------------------------------------------------------------------------

    def forward(
        self,
        network: Prepared,
        params: Weights,
        images: jax.Array,
        *,
        keep: bool | frozenset[int] = False,
        seed=None,
        statistics: Mapping[str, jax.Array] | None = None,
        drop: Mapping[int, Any] | None = None,
    ) -> tuple[jax.Array, Trace]:
        """Runs a network.

        Args:
          network: from `prepare`.
          params: the arrays of each parameter.
          images: (B, H, W, 3), on the engine's devices.
          keep: keep what `backward` reads; or the values to keep.
          seed: three int32 scalars that the dropout's random numbers follow from, if it has any.
          statistics: name of a batch norm -> (2, C) mean and variance, for a plan with given ones.
          drop: step -> (terms, B) float32 factors, for each of a plan's `droppable` steps.

        Returns:
          (B, classes) float32 logits, and the trace.
        """
        plan, statistics = network.plan, statistics or {}
        values = {IMAGES: images}
        found = {}
        for i, (step, programs) in enumerate(zip(plan.steps, network.programs, strict=True)):
            weights = _flat(params, step.names)
            inputs = tuple([None if v is None else values[v] for v in step.inputs])
            if isinstance(step.unit, NormSum):
                if step.unit.running:
                    weights += tuple([statistics[name] for name in step.names])
                scales = (drop[i],) if drop and step.unit.dropped else ()
                values[step.output], found[i] = programs.forward(weights, inputs, *scales)
            elif isinstance(step.unit, Classifier):
                values[step.output] = programs.forward(weights, inputs, seed)
            else:
                values[step.output] = programs.forward(weights, inputs)
            if keep is not True:
                for v in step.inputs:
                    if v is not None and plan.last_reader[v] == i and v not in (keep or ()):
                        values.pop(v, None)
        return values.pop(plan.steps[-1].output), Trace(values, found, seed, drop or {})

    def features(
        self, network: Prepared, params: Weights, images: jax.Array, cells: Sequence[int], **options
    ) -> list[jax.Array]:
        """(B, H, W, C) outputs of some cells of a network, as detection takes them (§ 5.3).

        Args:
          network, params, images, options: see `forward`.
          cells: from 0; negative numbers count from the last.

        Raises:
          ValueError: a cell has no output.
        """
        plan = network.plan
        values = []
        for cell in cells:
            feature = plan.wiring.outputs[cell]
            if feature is None:
                raise ValueError(f"cell {cell} has no output: no path leads to it")
            values.append([None if s is None else plan.states[s] for s in feature])
        wanted = frozenset(v for some in values for v in some if v is not None)
        _, trace = self.forward(network, params, images, keep=wanted, **options)
        return [
            concatenate([None if v is None else trace.values[v] for v in some]) for some in values
        ]

    def backward(
        self,
        network: Prepared,
        params: Weights,
        trace: Trace,
        dlogits: jax.Array,
        dvalues: Mapping[int, jax.Array] | None = None,
    ) -> dict[str, Arrays]:
        """The cotangents of a network's parameters.

        Args:
          network, params: as in the forward walk.
          trace: of that walk; it is used up.
          dlogits: (B, classes) cotangent of the logits.
          dvalues: further cotangents, of values that a loss reads besides the logits.
        """
        plan, values = network.plan, trace.values
        cotangents: dict[int, list] = {plan.steps[-1].output: [dlogits]}
        gradient: dict[str, Arrays] = {}
        for i in reversed(range(len(plan.steps))):
            step, program = plan.steps[i], network.programs[i].backward
            unit = step.unit
            g, *more = cotangents.pop(step.output)
            if more:
                g = network.sums[step.output](g, *more)
            if dvalues and step.output in dvalues:
                g = g + dvalues[step.output]
            weights = _flat(params, step.names)
            inputs = tuple([None if v is None else values[v] for v in step.inputs])
            values.pop(step.output, None)
            if isinstance(unit, NormSum) and unit.dropped:
                assert program is not None
                dweights, dinputs = program(weights, inputs, trace.drop[i], g)
            elif isinstance(unit, NormSum):
                n = unit.normed_terms
                dweights, dinputs = (), ()
                if n:
                    assert program is not None
                    for v in step.inputs[:n]:
                        assert v is not None  # zeros are not normalised
                        del values[v]
                    dweights, dinputs = program(weights, inputs[:n], trace.statistics.pop(i), g)
                dinputs = (*dinputs, *(g for _ in step.inputs[n:]))
            else:
                assert program is not None
                seed = (trace.seed,) if isinstance(unit, Classifier) else ()
                dweights, dinputs = program(weights, inputs, *seed, g)
            del inputs
            _unflatten(gradient, dweights, params, step.names)
            for v, dx in zip(step.inputs, dinputs or (), strict=False):
                if v is not None and v != IMAGES:
                    cotangents.setdefault(v, []).append(dx)
        return gradient


def weights_of(plan: Plan, tree: Mapping) -> dict[str, Arrays]:
    """The parameters of a plan's steps from the `params` tree of the network's Flax module."""
    found = {}
    for step in plan.steps:
        for name, parameter in zip(step.names, step.unit.parameters, strict=True):
            leaves = functools.reduce(lambda t, part: t[part], parameter_path(name), tree)
            found[name] = tuple(leaves[leaf] for leaf in parameter.leaves)
    return found


def tree_of(plan: Plan, weights: Weights) -> dict:
    """The `params` tree of the network's Flax module from the parameters of a plan's steps."""
    tree: dict = {}
    for step in plan.steps:
        for name, parameter in zip(step.names, step.unit.parameters, strict=True):
            for leaf, array in zip(parameter.leaves, weights[name], strict=True):
                insert(tree, (*parameter_path(name), leaf), array)
    return tree


def is_spec(x) -> bool:
    """Whether it is (shape, dtype, sharding) of an array; see `Engine.program`."""
    return isinstance(x, tuple) and len(x) == 3 and isinstance(x[2], NamedSharding)


def _flat(params: Weights, names: tuple[str, ...]) -> Arrays:
    return tuple([array for name in names for array in params[name]])


def _unflatten(gradient: dict, arrays: Arrays, params: Weights, names: tuple[str, ...]) -> None:
    start = 0
    for name in names:
        end = start + len(params[name])
        gradient[name] = arrays[start:end]
        start = end
