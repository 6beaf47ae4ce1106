"""Images from arrays: NumPy's .npz files, and the IDX files of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ghn_jax.data.augment import square
from ghn_jax.data.checks import own_size
from ghn_jax.data.splits import Images, check_classes, check_some, held_out, part_by_class
from ghn_jax.data.statistics import channel_statistics, is_gray

# Names of the arrays of images and labels in .npz files: Keras's, and one pair for all.
_TRAIN, _TEST, _ALL = ("x_train", "y_train"), ("x_test", "y_test"), ("images", "labels")

_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_UBYTE = 8  # the code of IDX files for unsigned bytes

Labelled = tuple[np.ndarray, np.ndarray]


def load_npz(name: str, path: Path, split: str, image_size: int | None) -> Images:
    """A split of a .npz file; see `ghn_jax.data.images.load_images`."""
    try:
        # The file may come from anywhere: it must not be executed.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in _TRAIN + _TEST + _ALL}
            keys = file.files
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not a .npz file of plain arrays ({error}); write it with numpy.savez"
        ) from error
    pairs = [pair for pair in (_TRAIN, _TEST, _ALL) if any(key in arrays for key in pair)]
    if pairs not in ([_TRAIN], [_TRAIN, _TEST], [_ALL]) or len(arrays) != 2 * len(pairs):
        raise ValueError(
            f"{path} has the arrays {', '.join(keys) or '(none)'}; use x_train and y_train, with "
            "x_test and y_test if there are test images, or images and labels"
        )
    own = {
        split: _checked(path, *pair, *(arrays[key] for key in pair))
        for split, pair in zip(("train", "test"), pairs, strict=False)
    }
    return _from_arrays(name, own, split, image_size)


def load_idx(name: str, folder: Path, split: str, image_size: int | None) -> Images:
    """A split of a folder of IDX files; see `ghn_jax.data.images.load_images`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one with *-{_IMAGES}(.gz)")
    # MNIST's names for its parts; those of EMNIST have a name before them.
    train = _idx_pair(folder, ("train",))
    test = _idx_pair(folder, ("t10k", "test"))
    if train is None:
        raise FileNotFoundError(f"{folder} has no train-{_IMAGES} or train-{_IMAGES}.gz")
    own = {
        split: _checked(folder, *(path.name for path in pair), *map(_read_idx, pair))
        for split, pair in (("train", train), ("test", test))
        if pair is not None
    }
    return _from_arrays(name, own, split, image_size)


def to_pixels(images: np.ndarray, size: int) -> np.ndarray:
    """Images as networks get them: squares of one size (bilinear), in three channels.

    Args:
      images: (N, height, width) or (N, height, width, 1 or 3) uint8.
      size: S, in pixels.

    Returns:
      (N, S, S, 3) uint8.
    """
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.shape[1:3] != (size, size):
        images = np.stack([np.asarray(square(Image.fromarray(image), size)) for image in images])
    return images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=3)


def _from_arrays(
    name: str, own: Mapping[str, Labelled], split: str, image_size: int | None
) -> Images:
    """Images of a split, from arrays of training images and maybe of test images."""
    images, labels = own["train"]
    num_classes = int(labels.max()) + 1
    check_classes(name, num_classes)
    if num_classes > len(labels):
        raise ValueError(
            f"{name} has labels up to {num_classes - 1} for {len(labels)} images; number the "
            "classes from 0"
        )
    if "test" in own and own["test"][1].max() >= num_classes:
        raise ValueError(
            f"{name} has test images of class {own['test'][1].max()}, but no training images; "
            f"use 0 to {num_classes - 1}"
        )
    if image_size is None:
        image_size = own_size(name, {images.shape[1:3] for images, _ in own.values()})
    held = held_out(own)

    def of(split: str) -> Labelled:
        images, labels = own.get(split, own["train"])
        chosen = part_by_class(split, labels, held)
        check_some(name, split, len(chosen))
        return to_pixels(images[chosen], image_size), labels[chosen].astype(np.int32)

    train = of("train")
    pixels, labels = train if split == "train" else of(split)
    mean, std = channel_statistics(train[0])
    return Images(
        name, split, num_classes, image_size, mean, std, pixels, labels,
        mirror=not is_gray(train[0]), shuffle=True,
    )  # fmt: skip


def _checked(
    path: Path, x_name: str, y_name: str, images: np.ndarray, labels: np.ndarray
) -> Labelled:
    """Images as uint8 and labels as (N,) whole numbers, where they are of those.

    Raises:
      ValueError: they are not.
    """
    gray, colour = images.ndim == 3, images.ndim == 4 and images.shape[-1] in (1, 3)
    if not (gray or colour):
        raise ValueError(
            f"{path}: {x_name} has the shape {images.shape}; use (images, height, width), or the "
            "same with 1 or 3 channels last"
        )
    if not len(images):
        raise ValueError(f"{path}: {x_name} has no images; leave it out")
    if images.dtype != np.uint8:
        number = np.issubdtype(images.dtype, np.integer) or np.issubdtype(images.dtype, np.floating)
        low, high = (images.min(), images.max()) if number else (-1, -1)
        scale = 255 if np.issubdtype(images.dtype, np.floating) else 1
        if not (0 <= low <= high <= 255 // scale):  # NaN is in no range
            values = f", from {low:g} to {high:g}" if number else ""
            raise ValueError(
                f"{path}: {x_name} is {images.dtype}{values}; use uint8, or floats from 0 to 1"
            )
        images = np.rint(images * scale).astype(np.uint8)
    if labels.shape == (len(labels), 1):  # as Keras has those of CIFAR-10
        labels = labels[:, 0]
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: {y_name} has the shape {labels.shape} and {x_name} {len(images)} images; "
            "give a label for each"
        )
    whole = np.issubdtype(labels.dtype, np.integer)
    if not whole or labels.min() < 0:
        low = f", from {labels.min()}" if whole else ""
        raise ValueError(f"{path}: {y_name} is {labels.dtype}{low}; use whole numbers from 0")
    return images, labels


def _idx_pair(folder: Path, endings: tuple[str, ...]) -> tuple[Path, Path] | None:
    """The files of images and labels whose names begin with something that ends so."""
    found = {
        path.name.removesuffix(".gz").removesuffix(f"-{_IMAGES}"): path
        for path in sorted(folder.glob(f"*-{_IMAGES}*"), reverse=True)  # .gz is the second choice
        if path.name.removesuffix(".gz").endswith(f"-{_IMAGES}")
    }
    prefixes = sorted(prefix for prefix in found if prefix.endswith(endings))
    if not prefixes:
        return None
    if len(prefixes) > 1:
        raise ValueError(
            f"{folder} has several sets, {', '.join(prefixes)}; give a folder with one of them"
        )
    for suffix in ("", ".gz"):
        labels = folder / f"{prefixes[0]}-{_LABELS}{suffix}"
        if labels.exists():
            return found[prefixes[0]], labels
    raise FileNotFoundError(f"{folder} has no {prefixes[0]}-{_LABELS}(.gz), but images for it")


def _read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of unsigned bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    # Two zeros, the type, the number of dimensions; their lengths; the values.
    dims = 3 if _IMAGES in path.name else 1
    start = 4 + 4 * dims
    shape = tuple(map(int, np.frombuffer(data[4:start], ">u4"))) if len(data) >= start else None
    if data[:4] != bytes([0, 0, _UBYTE, dims]) or len(data) - start != math.prod(shape or (-1,)):
        raise ValueError(
            f"{path} is no IDX file of {dims} dimensions, or damaged: it has {len(data)} bytes"
            + (f" for the shape {shape}" if shape else "")
            + "; get it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
