"""Non-maximum suppression: of boxes that overlap, the one with the highest score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ghn_jax.detection.boxes import iou


def suppress(
    boxes: jax.Array, scores: jax.Array, valid: jax.Array, *, threshold: float, count: int
) -> tuple[jax.Array, jax.Array]:
    """The best boxes that overlap no better one that is kept.

    Whether a box is kept depends on better ones only. So all are decided at once, again and again:
    after as many rounds as the longest chain of boxes that suppress each other, nothing changes.

    Args:
      boxes: (N, 4).
      scores: (N,).
      valid: (N,) whether there is such a box.
      threshold: IoU above which boxes overlap.
      count: how many at most.

    Returns:
      (count,) indices, the highest score first, and which of them are boxes that are kept.
    """
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf))
    boxes, valid = boxes[order], valid[order]
    better = jnp.triu(iou(boxes, boxes) > threshold, 1)

    def decide(state):
        kept, _ = state
        now = valid & ~(better & kept[:, None]).any(0)
        return now, (now != kept).any()

    kept, _ = lax.while_loop(lambda state: state[1], decide, (valid, jnp.array(True)))
    first = jnp.argsort(~kept, stable=True)[:count]
    missing = max(count - len(boxes), 0)
    return jnp.pad(order[first], (0, missing)), jnp.pad(kept[first], (0, missing))


def suppress_by_class(
    boxes: jax.Array,
    scores: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    *,
    threshold: float,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """`suppress`, where boxes of two classes never overlap: each class (N,) is moved aside."""
    aside = labels * (jnp.where(valid[:, None], boxes, 0).max() + 1)
    return suppress(boxes + aside[:, None], scores, valid, threshold=threshold, count=count)
