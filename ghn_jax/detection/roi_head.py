"""The head of Fast R-CNN (Girshick 2015): what is in a box, and where in it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.detection import boxes as box
from ghn_jax.detection.losses import box_loss, class_loss
from ghn_jax.detection.nms import suppress_by_class
from ghn_jax.detection.sampling import match, sample

_SHARE = 0.25  # of objects among the regions that are trained on, at most
_FOREGROUND = 0.5  # IoU with an object; below is background
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of codes
_LEAST_SCORE = 0.05  # of a detection
_OVERLAP = 0.5  # of detections of a class, at most
_SMALLEST = 1e-2  # width and height of a detection, in pixels
_DETECTIONS = 100  # of an image, at most


class Detections(NamedTuple):
    """What is found in an image, the best first; a batch has an axis more.

    Attributes:
      boxes: (100, 4).
      scores: (100,); 0 where there is none.
      labels: (100,) classes, from 1; 0 where there is none.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array


def _linear(x: jax.Array, features: int, name: str) -> jax.Array:
    """A linear layer, initialised as PyTorch's."""
    bound = x.shape[-1] ** -0.5
    uniform = nn.initializers.uniform(2 * bound)

    def init(key, shape, dtype=jnp.float32):
        return uniform(key, shape, dtype) - bound

    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)


class ROIHead(nn.Module):
    """Two linear layers, then scores of classes and codes of boxes.

    Attributes:
      classes: background included.
      hidden: features of each layer.
    """

    classes: int
    hidden: int

    @nn.compact
    def __call__(self, regions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(..., 7, 7, C) -> logits (..., classes) and codes (..., classes, 4)."""
        x = regions.reshape(*regions.shape[:-3], -1)
        x = nn.relu(_linear(x, self.hidden, "fc6"))
        x = nn.relu(_linear(x, self.hidden, "fc7"))
        codes = _linear(x, 4 * self.classes, "bbox_pred")
        logits = _linear(x, self.classes, "cls_score")
        return logits, codes.reshape(*codes.shape[:-1], self.classes, 4)


class Regions(NamedTuple):
    """Boxes that the head is trained on; a batch has an axis more.

    Attributes:
      boxes: (N, 4).
      drawn: (N,) which of them there are.
      labels: (N,) their classes; 0 for background.
      codes: (N, 4) what is to be predicted for objects.
    """

    boxes: jax.Array
    drawn: jax.Array
    labels: jax.Array
    codes: jax.Array


def choose_regions(
    key: jax.Array,
    proposals: jax.Array,
    valid: jax.Array,
    objects: jax.Array,
    labels: jax.Array,
    count: int,
) -> Regions:
    """Draws regions of an image among proposals (N, 4) and true boxes; see `sampling.match`."""
    boxes = jnp.concatenate([proposals, objects])
    matched, found = match(
        objects, labels, boxes, foreground=_FOREGROUND, background=_FOREGROUND, best_too=False
    )
    found = jnp.where(jnp.concatenate([valid, labels > 0]), found, -1)
    chosen, drawn = sample(key, found, count=count, share=_SHARE)
    codes = box.encode(objects[matched[chosen]], boxes[chosen], _WEIGHTS)
    return Regions(boxes[chosen], drawn, found[chosen], codes)


def roi_losses(
    logits: jax.Array, codes: jax.Array, regions: Regions
) -> tuple[jax.Array, jax.Array]:
    """Losses of classes and of boxes, over the regions of all images.

    Args:
      logits, codes: (B, N, classes), (B, N, classes, 4).
      regions: of a batch.
    """
    labels = jnp.maximum(regions.labels, 0)
    own = jnp.take_along_axis(codes, labels[..., None, None], -2)[..., 0, :]
    objects = regions.drawn & (labels > 0)
    return (
        class_loss(logits, labels, regions.drawn),
        box_loss(own, regions.codes, objects, regions.drawn),
    )


@jax.vmap
def detections(
    logits: jax.Array, codes: jax.Array, proposals: jax.Array, valid: jax.Array, size: jax.Array
) -> Detections:
    """What is left of the head's predictions.

    Args:
      logits, codes: (B, N, classes), (B, N, classes, 4).
      proposals, valid: (B, N, 4), (B, N).
      size: (B, 2) height and width of the images without padding.
    """
    boxes = box.clip(box.decode(codes, proposals[:, None], _WEIGHTS), size)
    classes = logits.shape[-1]
    scores = nn.softmax(logits)[:, 1:].ravel()
    boxes = boxes[:, 1:].reshape(-1, 4)
    labels = jnp.tile(jnp.arange(1, classes), len(logits))
    there = (
        jnp.repeat(valid, classes - 1) & (scores > _LEAST_SCORE) & box.at_least(boxes, _SMALLEST)
    )
    chosen, kept = suppress_by_class(
        boxes, scores, labels, there, threshold=_OVERLAP, count=_DETECTIONS
    )
    return Detections(
        boxes[chosen], jnp.where(kept, scores[chosen], 0), jnp.where(kept, labels[chosen], 0)
    )
