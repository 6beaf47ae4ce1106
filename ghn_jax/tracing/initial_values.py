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

    def constant(number: int) -> float | None:
        return _number(closed.jaxpr, closed.jaxpr.outvars[number], {})

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


_LAID_OUT = {
    "broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose",
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
        return None if None in values else float(_COMBINED[name](*values))
    if inner is None:
        return None
    inputs = {}
    if name != "scan":
        pairs = zip(inner.jaxpr.invars, eqn.invars, strict=False)
        inputs = {v: _number(jaxpr, outer, known) for v, outer in pairs}
    elif eqn.outvars.index(atom) < scan_sizes(eqn)[1]:
        return None
    return _number(inner.jaxpr, inner.jaxpr.outvars[eqn.outvars.index(atom)], inputs)
