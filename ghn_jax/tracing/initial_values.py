"""Initial values of a model's variables, of which no more is computed than is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from ghn_jax.tracing.equations import inner_jaxpr, scan_sizes


def read_init(
    init: Callable, key
) -> tuple[Any, Callable[[Sequence[int]], list[jax.Array]], Callable[[int], float | None]]:
    """Traces a model's initialisation.

    Args:
      init: key -> variables.
      key: a random key.

    Returns:
      The variables as shapes; a function that computes some of their leaves, given by their places
      in `jax.tree.leaves`, and nothing that they do not depend on; and one that tells of a leaf the
      number that it is filled with, None where it is filled with several.
    """
    closed, shapes = jax.make_jaxpr(init, return_shape=True)(key)
    known = _consts(closed)

    def constant(number: int) -> float | None:
        return _number(closed.jaxpr, closed.jaxpr.outvars[number], known)

    def filled(number: int) -> jax.Array | None:
        """Zeros, ones, ... without compiling a program for each shape of them."""
        value, aval = constant(number), closed.jaxpr.outvars[number].aval
        return None if value is None else jax.numpy.asarray(np.full(aval.shape, value, aval.dtype))

    def compute(wanted: Sequence[int]) -> list[jax.Array]:
        found = {number: filled(number) for number in wanted}
        rest = sorted(number for number in found if found[number] is None)
        if rest:
            used = [i in rest for i in range(len(closed.jaxpr.outvars))]
            jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
            values = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts))(key)
            found.update(zip(rest, values, strict=True))
        return [found[number] for number in wanted]

    return shapes, compute, constant


def filled_with(value) -> float | None:
    """The number that all elements of an array are; None where they vary, or are not known."""
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "dtype"):
        return None
    if not isinstance(value, (np.ndarray, np.generic, jax.Array)) or value.size == 0:
        return None
    real = (np.integer, np.floating)
    if not any(jax.dtypes.issubdtype(value.dtype, kind) for kind in real):  # random keys, say
        return None
    value = np.asarray(value)
    return float(value.flat[0]) if (value == value.flat[0]).all() else None


def _consts(closed) -> dict[Any, float | None]:
    """What a jaxpr's constants are filled with, such as NumPy's zeros."""
    return dict(zip(closed.jaxpr.constvars, (filled_with(v) for v in closed.consts), strict=True))


# They keep their first operand's numbers, ...
_LAID_OUT = {
    "broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose",
    "slice", "dynamic_slice", "split", "unstack", "rev", "tile",
}  # fmt: skip
# ... or have those of several, by the slice of operands that are no indices.
_PUT_TOGETHER = {
    "concatenate": slice(None), "stack": slice(None), "pad": slice(None),
    "select_n": slice(1, None), "dynamic_update_slice": slice(2), "scatter": slice(0, None, 2),
}  # fmt: skip
_COMBINED = {"mul": np.multiply, "add": np.add, "sub": np.subtract, "div": np.divide}


def _number(jaxpr, atom, known: Mapping) -> float | None:
    """The number that all elements of a value are, whatever the inputs; None where they vary."""
    if isinstance(atom, core.Literal):
        return float(atom.val) if np.ndim(atom.val) == 0 else None
    if atom in known:
        return known[atom]
    eqn = next((eqn for eqn in jaxpr.eqns if atom in eqn.outvars), None)
    if eqn is None:
        return None
    name, inner = eqn.primitive.name, inner_jaxpr(eqn)
    if name in _LAID_OUT:
        return _number(jaxpr, eqn.invars[0], known)
    if name in _COMBINED:
        values = [_number(jaxpr, v, known) for v in eqn.invars]
        if name == "mul" and 0 in values:  # random numbers times a deviation of 0
            return 0.0
        return None if None in values else float(_COMBINED[name](*values))
    if name in _PUT_TOGETHER:
        several = {_number(jaxpr, v, known) for v in eqn.invars[_PUT_TOGETHER[name]]}
        return several.pop() if len(several) == 1 else None
    if inner is None:
        return None
    carry = range(0)
    if name == "scan":
        first, carried = scan_sizes(eqn)
        if eqn.outvars.index(atom) < carried:
            return None
        carry = range(first, first + carried)
    inputs = _consts(inner)
    for i, (v, outer) in enumerate(zip(inner.jaxpr.invars, eqn.invars, strict=False)):
        inputs[v] = None if i in carry else _number(jaxpr, outer, known)
    return _number(inner.jaxpr, inner.jaxpr.outvars[eqn.outvars.index(atom)], inputs)
