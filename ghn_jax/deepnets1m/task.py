"""What networks are for: classifying images of some size into some number of classes."""

from __future__ import annotations

from typing import NamedTuple

LARGEST_SMALL = 96  # pixels; the images of STL-10


class Task(NamedTuple):
    """A classification task, which shapes a network's stem and classifier.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels.
    """

    num_classes: int = 10
    image_size: int = 32

    @property
    def large(self) -> bool:
        """Whether stems are the strided ones for ImageNet's images, as in the official code."""
        return self.image_size > LARGEST_SMALL

    def check(self) -> Task:
        """This task.

        Raises:
          ValueError: num_classes or image_size is out of range.
        """
        if self.num_classes < 2:
            raise ValueError(f"num_classes is {self.num_classes}; allowed: 2 or more")
        if self.image_size < 8:
            raise ValueError(f"image_size is {self.image_size}; allowed: 8 or more pixels")
        return self
