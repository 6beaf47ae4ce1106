"""Augmentation: crops, mirror images and colours, without a dataset."""

import numpy as np
import pytest
from PIL import Image

from ghn_jax.data import augment


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_gives_every_crop_of_the_padded_image_equally_often(flip):
    image = np.arange(1, 5 * 5 * 3 + 1, dtype=np.uint8).reshape(5, 5, 3)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = [padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    if flip:
        crops += [crop[:, ::-1] for crop in crops]
    views = augment.crop_and_flip(
        np.tile(image, (3600, 1, 1, 1)), np.random.default_rng(0), pad=1, flip=flip
    )
    counts = [sum(np.array_equal(view, crop) for view in views) for crop in crops]
    assert sum(counts) == 3600
    mean = 3600 / len(crops)
    assert max(abs(count - mean) for count in counts) < 5 * mean**0.5


@pytest.mark.parametrize("size", [(500, 375), (64, 64), (300, 100)])
def test_crop_boxes_are_in_the_image_and_have_the_allowed_areas_and_shapes(size):
    width, height = size
    rng = np.random.default_rng(0)
    x, y, w, h = np.array([augment.crop_box(width, height, rng) for _ in range(2000)]).T
    assert min(x.min(), y.min()) == 0
    assert (x + w).max() == width
    assert (y + h).max() == height
    # Rounding to pixels changes sides of 15 or more by half a pixel at most.
    assert (w / h).min() > 3 / 4 * 0.95
    assert (w / h).max() < 4 / 3 * 1.05
    area = w * h / (width * height)
    assert 0.075 < area.min() < 0.1
    largest = min(1, 4 / 3 * height / width)
    assert 0.95 * largest < area.max() <= largest
    assert len(set(x)) > 20


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 30), (480, 0, 40, 30)), ((30, 1000), (0, 480, 30, 40))]
)
def test_of_very_long_images_the_centre_is_taken(size, box):
    assert augment.crop_box(*size, np.random.default_rng(0)) == box


def test_hue_turns_colours_and_leaves_gray():
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert augment.shift_hue(red, 1 / 3).getpixel((0, 0)) == (0, 255, 0)
    blue = augment.shift_hue(red, -1 / 3).getpixel((0, 0))
    np.testing.assert_allclose(blue, (0, 0, 255), atol=6)  # of 256 hues, none is exactly this
    gray = Image.new("RGB", (1, 1), (90, 90, 90))
    assert augment.shift_hue(gray, 0.2).getpixel((0, 0)) == (90, 90, 90)


def test_colour_jitter_has_the_allowed_strength():
    rng = np.random.default_rng(0)
    # Of one gray, only the brightness changes; of a colour, the hue by 0.2 turns at most.
    gray = Image.new("RGB", (2, 2), (100, 100, 100))
    values = [augment.jitter_colours(gray, rng).getpixel((0, 0)) for _ in range(300)]
    assert all(r == g == b for r, g, b in values)
    assert 59 <= min(values)[0] < 65
    assert 135 < max(values)[0] <= 141
    blue = Image.new("RGB", (2, 2), (100, 100, 130))
    hues = [
        augment.jitter_colours(blue, rng).convert("HSV").getpixel((0, 0))[0] for _ in range(300)
    ]
    assert 170 - 51 - 6 <= min(hues) < 170 - 40
    assert 170 + 40 < max(hues) <= 170 + 51 + 6
    # Contrast and saturation: two colours move apart or together.
    both = Image.fromarray(np.array([[[120, 100, 100], [60, 60, 50]]], np.uint8))
    apart = np.array([np.ptp(augment.jitter_colours(both, rng), axis=(0, 1)) for _ in range(300)])
    assert apart[:, 1].min() < 0.5 * 40
    assert apart[:, 1].max() > 1.5 * 40


def test_colour_jitter_changes_its_order():
    """Brightness before contrast differs from after it: same factors, several results."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    class Fixed:
        """Random numbers with fixed factors and any order."""

        def __init__(self, seed):
            self.permutation = np.random.default_rng(seed).permutation

        def uniform(self, low, high, size=None):
            return np.full(size, high) if size else high

    image = Image.fromarray(pixels)
    results = {augment.jitter_colours(image, Fixed(seed)).tobytes() for seed in range(40)}
    assert len(results) > 4
