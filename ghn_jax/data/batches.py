"""Batches of images for training and evaluation.

Batch number i is a pure function of the images, the batch size, the seed and i: training resumed at
step i sees what it would have seen without the interruption.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ghn_jax.data.augment import central_view, crop_and_flip, normalise, random_view
from ghn_jax.data.checks import check_whole
from ghn_jax.data.splits import Images

Batch = tuple[np.ndarray, np.ndarray]

# First words of the seeds: no two random streams may begin alike.
_SHUFFLE, _AUGMENT, _EVALUATE = range(3)


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """Number of whole batches in the images; what remains is left out of an epoch.

    Raises:
      ValueError: batch_size is less than 1 or more than the number of images.
    """
    check_whole(f"batch_size for {images.name} {images.split}", batch_size, 1, len(images))
    return len(images) // batch_size


def train_batches(
    images: Images, batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """Shuffled, augmented batches without end.

    Every epoch has an order of its own, of which the incomplete last batch is left out. Images in
    memory are cropped at random after padding by an eighth of their size (CIFAR-10: 32 of 40
    pixels) and, with `images.mirror`, mirrored half of the time. Others: `augment.random_view`.

    Args:
      images: N images.
      batch_size: B, 1 to N.
      seed: 0 to 2**32 - 1; another seed gives another order and other augmentation.
      start_step: number of the first batch; the earlier ones are not computed.

    Yields:
      (B, S, S, 3) float32 normalised images and (B,) int32 labels.

    Raises:
      ValueError: batch_size, seed or start_step is out of range.
    """
    steps = steps_per_epoch(images, batch_size)
    check_whole("seed", seed, 0)
    check_whole("start_step", start_step, 0)
    return _train_batches(images, batch_size, steps, seed, start_step)


def _train_batches(
    images: Images, batch_size: int, steps: int, seed: int, start_step: int
) -> Iterator[Batch]:
    first = start_step % steps
    with ThreadPoolExecutor() as pool:  # its threads start when records come
        for epoch in itertools.count(start_step // steps):
            order = np.random.default_rng([_SHUFFLE, seed, epoch]).permutation(len(images))
            for batch in range(first, steps):
                indices = order[batch * batch_size : (batch + 1) * batch_size]
                rng = np.random.default_rng([_AUGMENT, seed, epoch * steps + batch])
                yield _train_batch(images, indices, rng, pool)
            first = 0


def _train_batch(
    images: Images, indices: np.ndarray, rng: np.random.Generator, pool: ThreadPoolExecutor
) -> Batch:
    if images.in_memory:
        pixels, labels = images.pixels[indices], images.labels[indices]
        pixels = crop_and_flip(pixels, rng, pad=images.image_size // 8, flip=images.mirror)
    else:
        # A generator for each image: the views do not depend on the order of the threads.
        pixels, labels = _photographs(images, indices, pool, random_view, rng.spawn(len(indices)))
    return normalise(pixels, images.mean, images.std), labels


def eval_batches(images: Images, batch_size: int) -> Iterator[Batch]:
    """Every image once, without augmentation; the last batch is smaller where B does not divide N.

    In order, or, with `images.shuffle`, in a fixed random order, as in the authors' code: networks
    with batch norm are evaluated on the statistics of the batch, which should have mixed classes.

    Args:
      images: N images.
      batch_size: B, 1 to N.

    Yields:
      (B, S, S, 3) float32 normalised images and (B,) int32 labels.

    Raises:
      ValueError: batch_size is out of range.
    """
    steps_per_epoch(images, batch_size)  # for its check
    return _eval_batches(images, batch_size)


def _eval_batches(images: Images, batch_size: int) -> Iterator[Batch]:
    order = np.arange(len(images))
    if images.shuffle:
        order = np.random.default_rng(_EVALUATE).permutation(order)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            if images.in_memory:
                pixels, labels = images.pixels[indices], images.labels[indices]
            else:
                pixels, labels = _photographs(images, indices, pool, central_view)
            yield normalise(pixels, images.mean, images.std), labels


def _photographs(
    images: Images,
    indices: np.ndarray,
    pool: ThreadPoolExecutor,
    make_view: Callable[..., np.ndarray],
    *more: Iterable[Any],
) -> Batch:
    """make_view(data, S, one of each of `more`) of each record: (B, S, S, 3) uint8, and labels."""

    def view(index: int, *more: Any) -> tuple[np.ndarray, int]:
        return images.view(index, make_view, images.image_size, *more)

    views, labels = zip(*pool.map(view, indices.tolist(), *more), strict=True)
    return np.stack(views), np.array(labels, np.int32)
