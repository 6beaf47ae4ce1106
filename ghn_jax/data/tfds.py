"""Datasets that TFDS has prepared, in the formats array_record and tfrecord, without TensorFlow."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghn_jax.data.checks import own_size
from ghn_jax.data.records import from_records, in_memory
from ghn_jax.data.splits import (
    Images,
    Record,
    check_classes,
    check_some,
    held_out,
    official_splits,
    part,
)
from ghn_jax.data.tfrecord import TFRecords

_FORMATS = ("array_record", "tfrecord")

# Mean and standard deviation of each channel, of values from 0 to 1, as in the authors' code.
_CIFAR10 = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_cifar10(split: str, image_size: int | None, data_dir: str | os.PathLike | None) -> Images:
    """CIFAR-10, of which the last images by their ids are held out."""
    prepared = Prepared("cifar10", data_dir)
    official = prepared.official(split, {"train": "train", "test": "test"})
    # In the order of the ids, for which all have to be read.
    total = prepared.count(official)
    records = prepared.records(official, slice(0, total), "image", "label", "id")
    records = sorted(records.__getitems__(range(total)), key=lambda record: record["id"])
    size = 32 if image_size is None else image_size
    label = prepared.features["label"]
    return in_memory(
        Images(
            "cifar10", split, label.num_classes, size, *_CIFAR10,
            records=records[part(split, total)], class_names=_names(label),
        )
    )  # fmt: skip


def load_imagenet(split: str, image_size: int | None, data_dir: str | os.PathLike | None) -> Images:
    """ImageNet, whose images are decoded batch by batch at any size."""
    prepared = Prepared("imagenet2012", data_dir)
    official = prepared.official(split, {"train": "train", "test": "validation"})
    wanted = part(split, prepared.count(official))
    records = prepared.records(official, wanted, "image", "label")
    size = 224 if image_size is None else image_size
    label = prepared.features["label"]
    return Images(
        "imagenet2012", split, label.num_classes, size, *_IMAGENET, records=records, shuffle=True,
        class_names=_names(label),
    )  # fmt: skip


def load_tfds(
    name: str, what: str, split: str, image_size: int | None, data_dir: str | os.PathLike | None
) -> Images:
    """Any dataset of labelled images; see `ghn_jax.data.images.load_images`."""
    prepared = Prepared(what, data_dir)
    image, label = prepared.keys()
    classes = prepared.features[label].num_classes
    check_classes(name, classes)
    if image_size is None:
        image_size = own_size(name, {prepared.features[image].shape[:2]})
    own = official_splits(name, prepared.splits)
    held = held_out(own)

    def of(split: str) -> Sequence[Record]:
        official = own.get(split, "train")
        wanted = part(split, prepared.count(official), held)
        check_some(name, split, wanted.stop - wanted.start)
        return prepared.records(official, wanted, image, label)

    train = of("train")
    records = train if split == "train" else of(split)
    return from_records(
        name, split, records, train, num_classes=classes, image_size=image_size,
        class_names=_names(prepared.features[label]),
    )  # fmt: skip


def _names(label) -> tuple[str, ...]:
    """Of the classes, where the dataset says them."""
    return tuple(label.names or ())


class _Records(Sequence[Record]):
    """Records of a tf.train.Example each, of which some features are read.

    Args:
      raw: the encoded examples.
      image, label, id: names of the features; without `id`, records have none.
    """

    def __init__(self, raw: Sequence[bytes], image: str, label: str, id: str | None = None):
        from tensorflow_datasets.proto import tf_example_pb2

        self._parse = tf_example_pb2.Example.FromString
        self._raw, self._image, self._label, self._id = raw, image, label, id

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, index):
        return self._read(self._raw[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several at once: of array_record, 5 times as fast as singly."""
        at_once = getattr(self._raw, "__getitems__", None)
        raw = at_once(list(indices)) if at_once else [self._raw[i] for i in indices]
        return [self._read(data) for data in raw]

    def _read(self, data: bytes) -> Record:
        features = self._parse(data).features.feature
        record = {
            "image": features[self._image].bytes_list.value[0],
            "label": features[self._label].int64_list.value[0],
        }
        if self._id is not None:
            record["id"] = features[self._id].bytes_list.value[0]
        return record


class Prepared:
    """A dataset in a folder that TFDS has prepared.

    Args:
      what: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.
      data_dir: folder of such datasets; see `load_images`.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it has several configurations, or its format is none of those above.
    """

    def __init__(self, what: str, data_dir: str | os.PathLike | None):
        self.folder = _folder(what, data_dir)
        tfds = _import_tfds()
        # By folder: asked for a name, TFDS only finds the version that it would prepare itself.
        self._builder = tfds.builder_from_directory(self.folder)
        self._tfds, self._what = tfds, what
        info = self._builder.info
        self.features, self.splits = dict(info.features or {}), info.splits
        self._format = info.file_format.value
        if self._format not in _FORMATS:
            raise ValueError(
                f"{self.folder} has files of the format {self._format!r}; use 'array_record' or "
                f"'tfrecord': prepare them again with {_command(what)}"
            )

    def official(self, split: str, known: dict[str, str]) -> str:
        """The official split that a split is read from; `known` are those of a known dataset."""
        official = known.get(split, "train")
        if official not in self.splits:
            raise FileNotFoundError(
                f"{self.folder} has no split {official!r}, which {split!r} is read from; use one "
                f"with it, prepared by {_command(self._what)}"
            )
        return official

    def count(self, official: str) -> int:
        """Number of images of an official split."""
        return self.splits[official].num_examples

    def keys(self) -> tuple[str, str]:
        """Names of the features that are the image and the label.

        Raises:
          ValueError: the dataset is not one of labelled images.
        """
        ClassLabel, Image = self._tfds.features.ClassLabel, self._tfds.features.Image

        def is_a(key: Any, kind: type) -> bool:
            return isinstance(key, str) and isinstance(self.features.get(key), kind)

        keys = self._builder.info.supervised_keys or ()
        if len(keys) == 2 and is_a(keys[0], Image) and is_a(keys[1], ClassLabel):
            image, label = keys
        else:
            images = [key for key in self.features if is_a(key, Image)]
            labels = [key for key in self.features if is_a(key, ClassLabel)]
            if len(images) != 1 or len(labels) != 1:
                have = ", ".join(
                    f"{k} ({type(f).__name__})" for k, f in sorted(self.features.items())
                )
                raise ValueError(
                    f"{self.folder} has the features {have}; a dataset with one Image and one "
                    "ClassLabel is needed"
                )
            (image,), (label,) = images, labels
        dtype = self.features[image].np_dtype
        if dtype != "uint8":
            raise ValueError(f"{self.folder} has images of {dtype}; images of uint8 are needed")
        return image, label

    def records(self, official: str, wanted: slice, *keys: str) -> _Records:
        """Records of a part of an official split.

        Args:
          official: its name.
          wanted: the part.
          keys: features that are the image, the label and maybe the id.

        Raises:
          FileNotFoundError: a file of the part is missing.
        """
        some = f"{official}[{wanted.start}:{wanted.stop}]"
        files = self.splits[some].file_instructions
        for file in files:
            if not Path(file.filename).exists():
                raise FileNotFoundError(
                    f"{file.filename} is missing; get it, or prepare the dataset again with "
                    f"{_command(self._what)}"
                )
        if self._format == "tfrecord":
            raw = TFRecords((f.filename, f.skip, f.take, f.examples_in_shard) for f in files)
        else:
            method = self._tfds.decode.DeserializeMethod.RAW_BYTES
            raw = self._builder.as_data_source(some, deserialize_method=method)
        return _Records(raw, *keys)


def _import_tfds():
    """TFDS: slow to import, and not needed for digits.

    Raises:
      ImportError: a package that it needs is not installed, on which TFDS itself is silent.
    """
    import tensorflow_datasets as tfds

    if not hasattr(tfds, "builder_from_directory"):
        try:
            from tensorflow_datasets import public_api  # noqa: F401
        except ImportError as error:
            missing = error.name or str(error)
            raise ImportError(
                f"tensorflow_datasets needs {missing}, which is not installed; install it with "
                f"`pip install {missing}`, or all that it needs with `pip install 'ghn_jax[train]'`"
            ) from error
    return tfds


def _folder(what: str, data_dir: str | os.PathLike | None) -> Path:
    """The folder of a dataset's version: the one asked for, or the last one."""
    name, _, version = what.partition(":")
    if not name or name.startswith("/"):
        raise ValueError(
            f"tfds:{what} has no name; use tfds:NAME, and give the folder that it is in as data_dir"
        )
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = Path(data_dir).expanduser().resolve()
    found = (info.parent for info in folder.glob(f"{name}/*/dataset_info.json"))
    versions = sorted(found, key=_numbers)
    chosen = [path for path in versions if version in ("", path.name)]
    if chosen:
        return chosen[-1]
    if versions:
        raise FileNotFoundError(
            f"{folder / name} has no version {version!r}; use one of "
            f"{', '.join(path.name for path in versions)}"
        )
    if configs := sorted({i.parts[-3] for i in folder.glob(f"{name}/*/*/dataset_info.json")}):
        raise ValueError(
            f"{folder / name} has the configurations {', '.join(configs)}; give one, as "
            f"tfds:{name}/{configs[0]}"
        )
    for above in folder.parents[:3]:  # in a version, a configuration or the dataset
        if any(any(above.glob(f"{name}/{deeper}dataset_info.json")) for deeper in ("*/", "*/*/")):
            raise FileNotFoundError(
                f"data_dir is {str(folder)!r}, which is inside of a dataset; give the folder that "
                f"{name} is in: data_dir={str(above)!r}"
            )
    for below in sorted(folder.glob(f"*/{name}/*/dataset_info.json"))[:1]:
        raise FileNotFoundError(
            f"data_dir is {str(folder)!r}, which {name} is deeper in; give the folder that {name} "
            f"is in: data_dir={str(below.parents[2])!r}"
        )
    missing = "does not exist" if not folder.is_dir() else f"has no prepared {name}"
    raise FileNotFoundError(
        f"data_dir is {str(folder)!r}, which {missing}; expected {folder / name}/<version> with "
        f"dataset_info.json and array_record or tfrecord files: pass another data_dir (or set "
        f"TFDS_DATA_DIR), or make them once, where TensorFlow is installed, with "
        f"{_command(what, folder)}"
    )


def _numbers(folder: Path) -> tuple[list[int], str]:
    """What versions are ordered by: 10.0.0 comes after 3.0.2."""
    return [int(number) for number in re.findall(r"\d+", folder.name)], folder.name


def _command(what: str, folder: Path | None = None) -> str:
    """What prepares a dataset."""
    where = f" --data_dir={folder}" if folder else ""
    return f"`tfds build {what} --file_format=array_record{where}`"
