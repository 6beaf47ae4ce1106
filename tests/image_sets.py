"""Small datasets of every kind, whose images say which they are."""

import gzip
import struct
from pathlib import Path

import numpy as np
from tfds_files import (
    TEXT,
    WRITERS,
    encode,
    image_feature,
    label_feature,
    write_tfds,
)

KINDS = ("array_record", "tfrecord", "folder", "folder without parts", "npz", "npz of all", "idx")
TRAIN, TEST, CLASSES, SIZE = 60, 9, 3, 12


def tagged(index: int, *, size=(SIZE, SIZE), gray: bool = False) -> np.ndarray:
    """An image that says which it is: its mean is 3 * index + 1 in the first channel."""
    base = np.full((*size, 3), 3 * index + 1, np.uint8)
    if not gray:
        base[..., 1] = 200
        base[: size[0] // 2, :, 2] = 90
    return base


def label(index: int) -> int:
    return index * CLASSES // TRAIN if index < TRAIN else index % CLASSES  # class by class


def index_of(image: np.ndarray) -> int:
    return round((float(image[..., 0].mean()) - 1) / 3)


def write(folder: Path, kind: str, **options) -> tuple[str, dict]:
    """A dataset of 60 training and 9 test images; its name and what else `load_images` takes."""
    gray = options.get("gray", False)
    everything = range(TRAIN + TEST)
    pixels = np.stack([tagged(i, **options) for i in everything])
    labels = np.array([label(i) for i in everything])
    parts = {"train": slice(0, TRAIN), "test": slice(TRAIN, None)}
    if kind in WRITERS:
        mode, channels = ("L", 1) if gray else ("RGB", 3)
        rows = [
            {"image": encode(pixels[i], "PNG", mode), "label": label(i), "id": b"%d" % i}
            for i in everything
        ]
        height, width = pixels.shape[1:3]
        features = {
            "image": image_feature(height, width, channels),
            "label": label_feature(CLASSES),
            "id": TEXT,
        }
        shards = {"train": [rows[:25], rows[25:TRAIN]], "test": [rows[TRAIN:]]}
        write_tfds(folder, "own", "1.0.0", shards, file_format=kind, features=features)
        return "tfds:own", {"data_dir": folder}
    if kind.startswith("folder"):
        for i in everything:
            part = "" if "without" in kind else "train" if i < TRAIN else "test"
            path = folder / part / "abc"[label(i)] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(pixels[i], "PNG", "L" if gray else "RGB"))
        return f"folder:{folder}", {}
    if gray or kind == "idx":
        pixels = pixels[..., 0]
    if kind == "idx":
        for part, name in (("train", "train"), ("test", "t10k")):
            write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels[parts[part]])
            write_idx(folder / f"{name}-labels-idx1-ubyte", labels[parts[part]])
        return f"idx:{folder}", {}
    path = folder / "own.npz"
    if kind == "npz of all":
        np.savez(path, images=pixels, labels=labels)
    else:
        np.savez_compressed(
            path, x_train=pixels[:TRAIN], y_train=labels[:TRAIN, None],
            x_test=pixels[TRAIN:], y_test=labels[TRAIN:, None],
        )  # fmt: skip
    return f"npz:{path}", {}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
