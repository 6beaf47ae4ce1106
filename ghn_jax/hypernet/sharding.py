"""Where a large hypernetwork's parameters are: each large array in parts, one on each device."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def param_shardings(params: Any, mesh: Mesh, *axes: str, least: int = 2**16) -> Any:
    """A `NamedSharding` for each parameter, for `jax.device_put` or `jax.jit`.

    The longest axis of an array that can be divided is; the last of several. An optimizer's moments
    are arrays of the same shapes, so that its state can be given here, too.

    Args:
      params: a tree of arrays, or of their shapes.
      mesh: of the devices.
      axes: of the mesh, that arrays are divided along.
      least: smaller arrays are copied to every device.

    Raises:
      ValueError: the mesh has no such axis.
    """
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"the mesh has no axis {axis!r}; allowed: {', '.join(mesh.axis_names)}"
            )
    parts = math.prod(mesh.shape[axis] for axis in axes)

    def of(x) -> NamedSharding:
        divisible = [i for i, n in enumerate(x.shape) if n % parts == 0]
        if x.size < least or not divisible:
            return NamedSharding(mesh, P())
        longest = max(divisible, key=lambda i: (x.shape[i], i))
        return NamedSharding(mesh, P(*[axes if i == longest else None for i in range(x.ndim)]))

    return jax.tree.map(of, params)
