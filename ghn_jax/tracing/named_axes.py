"""Named axes of a model (`nn.BatchNorm(axis_name="batch")`) where no `pmap` or `vmap` binds them.

On one device such an axis adds nothing: it is bound with size 1, and sums over it are their terms.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax


def bind_axes(call: Callable) -> Callable:
    """A function that calls another with each named axis bound that it asks for and nobody binds.

    Args:
      call: of trees of arrays; what it returns is the same along the axes.
    """

    @functools.wraps(call)
    def bound(*args):
        names: list[str] = []
        while True:
            try:
                return _call(call, names, args)
            except NameError as error:
                missing = next((name for name in _missing(str(error)) if name not in names), None)
                if missing is None:
                    raise
                names.append(missing)

    return bound


def _missing(error: str) -> list[str]:
    """Names that JAX may mean: any text is a name, and what follows it differs by version."""
    told = (r"unbound axis name: (.+?)\. To fix", r"unbound axis name: (.+)", r"axis name: (\w+)")
    found = [re.search(how, error) for how in told]
    return [match[1] for match in found if match and "unbound axis name" in error]


def _call(call: Callable, names: list[str], args: tuple):
    if not names:
        return call(*args)
    name, *rest = names
    mapped = jax.vmap(lambda _: _call(call, rest, args), axis_name=name, axis_size=1, in_axes=None)
    return jax.tree.map(lambda x: x[0], mapped(None))
