"""Penn-Fudan: 170 photographs of streets with the pedestrians in them (Wang et al. 2007).

Read from the official folder: `PNGImages/NAME.png`, and `PedMasks/NAME_mask.png`, where pixels have
the number of the pedestrian that they belong to, or 0. Boxes are those of the masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ghn_jax.detection.detector import Batch

FOLDER, WHERE = "PennFudanPed", "https://www.cis.upenn.edu/~jshi/ped_html/"
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's, as in torchvision's detectors
STD = np.array([0.229, 0.224, 0.225], np.float32)
_MULTIPLE = 32  # of pixels, that padded images are


class Photograph(NamedTuple):
    """A photograph and its pedestrians.

    Attributes:
      name: of its file.
      pixels: (H, W, 3) uint8.
      boxes: (N, 4) from the first to the last pixel of each pedestrian.
    """

    name: str
    pixels: np.ndarray
    boxes: np.ndarray


def read_penn_fudan(folder: str | Path) -> list[Photograph]:
    """All photographs, in the order of their names.

    Args:
      folder: `PennFudanPed`, or the one that it is in.

    Raises:
      FileNotFoundError: it is not laid out as the official one.
      ValueError: a mask shows no pedestrian, or does not fit its photograph.
    """
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    for part in ("PNGImages", "PedMasks"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {part}; give the folder {FOLDER} with "
                                    f"PNGImages and PedMasks in it, from {WHERE}")  # fmt: skip
    paths = sorted((folder / "PNGImages").glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder / 'PNGImages'} has no PNG files; get them from {WHERE}")
    return [_read(path, folder / "PedMasks" / f"{path.stem}_mask.png") for path in paths]


def _read(path: Path, mask_path: Path) -> Photograph:
    if not mask_path.is_file():
        raise FileNotFoundError(f"{path} has no mask {mask_path}; get it from {WHERE}")
    try:
        with Image.open(path) as image, Image.open(mask_path) as mask:
            pixels, numbers = np.asarray(image.convert("RGB")), np.asarray(mask)
    except OSError as error:
        raise ValueError(f"{path} or its mask cannot be decoded: {error}; replace it") from error
    if numbers.shape != pixels.shape[:2]:
        raise ValueError(f"{mask_path} has the shape {numbers.shape}, but {path.name} "
                         f"{pixels.shape[:2]}; a mask has one number for each pixel")  # fmt: skip
    boxes = []
    for number in np.unique(numbers[numbers > 0]):
        y, x = np.nonzero(numbers == number)
        boxes.append([x.min(), y.min(), x.max(), y.max()])
        if x.min() == x.max() or y.min() == y.max():
            raise ValueError(f"{mask_path} has a pedestrian, number {number}, that is one pixel "
                             "wide or high; correct the mask")  # fmt: skip
    if not boxes:
        raise ValueError(f"{mask_path} shows no pedestrian: all of it is 0; correct or remove "
                         f"{path.name} and its mask")  # fmt: skip
    return Photograph(path.stem, pixels, np.array(boxes, np.float32))


def split(
    photographs: Sequence[Photograph], test: int, seed: int
) -> tuple[list[Photograph], list[Photograph]]:
    """Those to train on and, the last ones in a random order, those to test on.

    Raises:
      ValueError: one of the two would be empty.
    """
    if not 0 < test < len(photographs):
        raise ValueError(f"{test} test images are asked for; allowed: 1 to {len(photographs) - 1}, "
                         f"some of {len(photographs)}")  # fmt: skip
    order = [photographs[i] for i in np.random.default_rng(seed).permutation(len(photographs))]
    return order[:-test], order[-test:]


def flip(photograph: Photograph) -> Photograph:
    """Left to right."""
    width = photograph.pixels.shape[1]
    boxes = photograph.boxes.copy()
    boxes[:, [0, 2]] = width - photograph.boxes[:, [2, 0]]
    return photograph._replace(pixels=photograph.pixels[:, ::-1], boxes=boxes)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) -> (*size, C), bilinear, without smoothing where it gets smaller, as PyTorch."""
    for axis, length in enumerate(size):
        have = image.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * (have / length) - 0.5, 0, have - 1)
        low = at.astype(int)
        share = (at - low).astype(np.float32).reshape(-1, *[1] * (2 - axis))
        first, second = (image.take(i, axis) for i in (low, np.minimum(low + 1, have - 1)))
        image = first + share * (second - first)
    return image


class Frame(NamedTuple):
    """What photographs are made to fit, so that all batches have one shape.

    Attributes:
      shorter: length of photographs' shorter sides, in pixels...
      longer: ...if their longer ones do not become longer than this.
      height, width: of padded images.
      objects: boxes of an image, with padding.
    """

    shorter: int
    longer: int
    height: int
    width: int
    objects: int

    @classmethod
    def around(cls, photographs: Sequence[Photograph], shorter: int, longer: int) -> Frame:
        """The smallest one that all photographs fit in."""
        sizes = np.array([scaled(p.pixels.shape[:2], shorter, longer) for p in photographs])
        height, width = (-(-sizes.max(0) // _MULTIPLE) * _MULTIPLE).tolist()
        objects = max(len(p.boxes) for p in photographs)
        return cls(shorter, longer, height, width, objects)

    def batch(self, photographs: Sequence[Photograph]) -> Batch:
        """Photographs, resized, normalised and padded."""
        count = len(photographs)
        images = np.zeros((count, self.height, self.width, 3), np.float32)
        sizes = np.zeros((count, 2), np.float32)
        boxes = np.zeros((count, self.objects, 4), np.float32)
        labels = np.zeros((count, self.objects), np.int32)
        for i, photograph in enumerate(photographs):
            size = scaled(photograph.pixels.shape[:2], self.shorter, self.longer)
            pixels = (photograph.pixels.astype(np.float32) / 255 - MEAN) / STD
            images[i, : size[0], : size[1]] = resize(pixels, size)
            sizes[i] = size
            n = len(photograph.boxes)
            boxes[i, :n] = photograph.boxes * _ratios(photograph.pixels.shape[:2], size)
            labels[i, :n] = 1
        return Batch(images, sizes, boxes, labels)

    def unscale(self, boxes: np.ndarray, photograph: Photograph) -> np.ndarray:
        """Boxes (N, 4) of a batch's image in pixels of its photograph."""
        size = photograph.pixels.shape[:2]
        return boxes / _ratios(size, scaled(size, self.shorter, self.longer))


def scaled(size: tuple[int, int], shorter: int, longer: int) -> tuple[int, int]:
    """Height and width, scaled as `Frame` says."""
    scale = min(shorter / min(size), longer / max(size))
    return math.floor(size[0] * scale), math.floor(size[1] * scale)


def _ratios(before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    y, x = (new / old for new, old in zip(after, before, strict=True))
    return np.array([x, y, x, y], np.float32)
