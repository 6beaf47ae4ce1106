"""A split of a dataset: its images, and which of the dataset's own images they are.

Where a dataset has no images of its own for validation or for tests, the last tenth of its training
images is held out, and the tenth before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ghn_jax.data.augment import decode
from ghn_jax.deepnets1m.task import Task

SPLITS = ("train", "val", "test")

# The paper holds out 5,000 training images of CIFAR-10's 50,000, and 50,000 of ImageNet's
# 1,281,167: a tenth, but at most this many.
MAX_HELD_OUT = 50_000

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """N labelled images of one split.

    `images[i]` is image i as it is stored, (height, width, 3) uint8, and its label; where images
    are not in memory, it is read and decoded now, and has a size of its own.

    Attributes:
      name: of the dataset, as `load_images` takes it.
      split: 'train', 'val' or 'test'.
      num_classes: number of classes; labels are 0 to num_classes - 1.
      image_size: S, height and width in pixels of the images in batches.
      mean, std: of each colour channel, for values from 0 to 1; batches are normalised with them.
      pixels: (N, S, S, 3) uint8, or None where images are decoded batch by batch.
      labels: (N,) int32, or None where `pixels` is: they are known once records are read.
      records: in place of both, N mappings with the keys 'image' (an encoded image) and 'label',
        and, where each has a file of its own, 'file'.
      mirror: whether images in memory are mirrored in training; most mirrored digits are no digits.
      shuffle: whether evaluation takes them in a fixed random order, because they may be stored
        class by class.
      class_names: of the classes in their order; empty where they have none.
    """

    name: str
    split: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    labels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    records: Sequence[Record] | None = dataclasses.field(default=None, repr=False)
    mirror: bool = True
    shuffle: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """What networks for these images do."""
        return Task(self.num_classes, self.image_size)

    def class_name(self, label: int) -> str:
        """What a class is called: its number where it has no name."""
        return self.class_names[label] if self.class_names else str(label)

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded already."""
        return self.pixels is not None

    def __len__(self) -> int:
        return len(self.pixels if self.in_memory else self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = range(len(self))[index]
        if self.in_memory:
            return self.pixels[index], int(self.labels[index])
        return self.view(index, lambda data: np.asarray(decode(data)))

    def view(
        self,
        index: int,
        make: Callable[..., np.ndarray],
        *arguments: Any,
        record: Record | None = None,
    ) -> tuple[np.ndarray, int]:
        """make(data, *arguments) of an image that is not in memory, and its label.

        Args:
          index: of the image.
          make: takes the encoded image and the arguments.
          arguments: more of them.
          record: the image's, where it has been read already.

        Raises:
          ValueError: the image cannot be decoded, or the label is none of a class.
        """
        record = self.records[index] if record is None else record
        label = int(record["label"])
        which = record.get("file", f"image {index} of {self.name} {self.split}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{which} has the label {label}; use 0 to {self.num_classes - 1}")
        try:
            return make(record["image"], *arguments), label
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises any of them
            raise ValueError(f"{which} cannot be decoded: {error}; replace it") from error


def official_splits(name: str, names: Collection[str]) -> dict[str, str]:
    """Which of a dataset's own splits `train`, `val` and `test` are, as far as it has them.

    A split for validation alone is `test`, as in ImageNet, whose test labels are not public.

    Raises:
      ValueError: there is no split 'train'.
    """
    if "train" not in names:
        raise ValueError(
            f"{name} has the splits {', '.join(map(repr, sorted(names))) or '(none)'}; one is "
            "needed that is called 'train'"
        )
    found = {"train": "train"}
    validation = next((name for name in ("validation", "val") if name in names), None)
    if "test" in names:
        found["test"] = "test"
    if validation is not None:
        found["val" if "test" in names else "test"] = validation
    return found


def held_out(own: Collection[str]) -> tuple[str, ...]:
    """The splits that are held out of the training images of a dataset which has `own` ones."""
    return tuple(split for split in ("test", "val") if split not in own)


def part(split: str, total: int, held: Sequence[str] = ("val",), most: int = MAX_HELD_OUT) -> slice:
    """Which of the images of the official split that it is read from are in the split.

    Args:
      split: 'train', 'val' or 'test'.
      total: number of images of the official split.
      held: the splits that are held out of the training images, a tenth each, the last one last.
      most: most images to hold out for each.
    """
    tenth = min(total // 10, most)
    kept = total - tenth * len(held)
    if split in held:
        start = kept + held.index(split) * tenth
        return slice(start, start + tenth)
    return slice(0, kept if split == "train" else total)


def part_by_class(split: str, labels: np.ndarray, held: Sequence[str]) -> np.ndarray:
    """The same for every class by itself: indices of the split's images, in order.

    Images may be stored class by class, where the last tenth would be of a few classes.
    """
    classes = np.unique(labels)
    most = MAX_HELD_OUT // len(classes)
    indices = [np.flatnonzero(labels == c) for c in classes]
    chosen = np.concatenate([of[part(split, len(of), held, most)] for of in indices])
    return np.sort(chosen)


def check_some(name: str, split: str, count: int) -> None:
    """Raises ValueError where a split has no images."""
    if count == 0:
        raise ValueError(
            f"{name} has too few images to hold out a tenth of them for {split!r}; give it at "
            f"least 10 (of every class), or a {split!r} split of its own"
        )


def check_classes(name: str, count: int, hint: str = "") -> None:
    """Raises ValueError where there is nothing to classify, with a hint where they may be."""
    if count < 2:
        plural = "" if count == 1 else "es"
        raise ValueError(f"{name} has {count} class{plural}; {hint or 'use 2 or more'}")
