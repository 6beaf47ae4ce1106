"""Images from encoded records: small ones are decoded now, photographs batch by batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from ghn_jax.data.augment import central_view, decode, square
from ghn_jax.data.splits import Images, Record, check_some
from ghn_jax.data.statistics import channel_statistics, is_gray, sample
from ghn_jax.deepnets1m.task import LARGEST_SMALL

_CHUNK = 1000  # records that are read at once


def from_records(
    name: str,
    split: str,
    records: Sequence[Record],
    train: Sequence[Record],
    *,
    num_classes: int,
    image_size: int,
    class_names: tuple[str, ...],
) -> Images:
    """Images of a split, normalised by a sample of the training images.

    Args:
      name, split, num_classes, image_size, class_names: see `Images`.
      records: of the split.
      train: of the training split.
    """
    check_some(name, "train", len(train))
    check_some(name, split, len(records))
    encoded = Images(
        name, split, num_classes, image_size, (0.0,) * 3, (1.0,) * 3, records=records, shuffle=True,
        class_names=class_names,
    )  # fmt: skip
    small = image_size <= LARGEST_SMALL  # networks for larger ones have other stems, too
    some = fetch(train, sample(len(train)).tolist())
    some = dataclasses.replace(encoded, split="train", records=some)
    pixels, _ = decode_all(some, whole=small)
    mean, std = channel_statistics(pixels)
    encoded = dataclasses.replace(encoded, mean=mean, std=std)
    return in_memory(encoded, mirror=not is_gray(pixels)) if small else encoded


def in_memory(images: Images, *, mirror: bool = True) -> Images:
    """The same images, decoded."""
    pixels, labels = decode_all(images)
    return dataclasses.replace(images, pixels=pixels, labels=labels, records=None, mirror=mirror)


def decode_all(images: Images, *, whole: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S, 3) uint8 and (N,) int32 labels of images that are not in memory.

    Args:
      images: N images.
      whole: `augment.square`, without the border that `augment.central_view` cuts off.
    """
    size, count = images.image_size, len(images)
    make = _square_view if whole else central_view
    pixels = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int32)
    with (
        tqdm(total=count, desc=f"decoding {images.name} {images.split}", disable=None) as bar,
        ThreadPoolExecutor() as pool,
    ):
        # Small images in this thread: several would only wait for one another.
        run = map if whole else pool.map
        for start in range(0, count, _CHUNK):
            some = range(start, min(start + _CHUNK, count))
            views = run(lambda i, r: images.view(i, make, size, record=r), some,
                        fetch(images.records, some))  # fmt: skip
            for i, (view, label) in zip(some, views, strict=True):
                pixels[i], labels[i] = view, label
            bar.update(len(some))
    return pixels, labels


def fetch(records: Sequence[Record], indices: Sequence[int]) -> Sequence[Record]:
    """Some of the records, read at once where that is faster."""
    at_once = getattr(records, "__getitems__", None)
    return at_once(list(indices)) if at_once else [records[i] for i in indices]


def _square_view(data: bytes, size: int) -> np.ndarray:
    return np.asarray(square(decode(data), size))
