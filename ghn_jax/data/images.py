"""Images to train and evaluate target networks on (paper § 5): digits, CIFAR-10, ImageNet.

    images = load_images("cifar10", "train")
    for x, y in prefetch(train_batches(images, 64, seed=0)):  # without end
        ...  # x (64, 32, 32, 3) float32, normalised; y (64,) int32

`digits` comes with scikit-learn. `cifar10` and `imagenet2012` are read, without TensorFlow, from
files that TFDS has prepared in its array_record format, in `<data_dir>/<name>/<version>`.

Batch number i is a pure function of the images, the batch size, the seed and i: training resumed at
step i sees what it would have seen without the interruption.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from ghn_jax.data.augment import central_view, crop_and_flip, decode, normalise, random_view, resize
from ghn_jax.deepnets1m.task import Task

T = TypeVar("T")
Batch = tuple[np.ndarray, np.ndarray]

SPLITS = ("train", "val", "test")

# Height of the images that networks get, in pixels.
_IMAGE_SIZES = {"digits": 16, "cifar10": 32, "imagenet2012": 224}
_MIN_IMAGE_SIZE = 8

# The paper holds out 5,000 training images of CIFAR-10's 50,000, and 50,000 of ImageNet's
# 1,281,167: a tenth, but at most this many.
_MAX_HELD_OUT = 50_000

# What TFDS calls the images that `test` means.
_TFDS_TEST = {"cifar10": "test", "imagenet2012": "validation"}

# Mean and standard deviation of each channel, of values from 0 to 1, as in the authors' code.
_STATISTICS = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# The digits file runs form by form; on each, one person began with 0 to 9 three times. Splits end
# where forms do, so that `val` and `test` have writers whom `train` has not: about 9, 2 and 3 forms
# for 64, 14 and 21 % of the images.
_DIGITS_PARTS = {"train": slice(0, 1157), "val": slice(1157, 1415), "test": slice(1415, 1797)}

# First words of the seeds: no two random streams may begin alike.
_SHUFFLE, _AUGMENT, _EVALUATE = range(3)
_MAX_WORD = 2**32 - 1  # larger numbers would spill into the next word


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """N labelled images of one split.

    `images[i]` is image i as it is stored, (height, width, 3) uint8, and its label; for ImageNet it
    is read and decoded now, and has a size of its own.

    Attributes:
      name: 'digits', 'cifar10' or 'imagenet2012'.
      split: 'train', 'val' or 'test'.
      num_classes: number of classes; labels are 0 to num_classes - 1.
      image_size: S, height and width in pixels of the images in batches.
      mean, std: of each colour channel, for values from 0 to 1; batches are normalised with them.
      pixels: (N, S, S, 3) uint8, or None for ImageNet.
      labels: (N,) int32, or None for ImageNet, where labels are only known once records are read.
      records: ImageNet's encoded images: N mappings with the keys 'image' (bytes) and 'label'.
    """

    name: str
    split: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    labels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    records: Sequence[dict[str, Any]] | None = dataclasses.field(default=None, repr=False)

    @property
    def task(self) -> Task:
        """What networks for these images do."""
        return Task(self.num_classes, self.image_size)

    def __len__(self) -> int:
        return len(self.records if self.pixels is None else self.pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = range(len(self))[index]
        if self.pixels is None:
            record = self.records[index]
            return np.asarray(decode(record["image"])), int(record["label"])
        return self.pixels[index], int(self.labels[index])


def load_images(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
) -> Images:
    """Opens a split of a dataset. No image of `train` is in `val` or `test`.

    digits: scikit-learn's 1,797 gray 8x8 images, enlarged (bilinear), gray in all three channels.
      1,157 for training, 258 and 382 by other writers for validation and test.
    cifar10: `test` is the official one. `val` is the last 10 % of the training images in the order
      of their ids: 5,000, the authors' own in the dataset that TFDS prepares (ids count through the
      original files there). All are decoded now, which takes some seconds.
    imagenet2012: `test` is the official validation split. `val` is the last 10 %, but at most
      50,000, of the training images in the order of the files, which TFDS has shuffled: of the
      1,281,167 images 50,000, about 50 of each class. (The authors take exactly 50 of each class,
      but to know the classes all 140 GB would have to be read.) Images are decoded batch by batch.

    Args:
      name: 'digits', 'cifar10' or 'imagenet2012'.
      split: 'train', 'val' or 'test'.
      data_dir: folder of the datasets that TFDS has prepared; without it the environment variable
        TFDS_DATA_DIR, else ~/tensorflow_datasets. Not used for digits.
      image_size: height and width in pixels of the images in batches; without it 16, 32 and 224.

    Raises:
      ValueError: unknown name or split, image_size below 8, or files that are not array_record.
      FileNotFoundError: the dataset, or the split, is not in data_dir.
    """
    _check_choice("dataset", name, tuple(_IMAGE_SIZES))
    _check_choice("split", split, SPLITS)
    size = _IMAGE_SIZES[name] if image_size is None else image_size
    _check_whole("image_size", size, _MIN_IMAGE_SIZE)
    if name == "digits":
        return _load_digits(split, size)
    return _load_tfds(name, split, size, _tfds_folder(name, data_dir))


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """Number of whole batches in the images; what remains is left out of an epoch.

    Raises:
      ValueError: batch_size is less than 1 or more than the number of images.
    """
    _check_whole(f"batch_size for {images.name} {images.split}", batch_size, 1, len(images))
    return len(images) // batch_size


def train_batches(
    images: Images, batch_size: int, *, seed: int, start_step: int = 0
) -> Iterator[Batch]:
    """Shuffled, augmented batches without end.

    Every epoch has an order of its own, of which the incomplete last batch is left out. Images of
    digits and CIFAR-10 are cropped at random after padding by an eighth of their size (CIFAR-10: 32
    of 40 pixels); CIFAR-10's are mirrored half of the time. ImageNet: `augment.random_view`.

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
    _check_whole("seed", seed, 0)
    _check_whole("start_step", start_step, 0)
    return _train_batches(images, batch_size, steps, seed, start_step)


def _train_batches(
    images: Images, batch_size: int, steps: int, seed: int, start_step: int
) -> Iterator[Batch]:
    first = start_step % steps
    with ThreadPoolExecutor() as pool:  # its threads start when ImageNet's records come
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
    if images.pixels is None:
        # A generator for each image: the views do not depend on the order of the threads.
        pixels, labels = _photographs(images, indices, pool, random_view, rng.spawn(len(indices)))
    else:
        mirror = images.name != "digits"  # most mirrored digits are no digits
        pixels = images.pixels[indices]
        pixels = crop_and_flip(pixels, rng, pad=images.image_size // 8, flip=mirror)
        labels = images.labels[indices]
    return normalise(pixels, images.mean, images.std), labels


def eval_batches(images: Images, batch_size: int) -> Iterator[Batch]:
    """Every image once, without augmentation; the last batch is smaller where B does not divide N.

    In order, but for ImageNet in a fixed random order, as in the authors' code: networks with batch
    norm are evaluated on the statistics of the batch, which should have mixed classes.

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
    if images.pixels is None:
        order = np.random.default_rng(_EVALUATE).permutation(order)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            if images.pixels is None:
                pixels, labels = _photographs(images, indices, pool, central_view)
            else:
                pixels, labels = images.pixels[indices], images.labels[indices]
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
        record = images.records[index]
        return make_view(record["image"], images.image_size, *more), record["label"]

    views, labels = zip(*pool.map(view, indices.tolist(), *more), strict=True)
    return np.stack(views), np.array(labels, np.int32)


def prefetch(iterator: Iterable[T], size: int = 2) -> Iterator[T]:
    """The same items, computed in a thread of their own, ahead of their use.

    The thread starts with the first item asked for. It ends with the items, or, after the item it
    works on, when the result is closed or no longer referenced. What the iterator raises is raised
    here, after the items before it.

    Args:
      iterator: used by the thread only; do not use it elsewhere.
      size: most items that wait to be used, at least 1.

    Raises:
      ValueError: size is less than 1.
    """
    _check_whole("size", size, 1)
    return _prefetch(iter(iterator), size)


def _prefetch(iterator: Iterator[T], size: int) -> Iterator[T]:
    ready: queue.SimpleQueue = queue.SimpleQueue()
    free = threading.Semaphore(size)
    stop = threading.Event()
    # The thread has no reference to this generator, which so can be collected while it waits. A
    # daemon does not keep the program from ending.
    threading.Thread(target=_fill, args=(iterator, ready, free, stop), daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item
    finally:
        stop.set()
        free.release()  # the thread may be waiting for a place


def _fill(
    iterator: Iterator[T],
    ready: queue.SimpleQueue,
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Puts (item, None) for each item into the queue, at last (None, what ended the iterator)."""
    while True:
        free.acquire()
        if stop.is_set():
            return
        try:
            item = next(iterator)
        except BaseException as error:  # noqa: BLE001 - the consumer would wait for ever
            ready.put((None, error))
            return
        ready.put((item, None))


def _load_digits(split: str, size: int) -> Images:
    from sklearn.datasets import load_digits  # slow to import, and not needed for photographs

    digits = load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    large = np.stack([np.asarray(resize(Image.fromarray(image), size, size)) for image in gray])
    pixels = np.repeat(large[..., None], 3, axis=3)
    train = large[_DIGITS_PARTS["train"]] / 255
    part = _DIGITS_PARTS[split]
    return Images(
        name="digits",
        split=split,
        num_classes=10,
        image_size=size,
        mean=(float(train.mean()),) * 3,
        std=(float(train.std()),) * 3,
        pixels=pixels[part],
        labels=digits.target[part].astype(np.int32),
    )


def _tfds_folder(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The folder of the dataset's last version, by name."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = Path(data_dir).expanduser()
    versions = sorted(info.parent for info in folder.glob(f"{name}/*/dataset_info.json"))
    if not versions:
        missing = "does not exist" if not folder.is_dir() else f"has no prepared {name}"
        raise FileNotFoundError(
            f"data_dir is {str(folder)!r}, which {missing}; expected {folder / name}/<version> "
            f"with dataset_info.json and array_record files: pass another data_dir (or set "
            f"TFDS_DATA_DIR), or make them once, where TensorFlow is installed, with "
            f"`tfds build {name} --file_format=array_record --data_dir={folder}`"
        )
    return versions[-1]


def _load_tfds(name: str, split: str, size: int, folder: Path) -> Images:
    import tensorflow_datasets as tfds  # slow to import, and not needed for digits

    # By folder: asked for a name, TFDS only finds the version that it would prepare itself.
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"{folder} has files of the format {builder.info.file_format.value!r}; use "
            f"'array_record', which gives access to single images: prepare them again with "
            f"`tfds build {name} --file_format=array_record`"
        )
    official = _TFDS_TEST[name] if split == "test" else "train"
    if official not in builder.info.splits:
        raise FileNotFoundError(
            f"{folder} has no split {official!r}, which {split!r} is read from; use one with it, "
            f"prepared by `tfds build {name} --file_format=array_record`"
        )
    total = builder.info.splits[official].num_examples
    part = _part(split, total)
    # CIFAR-10 is put into the order of its ids, for which all of it has to be read.
    wanted = part if name == "imagenet2012" else slice(0, total)
    source = builder.as_data_source(
        split=f"{official}[{wanted.start}:{wanted.stop}]",
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    mean, std = _STATISTICS[name]
    num_classes = builder.info.features["label"].num_classes
    images = Images(name, split, num_classes, size, mean, std, records=source)
    return images if name == "imagenet2012" else _decode_all(images, part)


def _part(split: str, total: int) -> slice:
    """Which of the images of the official training split (`test`: test split) are in the split."""
    kept = total - min(total // 10, _MAX_HELD_OUT)
    return {"train": slice(0, kept), "val": slice(kept, total), "test": slice(0, total)}[split]


def _decode_all(images: Images, part: slice) -> Images:
    """Part of the records in the order of their ids, decoded into memory."""
    records = images.records.__getitems__(list(range(len(images))))  # 5 times as fast as singly
    records = sorted(records, key=lambda record: record["id"])[part]
    size = images.image_size
    pixels = np.empty((len(records), size, size, 3), np.uint8)
    progress = tqdm(records, f"decoding {images.name} {images.split}", disable=None)
    # In one thread: with images so small, several only wait for one another.
    for row, record in zip(pixels, progress, strict=True):
        row[:] = np.asarray(resize(decode(record["image"]), size, size))
    labels = np.array([record["label"] for record in records], np.int32)
    return dataclasses.replace(images, pixels=pixels, labels=labels, records=None)


def _check_choice(what: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ValueError(f"unknown {what} {given!r}; use one of {', '.join(map(repr, allowed))}")


def _check_whole(what: str, given: int, least: int, most: int = _MAX_WORD) -> None:
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    if not (whole and least <= given <= most):
        raise ValueError(f"{what} is {given!r}; use a whole number from {least} to {most}")
