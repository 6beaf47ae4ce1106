"""What images of CIFAR-10's size change in a network made for ImageNet's."""

from __future__ import annotations

from ghn_jax.deepnets1m.task import Task

SMALLEST = 32  # pixels


def is_small(image_size: int) -> bool:
    """Whether the first layers keep the resolution, as the paper has it for CIFAR-10 (§ 5.1).

    Args:
      image_size: height and width of the images, in pixels.

    Raises:
      ValueError: it is below 32 pixels, of which the deepest networks would leave nothing.
    """
    if image_size < SMALLEST:
        raise ValueError(f"image_size is {image_size}; allowed: {SMALLEST} pixels or more")
    return not Task(image_size=image_size).large
