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
                missing = re.search(r"unbound axis name: (\w+)", str(error))
                if missing is None or missing[1] in names:
                    raise
                names.append(missing[1])

    return bound


def _call(call: Callable, names: list[str], args: tuple):
    if not names:
        return call(*args)
    name, *rest = names
    mapped = jax.vmap(lambda _: _call(call, rest, args), axis_name=name, axis_size=1, in_axes=None)
    return jax.tree.map(lambda x: x[0], mapped(None))
