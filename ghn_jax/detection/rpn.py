"""The region proposal network (Ren et al. 2015): where there may be objects."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.detection import boxes as box
from ghn_jax.detection.losses import box_loss, objectness_loss
from ghn_jax.detection.nms import suppress
from ghn_jax.detection.sampling import match, sample

_SAMPLED, _SHARE = 256, 0.5  # anchors of an image that are trained on; of objects at most
_FOREGROUND, _BACKGROUND = 0.7, 0.3  # IoU with objects
_OVERLAP = 0.7  # of proposals, at most
_SMALLEST = 1e-3  # width and height of a proposal, in pixels


class RPNHead(nn.Module):
    """Whether there is an object near each anchor, and where.

    Attributes:
      anchors: at each position.
    """

    anchors: int

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, C) -> logits (B, H * W * anchors) and codes (B, H * W * anchors, 4)."""
        batch, init = len(features), nn.initializers.normal(0.01)
        x = nn.Conv(features.shape[-1], (3, 3), padding=1, kernel_init=init, name="conv")(features)
        x = nn.relu(x)
        logits = nn.Conv(self.anchors, (1, 1), kernel_init=init, name="cls_logits")(x)
        codes = nn.Conv(4 * self.anchors, (1, 1), kernel_init=init, name="bbox_pred")(x)
        return logits.reshape(batch, -1), codes.reshape(batch, -1, 4)


def propose(
    logits: jax.Array, codes: jax.Array, anchors: jax.Array, size: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The best boxes of an image, up to `count` before and after suppression.

    Args:
      logits, codes, anchors: (N,), (N, 4), (N, 4).
      size: (2,) height and width of the image without padding.
      count: how many.

    Returns:
      (count, 4) boxes and (count,) which of them there are.
    """
    scores, chosen = jax.lax.top_k(logits, min(count, len(logits)))
    found = box.clip(box.decode(codes[chosen], anchors[chosen]), size)
    valid = box.at_least(found, _SMALLEST)
    indices, kept = suppress(found, scores, valid, threshold=_OVERLAP, count=count)
    return found[indices], kept


def rpn_losses(
    key: jax.Array,
    logits: jax.Array,
    codes: jax.Array,
    anchors: jax.Array,
    objects: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Losses of objectness and of boxes, over the anchors that are drawn in all images.

    Args:
      key: of the draw.
      logits, codes: (B, N), (B, N, 4).
      anchors: (N, 4).
      objects, labels: (B, G, 4), (B, G); see `sampling.match`.
    """

    def targets(key, objects, labels):
        matched, found = match(
            objects, (labels > 0).astype(int), anchors,
            foreground=_FOREGROUND, background=_BACKGROUND, best_too=True,
        )  # fmt: skip
        chosen, drawn = sample(key, found, count=_SAMPLED, share=_SHARE)
        return chosen, drawn, found[chosen] > 0, box.encode(objects[matched], anchors)[chosen]

    keys = jax.random.split(key, len(logits))
    chosen, drawn, positive, wanted = jax.vmap(targets)(keys, objects, labels)
    logits = jnp.take_along_axis(logits, chosen, 1)
    codes = jnp.take_along_axis(codes, chosen[..., None], 1)
    return (
        objectness_loss(logits, positive, drawn),
        box_loss(codes, wanted, positive & drawn, drawn),
    )
