"""Equations of jaxprs: primitives of JAX by name, and what is read out of their parameters.

Names and parameters differ between versions of JAX: here is what is asked of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from ghn_jax.tracing.abstract_values import (
    Constant,
)

# They leave values as they are, ...
SAME = {
    "convert_element_type", "copy", "stop_gradient", "reduce_precision", "sharding_constraint",
    "device_put", "name", "real", "pvary",
}  # fmt: skip
# ... or lay them out otherwise.
VIEWS = SAME | {
    "reshape", "transpose", "squeeze", "broadcast_in_dim", "rev", "slice", "dynamic_slice", "pad",
    "gather", "split", "unstack", "tile", "bitcast_convert_type",
}  # fmt: skip
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "argmax", "argmin",
}  # fmt: skip
ELEMENTWISE = {
    "add", "sub", "mul", "div", "max", "min", "neg", "exp", "exp2", "log", "log1p", "expm1", "tanh",
    "logistic", "erf", "erfc", "erf_inv", "abs", "sign", "square", "sqrt", "rsqrt", "cbrt", "pow",
    "integer_pow", "select_n", "clamp", "sin", "cos", "tan", "floor", "ceil", "round", "rem",
    "atan2",
    "gt", "lt", "ge", "le", "eq", "ne", "and", "or", "not", "xor", "is_finite", "nextafter",
    "add_any", "lgamma", "digamma", "asin", "acos", "atan", "sinh", "cosh", "asinh",
    "acosh", "atanh", "shift_left", "shift_right_logical", "shift_right_arithmetic", "imag",
    "complex", "conj", "population_count", "clz",
}  # fmt: skip
CONTROL = {"scan", "while", "cond"}


def inner_jaxpr(eqn):
    """The jaxpr that an equation calls once, or None."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        jaxpr = eqn.params.get(key)
        if jaxpr is not None:
            return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())
    return None


def scan_sizes(eqn) -> tuple[int, int]:
    """How many inputs of a scan are the same in all turns, and how many go from turn to turn.

    By their shapes, as versions of JAX say it in different parameters: what is stacked has an axis
    more outside.
    """
    inner = eqn.params["jaxpr"].jaxpr

    def stacked(outside, inside) -> int:
        return sum(a.aval.shape != b.aval.shape for a, b in zip(outside, inside, strict=True))

    carried = len(eqn.outvars) - stacked(eqn.outvars, inner.outvars)
    return len(eqn.invars) - carried - stacked(eqn.invars, inner.invars), carried


def picked(eqn, others: Sequence[Constant], output: int, shape):
    """(axis, index) where a view has one of what lies along an axis; index None: not known."""
    name, params = eqn.primitive.name, eqn.params
    before = eqn.invars[0].aval.shape
    if name == "unstack":
        yield params["axis"], output
    elif name == "gather":
        (axis,) = gone = params["dimension_numbers"].collapsed_slice_dims or (None,)
        if len(gone) == 1 and axis is not None and math.prod(eqn.invars[1].aval.shape) == 1:
            value = others[0].value
            yield axis, None if value is None else int(np.clip(value.item(), 0, before[axis] - 1))
    elif name in ("slice", "dynamic_slice", "split"):
        for axis, size in enumerate(shape):
            if size > 1 or before[axis] == 1:
                continue
            start: Any = output
            if name == "slice":
                start = params["start_indices"][axis]
            elif name == "dynamic_slice":
                value = others[axis].value
                start = None if value is None else int(np.clip(value, 0, before[axis] - 1))
            yield axis, start
