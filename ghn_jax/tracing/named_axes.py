"""Named axes of a model (`nn.BatchNorm(axis_name="batch")`) where no `pmap` or `vmap` binds them.

On one device such an axis adds nothing: it is bound with size 1, and sums over it are their terms.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def bind_axes(call: Callable) -> Callable:
    """A function that calls another with each named axis bound that it asks for and nobody binds.

    Args:
      call: of trees of arrays; what it returns is the same along the axes.

    Raises:
      ValueError: with named axes in it, it returns a class that JAX does not know, or sums over
        groups of an axis.
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
            except NotImplementedError as error:
                if not names or (str(error) and "axis_index_groups" not in str(error)):
                    raise
                axes = " or ".join(map(repr, names))
                raise ValueError(
                    f"the model sums over groups of the axis {axes} (axis_index_groups), which JAX "
                    "does across devices only; give the model without groups "
                    "(axis_index_groups=None), its tensors are the same"
                ) from error

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
    rebuild: list[Callable] = []

    def one(_):
        arrays, back = _flat(_call(call, rest, args))
        rebuild.append(back)
        return arrays

    mapped = jax.vmap(one, axis_name=name, axis_size=1, in_axes=None)(None)
    return rebuild[0]([x[0] for x in mapped])


def _flat(value) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The arrays of a tree, and a function that puts others in their places.

    Texts and numbers stay as they are; dataclasses need not be known to JAX.
    """
    leaves, treedef = jax.tree.flatten(value)
    parts = [_flat_leaf(leaf) for leaf in leaves]

    def back(arrays: list[jax.Array]):
        new, at = [], 0
        for mine, rebuild in parts:
            new.append(rebuild(arrays[at : at + len(mine)]))
            at += len(mine)
        return jax.tree.unflatten(treedef, new)

    return [x for mine, _ in parts for x in mine], back


def _flat_leaf(leaf):
    if isinstance(leaf, jax.Array):
        return [leaf], lambda arrays: arrays[0]
    if isinstance(leaf, (str, bytes, int, float, complex, np.ndarray, np.generic)):
        return [], lambda _: leaf
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
        arrays, back = _flat(fields)
        return arrays, lambda new: dataclasses.replace(leaf, **back(new))
    raise ValueError(
        f"the model, which has named axes, returns an object of {type(leaf).__name__}; allowed: "
        "arrays, texts and numbers in tuples, lists, dicts, dataclasses and classes that JAX knows "
        "(jax.tree_util.register_pytree_node_class)"
    )
