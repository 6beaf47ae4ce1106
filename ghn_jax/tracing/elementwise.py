"""Functions of single elements, and parameters that meet activations: norms, biases, positions."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from ghn_jax.tracing.abstract_values import (
    BATCH,
    CHANNEL,
    LANE,
    RUNNING,
    SPACE,
    UNKNOWN,
    Activation,
    Axes,
    Constant,
    Parameter,
    Scope,
    Statistic,
    Value,
    labels_of,
    merge,
    unknown_axes,
)
from ghn_jax.tracing.equations import ELEMENTWISE, SAME, VIEWS
from ghn_jax.tracing.findings import Findings, module_of, said_of
from ghn_jax.tracing.flow import SCORES, THROUGH

# Functions of a statistic that norms divide by, and those that no norm has.
_DEVIATIONS = frozenset(("sqrt", "rsqrt", "pow", "integer_pow"))
_GATES = frozenset(("logistic", "exp", "exp2", "expm1", "tanh", "erf", "log1p"))


def _norms(name: str, x: Statistic) -> bool:
    """Whether a value that is multiplied with or divided by a statistic is normalised by it."""
    return not x.gate and (name == "div" or (name == "mul" and x.deviation))


class Elementwise(Findings):
    """What functions of single elements are in the paper's primitives."""

    def elementwise(self, name: str, operands, literals, shape, where: str) -> Value:
        """A function of each element; operands broadcast."""
        parameters = [x for x in operands if isinstance(x, Parameter)]
        data = [x for x in operands if isinstance(x, (Activation, Statistic))]
        state = any(isinstance(x, Constant) and x.state for x in operands)
        if not data:
            return self._parameters(name, operands, parameters, literals, shape, state)
        if len({x.row for x in data}) > 1:
            data = [self.activation(x) for x in data]
        axes = merge([x.axes for x in data], shape)
        if len(data) > 1:
            value = self._several(name, data, axes, where)
        elif parameters:
            value = dataclasses.replace(data[0], axes=axes)
        else:
            value = self._one(name, data[0], axes, state)
            if isinstance(value, Statistic) and name == "div" and operands[-1] is data[0]:
                value = dataclasses.replace(value, deviation=True)  # one divided by it
        for p in parameters:
            value = self._with_parameter(name, value, p, axes, shape, where)
        return value

    def _parameters(self, name, operands, parameters, literals, shape, state) -> Value:
        """A function of parameters and constants alone."""
        size = [math.prod(self.shape_of(p.key)) for p in parameters]
        main = parameters[int(np.argmax(size))]
        others = {key for p in parameters for key in (p.key, *p.others)} - {main.key}
        scopes = [p.scope for p in parameters if p.scope] + ([RUNNING] if state else [])
        scope = functools.reduce(Scope.__or__, scopes) if scopes else None
        keeps = {"mul", "div", "select_n", "sub", "add", "add_any"} | VIEWS
        zero = any(v is not None and np.ndim(v) == 0 and v == 0 for v in literals)
        shifted = name in ("add", "sub") and len(parameters) < len(operands) and not zero
        changed = main.changed or ("" if name in keeps and not shifted else name)
        axes = [p.axes for p in parameters if p.key == main.key]
        full = [a for a in axes if len(a) == len(shape)]
        axes = merge(full, shape) if full else unknown_axes(shape)
        by = len(parameters) > 1 or state  # by its own deviation or norm, a gain, a singular value
        rescaled = main.rescaled or (name in ("mul", "div") and by)
        return Parameter(main.leaf, axes, main.part, frozenset(others), scope, changed, rescaled)

    def _one(self, name: str, x: Activation | Statistic, axes: Axes, state: bool) -> Value:
        """A function of one value and constants."""
        if isinstance(x, Statistic):
            if state and name in ("mul", "div"):  # batch norm of pooled features
                return dataclasses.replace(self.activation(x), axes=axes, scope=RUNNING)
            deviation, gate = x.deviation or name in _DEVIATIONS, x.gate or name in _GATES
            return dataclasses.replace(x, axes=axes, deviation=deviation, gate=gate)
        linear = name in SAME | {"mul", "div", "add", "sub", "neg"}
        scope = RUNNING if state and name in ("mul", "div") else x.scope if linear else None
        return dataclasses.replace(x, axes=axes, scope=scope, fresh=x.fresh and name in SAME)

    def _several(self, name: str, data, axes: Axes, where: str) -> Value:
        """A function of several values."""
        rows = [x.row for x in data]
        if len(set(rows)) == 1:
            statistics = [x for x in data if isinstance(x, Statistic)]
            whole = [x for x in data if isinstance(x, Activation)]
            scale = name in ("mul", "div")
            deviation = any(x.deviation for x in statistics)
            gate = any(x.gate for x in statistics)
            if not whole:
                scope = functools.reduce(Scope.__or__, [x.scope for x in statistics])
                least = min(statistics, key=lambda x: len(x.scope.reduced))
                if least.scope.reduced < scope.reduced:  # a norm of pooled features
                    if not scale:
                        return Statistic(rows[0], axes, least.scope)
                    most = max(statistics, key=lambda x: len(x.scope.reduced))
                    row = self.activation(least).row
                    beyond = most.scope.beyond(least.scope)
                    return Activation(row, axes, beyond if _norms(name, most) else None)
                scope = Scope(scope.reduced, labels_of(axes))
                return Statistic(rows[0], axes, scope, deviation=deviation, gate=gate)
            if statistics:
                scope = statistics[0].scope if _norms(name, statistics[0]) else None
                return Activation(rows[0], axes, scope)
            if name in ("add", "add_any"):
                return Activation(self.flow.add("sum", rows), axes)
            return Activation(rows[0], axes)
        if name in ("add", "add_any", "sub"):
            return Activation(self.flow.add("sum", rows), axes)
        origins = {self.flow.origin(row) for row in rows}
        if len(origins) == 1:
            return Activation(origins.pop(), axes)
        if name == "mul":
            for x, gate in (rows, rows[::-1]):
                means = self.flow.squeezed(gate, x)
                if means:
                    for mean in means:
                        self.flow.rows[mean].primitive = THROUGH
                    return Activation(self.flow.add("cse", [x, gate]), axes)
        if name in ELEMENTWISE:
            self.note(
                f"{name} of activations in {{}} is no primitive; edges pass through it", where
            )
        return Activation(self.flow.add(THROUGH, rows), axes)

    # --- Parameters met by activations ---

    def _with_parameter(self, name, x: Value, p: Parameter, axes, shape, where) -> Value:
        """A function of an activation and a parameter."""
        axes = merge([axes, p.axes], shape) if len(p.axes) == len(shape) else axes
        if isinstance(x, Statistic):
            weighs = x.deviation and p.scope is None or p.scope == x.scope
            if name in ("mul", "div") and weighs:
                # The factor of a norm on its way: its weight times the inverse deviation.
                p_axes = merge([p.axes], shape) if len(p.axes) == len(shape) else p.axes
                return dataclasses.replace(p, axes=p_axes, scope=x.scope)
            if p.scope is not None:  # the norm of pooled features
                p = dataclasses.replace(p, scope=p.scope.beyond(x.scope))
            x = self.activation(x)
        if name in ("add", "sub", "add_any"):
            return self._abreast(self._shift, x, p, axes, where)
        if name in ("mul", "div"):
            return self._abreast(self._scale, x, p, axes, where)
        self.leave(p, f"{name} of activations and it {said_of(where)} is no primitive")
        return Activation(x.row, axes)

    def _abreast(self, function, x: Activation, p: Parameter, axes, where: str) -> Activation:
        """Applies a function to each of layers side by side, or to the one that there is."""
        lanes = [
            i
            for i, (mine, its) in enumerate(zip(p.axes, axes, strict=False))
            if len(p.axes) == len(axes) == len(x.axes)
            and mine and mine[0][1] > 1 and its and its[0] == (LANE, mine[0][1])
        ]  # fmt: skip
        if len(lanes) != 1:
            return function(x, p, axes, where)
        (at,) = lanes
        count = axes[at][0][1]
        shape = self.shapes[p.leaf]
        one = (*axes[:at], axes[at][1:], *axes[at + 1 :])
        found = [
            function(
                dataclasses.replace(x, row=row, axes=one), p.at(at, i, shape, atoms=1), one, where
            )
            for i, row in enumerate(self.flow.lanes_of(x.row, count))
        ]
        return Activation(self.flow.abreast([y.row for y in found]), axes, fresh=found[0].fresh)

    def _along(self, x: Activation, p: Parameter) -> dict[Any, str]:
        """Axis of the parameter -> label of the activation's axis that it varies along."""
        if self.rank(p) == math.prod(self.shape_of(p.key)) == 1:  # of a layer with a single
            channels = [n for axis in x.axes for label, n in axis if label == CHANNEL]  # channel,
            (only,) = {*range(len(self.shapes[p.leaf]))} - {axis for axis, _ in p.part}
            return {only: CHANNEL} if channels and max(channels) == 1 else {}  # or a number
        found = {}
        for mine, its in zip(p.axes, x.axes, strict=True):
            labels = {label for label, _ in its} or {UNKNOWN}
            for axis, n in mine:
                if n > 1:
                    found[axis] = (
                        SPACE if labels == {SPACE} else BATCH if labels == {BATCH} else CHANNEL
                    )
        return found

    def _shift(self, x: Activation, p: Parameter, axes: Axes, where: str) -> Value:
        """A parameter added: a norm's or a layer's bias, or an encoding of positions."""
        row = self.flow.rows[x.row]
        along = self._along(x, p) if len(p.axes) == len(x.axes) else {}
        if row.primitive in ("bn", "ln") and x.fresh and row.bias is None:
            mine = {p.key, *p.others} - {row.weight}
            if not mine:  # the mean, weighed as the rest is
                return dataclasses.replace(x, axes=axes)
            if len(mine) == 1:
                (key,) = mine
                row.bias = key
                shape = self.shape_of(key)
                whole = {axis: "o" for axis in range(len(shape))}
                changed = p.changed if key == p.key else ""
                if math.prod(shape) == math.prod(row.shape):
                    bias = Parameter(key[0], (), key[1], changed=changed)
                    self.place(bias, x.row, "bias", whole)
                    return Activation(x.row, axes)
        if row.primitive == SCORES:
            self.leave(p, f"added to attention's scores {said_of(where)}")
            return Activation(x.row, axes)
        labels = set(along.values())
        if not along or BATCH in labels:
            self.leave(p, f"{'a number' if not along else 'no bias'} added {said_of(where)}")
            return Activation(x.row, axes)
        if labels == {CHANNEL}:
            size = math.prod(self.shape_of(p.key))
            at = self.flow.add(
                "bias", [x.row], shape=(size,), name=self.name_of(p.key), weight=p.key
            )
            self.place(p, at, "bias", dict.fromkeys(along, "o"))
            return Activation(at, axes)
        return Activation(self._position(x, p, along, where), axes)

    def _position(self, x: Activation, p: Parameter, along: dict, where: str) -> int:
        """Adds `pos_enc` and `sum`."""
        shape = self.shape_of(p.key)
        space = [axis for axis in sorted(along) if along[axis] == SPACE]
        channels = math.prod(shape[axis] for axis in along if along[axis] == CHANNEL)
        grid = [i for i, axis in enumerate(x.axes) if {label for label, _ in axis} == {SPACE}]
        height, *rest = [math.prod(n for _, n in p.axes[i]) for i in grid]
        width, skip = math.prod(rest), 0
        positions = math.prod(shape[axis] for axis in space)
        if positions != height * width and not p.changed:
            how = f"a resize from {positions} to {height * width} positions"
            p = dataclasses.replace(p, changed=how)
        if len(grid) == 1:  # tokens: a square grid, perhaps after class tokens
            height = width = math.isqrt(positions)
            skip = positions - height * width
        at = self.flow.add(
            "pos_enc",
            [],
            shape=(1, channels, height, width),
            name=self.name_of(p.key),
            weight=p.key,
        )
        if skip > 1 and not p.changed:
            self.leave(p, f"{positions} positions {said_of(where)} are no square grid")
        else:
            roles = {axis: "s" if label == SPACE else "c" for axis, label in along.items()}
            self.place(p, at, "embedding", roles, skip)
        return self.flow.add("sum", [x.row, at])

    def _scale(self, x: Activation, p: Parameter, axes: Axes, where: str) -> Value:
        """A parameter multiplied with: a norm's weight, or none of the primitives."""
        scope = p.scope or x.scope
        along = self._along(x, p) if len(p.axes) == len(x.axes) else {}
        if scope is None or not along or set(along.values()) != {CHANNEL}:
            what = "a number" if not along else "a scale without a norm"
            if scope is not None and along:
                what = "a norm's weight that varies with position"
            self.leave(p, f"{what} {said_of(where)}: no primitive")
            return Activation(x.row, axes)
        primitive = self._norm(scope, module_of(where, self.names[p.leaf]))
        size = math.prod(self.shape_of(p.key))
        row = self.flow.add(
            primitive, [x.row], shape=(size,), name=self.name_of(p.key), weight=p.key
        )
        self.place(p, row, "scale", dict.fromkeys(along, "o"))
        return Activation(row, axes, fresh=True)

    def _norm(self, scope: Scope, where: str) -> str:
        """The primitive of a norm with this statistic."""
        if BATCH in scope.reduced:
            return "bn"
        if SPACE in scope.reduced and scope.kept & {CHANNEL}:
            self.note("the group or instance norm in {} is taken for batch norm (bn)", where)
            return "bn"
        if SPACE in scope.reduced or CHANNEL in scope.kept:
            self.note("the norm in {} is taken for layer norm (ln)", where)
        return "ln"
