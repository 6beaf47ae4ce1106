"""Which boxes count as which object, and which of them are trained on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ghn_jax.detection.boxes import iou

IGNORED, BACKGROUND = -1, 0  # as labels; classes count from 1


def match(
    objects: jax.Array,
    labels: jax.Array,
    boxes: jax.Array,
    *,
    foreground: float,
    background: float,
    best_too: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gives each box the object that it overlaps most.

    Args:
      objects: (G, 4) true boxes.
      labels: (G,) their classes, from 1; 0 for padding.
      boxes: (N, 4) anchors or proposals.
      foreground: IoU from which a box is of the object's class.
      background: IoU below which it is background; between the two it is ignored.
      best_too: the boxes that overlap an object most, ties included, are not background.

    Returns:
      (N,) indices of objects, and (N,) labels.
    """
    overlap = jnp.where(labels[:, None] > 0, iou(objects, boxes), -1)
    matched, value = overlap.argmax(0), overlap.max(0)
    found = jnp.where(value < background, BACKGROUND, IGNORED)
    is_object = value >= foreground
    if best_too:
        best = overlap == overlap.max(1, keepdims=True)
        is_object |= (best & (labels[:, None] > 0)).any(0)
    return matched, jnp.where(is_object, labels[matched], found)


def sample(
    key: jax.Array, labels: jax.Array, *, count: int, share: float
) -> tuple[jax.Array, jax.Array]:
    """Draws boxes at random: at most a share of objects, and background up to `count`.

    Args:
      key: of the draw.
      labels: (N,) as `match` gives them.
      count: how many boxes.
      share: of objects, at most.

    Returns:
      (count,) indices, objects first, and which of them are drawn: fewer, if there are not enough.
    """
    draw = jax.random.uniform(key, labels.shape)
    most = min(int(count * share), len(labels))
    positive, first = jax.lax.top_k(jnp.where(labels > 0, draw, -1), most)
    negative, rest = jax.lax.top_k(
        jnp.where(labels == BACKGROUND, draw, -1), min(count, len(labels))
    )
    room = count - (positive >= 0).sum()
    valid = jnp.concatenate([positive >= 0, (negative >= 0) & (jnp.arange(len(rest)) < room)])
    chosen = jnp.argsort(~valid, stable=True)[:count]
    missing = max(count - len(valid), 0)
    indices = jnp.concatenate([first, rest])[chosen]
    return jnp.pad(indices, (0, missing)), jnp.pad(valid[chosen], (0, missing))
