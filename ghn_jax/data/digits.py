"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from ghn_jax.data.arrays import to_pixels
from ghn_jax.data.splits import Images

IMAGE_SIZE = 16

# The file runs form by form; on each, one person began with 0 to 9 three times. Splits end where
# forms do, so that `val` and `test` have writers whom `train` has not: about 9, 2 and 3 forms for
# 64, 14 and 21 % of the images.
_PARTS = {"train": slice(0, 1157), "val": slice(1157, 1415), "test": slice(1415, 1797)}


def load_digits(split: str, image_size: int | None) -> Images:
    """1,797 gray 8x8 images, enlarged (bilinear), gray in all three channels."""
    from sklearn import datasets  # slow to import, and not needed for photographs

    digits = datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    size = IMAGE_SIZE if image_size is None else image_size
    pixels = to_pixels(gray, size)
    train = pixels[_PARTS["train"], ..., 0] / 255
    part = _PARTS[split]
    return Images(
        name="digits",
        split=split,
        num_classes=10,
        image_size=size,
        mean=(float(train.mean()),) * 3,
        std=(float(train.std()),) * 3,
        pixels=pixels[part],
        labels=digits.target[part].astype(np.int32),
        mirror=False,
    )
