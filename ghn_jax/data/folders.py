"""Images in folders: one folder for each class, of PNG or JPEG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ghn_jax.data.checks import own_size
from ghn_jax.data.records import from_records
from ghn_jax.data.splits import (
    Images,
    Record,
    check_classes,
    held_out,
    official_splits,
    part_by_class,
)

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_PARTS = ("train", "val", "validation", "test")


class _Files(Sequence[Record]):
    """Encoded images, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path], labels: np.ndarray):
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        return {"image": path.read_bytes(), "label": self.labels[index], "file": str(path)}

    def part(self, indices: np.ndarray) -> _Files:
        return _Files([self.paths[i] for i in indices.tolist()], self.labels[indices])


def load_folder(name: str, folder: Path, split: str, image_size: int | None) -> Images:
    """A split of a folder of images; see `ghn_jax.data.images.load_images`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the one with a folder for each class")
    # A class may be called 'train': a split has folders in it.
    whole = not _folders(folder / "train")
    parts = {"train": folder} if whole else {
        part: folder / part for part in _PARTS if _folders(folder / part)
    }  # fmt: skip
    classes = _folders(parts["train"])
    check_classes(name, len(classes), _elsewhere(parts["train"], classes))
    own = {
        split: _files(parts[part], classes) for split, part in official_splits(name, parts).items()
    }
    if image_size is None:
        image_size = own_size(name, _sizes(own.values()))
    held = held_out(own)

    def of(split: str) -> _Files:
        files = own.get(split, own["train"])
        return files.part(part_by_class(split, files.labels, held))

    return from_records(
        name, split, of(split), of("train"), num_classes=len(classes), image_size=image_size,
        class_names=tuple(classes),
    )  # fmt: skip


def _folders(folder: Path) -> list[str]:
    """Names of the folders in it, in order; hidden ones are not of the dataset."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _elsewhere(folder: Path, classes: Sequence[str]) -> str:
    """Where the folder of each class is, if that is a level above or below."""
    if below := [folder / name for name in classes if len(_folders(folder / name)) > 1]:
        return f"give {below[0]}, which has several folders in it"
    if not classes and any(p.suffix.lower() in _SUFFIXES for p in folder.iterdir()):
        return f"it has images in it: give the folder above, {folder.parent}"
    return ""


def _files(folder: Path, classes: Sequence[str]) -> _Files:
    """Images of the folder's class folders, in the order of the classes and of their names."""
    if unknown := set(_folders(folder)) - set(classes):
        raise ValueError(
            f"{folder} has the class {min(unknown)!r}, which the training images have not; use "
            "the same names"
        )
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise ValueError(
                f"{folder / name} has no {', '.join(sorted(_SUFFIXES))} files; put the images of "
                "the class there, or remove it"
            )
        paths += found
        labels += [label] * len(found)
    return _Files(paths, np.array(labels, np.int32))


def _sizes(parts: Iterable[_Files]) -> set[tuple[int, int]]:
    """(height, width) of the images, of which only headers are read, until two differ."""
    sizes = set()
    for path in (path for part in parts for path in part.paths):
        try:
            with Image.open(path) as image:
                sizes.add((image.height, image.width))
        except OSError as error:
            raise ValueError(f"{path} cannot be decoded: {error}; replace it") from error
        if len(sizes) > 1:
            break
    return sizes
