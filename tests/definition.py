"""The Flax modules unit by unit: each unit is compiled for itself, once for all networks."""

import contextlib

import jax
import pytest

from ghn_jax.deepnets1m.units import Unit

_COMPILED = {unit: jax.jit(unit.apply, static_argnums=0) for unit in Unit.__subclasses__()}


@contextlib.contextmanager
def unit_by_unit():
    """Modules that run meanwhile are not compiled as a whole, which takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        for unit, apply in _COMPILED.items():
            patch.setattr(unit, "apply", apply)
        yield
