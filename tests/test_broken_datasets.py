"""Datasets that do not fit, are damaged or not there: an error that says what to do."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from image_sets import SIZE, tagged, write
from PIL import Image
from tfds_files import (
    encode,
)

from ghn_jax.data.images import SPLITS, load_images


def save(**arrays):
    """A .npz of 20 good images, but for what is given; None leaves an array out."""
    good = {"x_train": np.zeros((20, 8, 8), np.uint8), "y_train": np.arange(20) % 2}
    arrays = {key: value for key, value in {**good, **arrays}.items() if value is not None}
    return lambda path: np.savez(path, **arrays)


def write_npy(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (save(x_train=np.full((20, 8, 8), 2.0)), "x_train is float64, from 2 to 2; use uint8, or"),
        (save(x_train=np.full((20, 8, 8), np.nan)), "x_train is float64, from nan to nan; use"),
        (save(x_train=np.full((20, 8, 8), 256)), "x_train is int64, from 256 to 256; use uint8"),
        (save(x_train=np.zeros((20, 8, 8), bool)), "x_train is bool; use uint8, or floats"),
        (save(x_train=np.zeros((20, 3, 8, 8), np.uint8)), r"shape \(20, 3, 8, 8\); use \(images"),
        (save(x_train=np.zeros((20, 64), np.uint8)), r"x_train has the shape \(20, 64\); use"),
        (save(x_train=np.zeros((20, 4, 4), np.uint8)), "4x4 pixels; give the size that networks"),
        (save(y_train=np.arange(19)), r"y_train has the shape \(19,\) and x_train 20 images; give"),
        (save(y_train=np.eye(20)), r"y_train has the shape \(20, 20\) and x_train 20 images"),
        (save(y_train=np.arange(20) / 2), "y_train is float64; use whole numbers from 0"),
        (save(y_train=np.array(["cat"] * 20)), "y_train is <U3; use whole numbers from 0"),
        (save(y_train=np.arange(20) - 1), "y_train is int64, from -1; use whole numbers from 0"),
        (save(y_train=np.arange(20) * 50), "labels up to 950 for 20 images; number the classes"),
        (save(y_train=np.zeros(20, int)), "has 1 class; use 2 or more"),
        (save(y_train=None), "has the arrays x_train; use x_train and y_train, with"),
        (save(x_train=None, y_train=None, a=np.zeros(1)), "has the arrays a; use x_train and y_tr"),
        (save(x_test=np.zeros((9, 8, 8), np.uint8)), "the arrays x_train, y_train, x_test; use"),
        (
            save(x_test=np.zeros((1, 8, 8), np.uint8), y_test=np.array([5])),
            "has test images of class 5, but no training images; use 0 to 1",
        ),
        (
            save(x_test=np.zeros((0, 8, 8), np.uint8), y_test=np.zeros(0, int)),
            "x_test has no images; leave it out",
        ),
        (
            save(x_train=np.zeros((4, 8, 8), np.uint8), y_train=np.arange(4) % 2),
            "has too few images to hold out a tenth of them for 'val'; give it at least 10",
        ),
        (lambda path: path.write_bytes(b"no zip"), "is not a .npz file of plain arrays"),
        (lambda path: write_npy(path, np.zeros(3)), "is not a .npz file of plain arrays"),
        (lambda path: path.write_bytes(b""), "is not a .npz file of plain arrays"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no zip"), "is not a .npz file of plain"),
    ],
)  # fmt: skip
def test_npz_files_that_do_not_fit(tmp_path, write, message):
    path = tmp_path / "own.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        load_images(f"npz:{path}", "val")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "npy", "npz"])
def test_nothing_is_unpickled(tmp_path, kind):
    gone, path = tmp_path / "gone", tmp_path / "own.npz"
    bombs = np.array([Bomb(gone)] * 20, object)
    with path.open("wb") as file:
        if kind == "pickle":
            pickle.dump(Bomb(gone), file)
        elif kind == "npy":
            np.save(file, bombs)
        else:
            np.savez(file, x_train=bombs, y_train=np.arange(20) % 2)
    with pytest.raises(ValueError, match="is not a .npz file of plain arrays"):
        load_images(f"npz:{path}", "train")
    assert not gone.exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_other_numbers_are_taken_where_they_mean_the_same(tmp_path, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    other = pixels.astype(dtype) / (255 if dtype != np.int64 else 1)
    np.savez(tmp_path / "x.npz", images=other.astype(dtype), labels=np.arange(20) % 2)
    images = load_images(f"npz:{tmp_path / 'x.npz'}", "train")
    np.testing.assert_array_equal(images.pixels[..., :1], pixels[:16])


def change_idx(name: str, change):
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


IDX_IMAGES, IDX_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_idx(IDX_IMAGES, lambda data: data[:-9]), f"{IDX_IMAGES} is damaged .*; get it"),
        (change_idx(IDX_IMAGES, lambda _: b"no gzip"), f"{IDX_IMAGES} is damaged .*; get it"),
        (change_idx(IDX_LABELS, lambda data: data[:-1]), "or damaged: it has 67 bytes for the"),
        (change_idx(IDX_LABELS, lambda data: data[:3]), "1 dimensions, or damaged: it has 3 byte"),
        (change_idx(IDX_LABELS, lambda data: b"\0\0\x0d\1" + data[4:]), "is no IDX file of 1 dim"),
        (lambda folder: (folder / IDX_LABELS).unlink(), r"no train-labels-idx1-ubyte\(.gz\), but"),
        (lambda folder: (folder / IDX_IMAGES).unlink(), "no train-images-idx3-ubyte or train-i"),
        (
            lambda folder: (folder / f"emnist-letters-{IDX_IMAGES}").touch(),
            "several sets, emnist-letters-train, train; give a folder with one of them",
        ),
    ],
)  # fmt: skip
def test_idx_files_that_do_not_fit(tmp_path, damage, message):
    name, _ = write(tmp_path, "idx")
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_images(name, "test")
    assert "\n" not in str(error.value)


def test_an_idx_folder_without_test_images(tmp_path):
    name, _ = write(tmp_path, "idx")
    for path in tmp_path.glob("t10k*"):
        path.unlink()
    assert [len(load_images(name, split)) for split in SPLITS] == [48, 6, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "train/a/000.png").write_bytes(b"no image"), "train/a/000.png cannot be "),
        (lambda f: (f / "test/d").mkdir(), "test has the class 'd', which the training images"),
        (lambda f: (f / "train/d").mkdir(), r"train/d has no .jpeg, .jpg, .png files; put the"),
        (
            lambda f: (f / "train/a/000.png").write_bytes(
                encode(np.zeros((SIZE, SIZE), np.uint16), "PNG", "I;16")
            ),
            "train/a/000.png cannot be decoded: it has the mode 'I;16', of more than 8 bits",
        ),
        (
            lambda f: (f / "train/a/000.png").write_bytes(encode(tagged(0), "PNG")[:50]),
            "train/a/000.png cannot be decoded",
        ),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit(tmp_path, change, message):
    name, _ = write(tmp_path, "folder")
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_images(name, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("folder:{}/none", FileNotFoundError, "/none is no folder; give the one with a folder for"),
        ("folder:{}", ValueError, "has 0 classes; use 2 or more"),
        ("idx:{}/none", FileNotFoundError, "/none is no folder; give the one with "),
        ("npz:{}/none.npz", FileNotFoundError, "/none.npz"),
        ("folder:", ValueError, "unknown dataset 'folder:'; use one of 'digits', .*'folder:PATH'"),
        ("zip:{}", ValueError, "unknown dataset 'zip:.*'tfds:NAME', 'folder:PATH', 'npz:PATH', 'i"),
    ],
)
def test_what_is_not_there(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        load_images(name.format(tmp_path), "train")


def test_folders_one_level_off(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    with pytest.raises(ValueError, match=rf"1 class; give {tmp_path}/photos, which has several"):
        load_images(f"folder:{tmp_path}", "train")
    with pytest.raises(ValueError, match=rf"0 classes; .* the folder above, {tmp_path}/photos$"):
        load_images(f"folder:{tmp_path}/photos/cat", "train")
