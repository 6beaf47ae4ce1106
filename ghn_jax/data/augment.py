"""Random views of images for training, the fixed view for evaluation, and normalisation.

Images are uint8 in height, width, RGB order. A random view is a pure function of the image and of
the random generator's state. Small images are arrays and go through whole batches at a time;
photographs, of any size, are PIL images and go one by one, with torchvision's defaults (ImageNet).
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageEnhance

# Random resized crop: share of the image's area, and width / height.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10

# Colour jitter: most change of each factor from 1, and of the hue in turns of the colour circle.
JITTER = 0.4
HUE_JITTER = 0.2


def crop_and_flip(
    pixels: np.ndarray, rng: np.random.Generator, *, pad: int, flip: bool
) -> np.ndarray:
    """Pads small square images with black, crops them back to their size, and may mirror them.

    Every offset is as likely as every other, and, with `flip`, half of the images are mirrored.

    Args:
      pixels: (B, S, S, 3) uint8.
      rng: source of the offsets, and of the mirroring.
      pad: width of the black border in pixels, on each side.
      flip: whether to mirror left and right.

    Returns:
      (B, S, S, 3) uint8, a new array.
    """
    count, size = pixels.shape[:2]
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, size=(2, count, 1))
    mirrored = rng.random((count, 1)) < (0.5 if flip else 0.0)
    along = np.arange(size)
    rows = top + along
    columns = left + np.where(mirrored, along[::-1], along)
    # One gather crops and mirrors: output pixel (b, i, j) is padded[b, rows[b, i], columns[b, j]].
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def decode(data: bytes) -> Image.Image:
    """The RGB image in an encoded (JPEG or PNG) one; gray and CMYK images are converted.

    Raises:
      ValueError: its values have more than 8 bits, which conversion would cut off.
    """
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has the mode {image.mode!r}, of more than 8 bits a value")
    return image.convert("RGB")


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at another size, bilinear; when it shrinks, the filter widens against aliasing."""
    return image.resize((width, height), Image.Resampling.BILINEAR)


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of an image, of random area and shape, within `CROP_AREA` and `CROP_RATIO`.

    Where ten attempts do not fit into the image (it is very long), the largest centred part of an
    allowed shape.

    Args:
      width, height: the image's, in pixels.
      rng: source of the area, the shape and the place.

    Returns:
      left, top, width and height of the part, in pixels.
    """
    low, high = CROP_RATIO
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    return (width - w) // 2, (height - h) // 2, w, h


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turns all colours by a part of the colour circle, -0.5 to 0.5; gray stays gray."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turns * 255) % 256  # PIL counts hues in bytes; adding bytes wraps around
    hue = Image.fromarray(np.asarray(hue) + np.uint8(shift))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def jitter_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue at random, in random order."""
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, size=3)
    turns = rng.uniform(-HUE_JITTER, HUE_JITTER)
    changes = (
        lambda x: ImageEnhance.Brightness(x).enhance(brightness),
        lambda x: ImageEnhance.Contrast(x).enhance(contrast),
        lambda x: ImageEnhance.Color(x).enhance(saturation),
        lambda x: shift_hue(x, turns),
    )
    for i in rng.permutation(len(changes)):
        image = changes[i](image)
    return image


def random_view(data: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """An ImageNet training view: random resized crop, mirrored half of the time, colour jitter.

    Args:
      data: the encoded image.
      size: height and width of the view in pixels.
      rng: source of all that is random in this view.

    Returns:
      (size, size, 3) uint8.
    """
    image = decode(data)
    left, top, width, height = crop_box(*image.size, rng)
    image = resize(image.crop((left, top, left + width, top + height)), size, size)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(jitter_colours(image, rng))


def central_view(data: bytes, size: int) -> np.ndarray:
    """An ImageNet evaluation view: the shorter side at 8/7 of `size`, the centre cut out.

    For views of 224 pixels the shorter side is 256.

    Args:
      data: the encoded image.
      size: height and width of the view in pixels.

    Returns:
      (size, size, 3) uint8.
    """
    return np.asarray(_centre(decode(data), size, size * 8 // 7))


def square(image: Image.Image, size: int) -> Image.Image:
    """The image as a square: the shorter side at `size`, the centre cut out."""
    return _centre(image, size, size)


def _centre(image: Image.Image, size: int, shorter: int) -> Image.Image:
    width, height = image.size
    if width < height:
        image = resize(image, shorter, shorter * height // width)
    else:
        image = resize(image, shorter * width // height, shorter)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def normalise(
    pixels: np.ndarray, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> np.ndarray:
    """(value / 255 - mean) / std for each colour channel.

    Args:
      pixels: (..., 3) uint8.
      mean, std: of each channel, for values from 0 to 1.

    Returns:
      (..., 3) float32.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std
