"""Losses over the boxes that are drawn; what is not drawn counts nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

_BETA = 1 / 9  # where the smooth L1 loss turns from squares to distances


def smooth_l1(difference: jax.Array) -> jax.Array:
    """Half a square over beta up to beta, then the distance less half of beta."""
    distance = jnp.abs(difference)
    return jnp.where(
        distance < _BETA, 0.5 * jnp.square(distance) / _BETA, distance - 0.5 * _BETA
    )  # fmt: skip


def box_loss(
    codes: jax.Array, targets: jax.Array, objects: jax.Array, drawn: jax.Array
) -> jax.Array:
    """Smooth L1 of objects' boxes, summed, over the number of boxes drawn.

    Args:
      codes, targets: (..., 4) as `boxes.encode` gives them.
      objects: (...) which are drawn objects.
      drawn: (...) which are drawn.
    """
    # Targets of all else may not be finite; a gradient of zero times infinity would be none.
    targets = jnp.where(objects[..., None], targets, codes)
    return smooth_l1(codes - targets).sum() / jnp.maximum(drawn.sum(), 1)


def objectness_loss(logits: jax.Array, objects: jax.Array, drawn: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of those drawn, (...) each."""
    losses = optax.sigmoid_binary_cross_entropy(logits, objects.astype(logits.dtype))
    return jnp.where(drawn, losses, 0).sum() / jnp.maximum(drawn.sum(), 1)


def class_loss(logits: jax.Array, labels: jax.Array, drawn: jax.Array) -> jax.Array:
    """Mean cross-entropy of those drawn: (..., classes) logits, (...) labels and marks."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.where(drawn, losses, 0).sum() / jnp.maximum(drawn.sum(), 1)
