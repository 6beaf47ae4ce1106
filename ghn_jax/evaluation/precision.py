"""Parameters in half precision."""

from __future__ import annotations

import jax.numpy as jnp

from ghn_jax.tracing.model_graph import map_parameters


def to_bfloat16(variables):
    """Casts a model's parameters to bfloat16.

    Args:
      variables: a Linen model's variables or an NNX module. Batch norm's running averages and all
        else that is no parameter stay as they are.

    Returns:
      New variables, in a tree as they came, or a new module. Layers compute in the type of their
      parameters and inputs together: give them bfloat16 images, or the module
      `dtype=jnp.bfloat16`.

    Raises:
      TypeError: the variables are something else.
      ValueError: they are parameters alone, or an abstract module.
    """

    def cast(path, leaf):
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return map_parameters(variables, cast)
