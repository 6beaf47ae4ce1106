"""Datasets of users' own: TFDS's, folders, NumPy arrays and MNIST's files, all written here."""

import json
import sys
from collections import Counter

import image_sets
import numpy as np
import pytest
from image_sets import CLASSES, KINDS, SIZE, TEST, TRAIN, index_of, label, tagged, write
from PIL import Image
from tfds_files import (
    TEXT,
    WRITERS,
    encode,
    image_feature,
    label_feature,
    write_tfds,
)

from ghn_jax.cli import train
from ghn_jax.data import records, tfds
from ghn_jax.data.images import SPLITS, eval_batches, load_images, train_batches
from ghn_jax.data.splits import official_splits, part_by_class
from ghn_jax.data.statistics import channel_statistics
from ghn_jax.training import loop


@pytest.fixture
def dataset(tmp_path):
    """Writes a dataset and returns what loads a split of it."""

    def make(kind, **options):
        name, where = write(tmp_path, kind, **options)
        return lambda split, **more: load_images(name, split, **where, **more)

    return make


def indices(images) -> list[int]:
    return [index_of(images[i][0]) for i in range(len(images))]


# All kinds alike


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_all_images_once(dataset, kind):
    load = dataset(kind)
    found = {split: load(split) for split in SPLITS}
    seen = {split: indices(images) for split, images in found.items()}
    assert sorted(sum(seen.values(), [])) == [*range(TRAIN + TEST)]
    for split, images in found.items():
        assert [images[i][1] for i in range(len(images))] == [label(i) for i in seen[split]]
        assert (images.num_classes, images.image_size) == (CLASSES, SIZE)
        assert images.task == (CLASSES, SIZE)
        assert (images.pixels.dtype, images.pixels.shape[1:]) == (np.uint8, (SIZE, SIZE, 3))
        assert images.labels.dtype == np.int32
        for i in range(len(images)):
            expected = tagged(seen[split][i], gray=kind == "idx")
            np.testing.assert_array_equal(images.pixels[i], expected)
    assert indices(load("train")) == seen["train"]  # the same another time


@pytest.mark.parametrize("kind", KINDS)
def test_a_tenth_is_held_out(dataset, kind):
    load = dataset(kind)
    counts = {split: Counter(label(i) for i in indices(load(split))) for split in SPLITS}
    if kind in WRITERS:  # in the order of the files
        assert indices(load("val")) == [*range(54, 60)]
        return
    # Of the 20 images of a class, or 23 with those for tests, 2 for each split that is missing.
    own_test = kind not in ("folder without parts", "npz of all")
    sizes = {"train": 18, "val": 2, "test": 3} if own_test else {"train": 19, "val": 2, "test": 2}
    assert counts == {split: dict.fromkeys(range(CLASSES), n) for split, n in sizes.items()}
    first = {split: [i for i in indices(load(split)) if label(i) == 0] for split in SPLITS}
    assert first["train"] == [*range(sizes["train"])]
    assert first["test"] == ([60, 63, 66] if own_test else [19, 60])
    assert first["val"] == ([18, 19] if own_test else [63, 66])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_normalised_by_the_training_split(dataset, kind):
    load = dataset(kind)
    images = load("train")
    x = np.concatenate([x for x, _ in eval_batches(images, 7)])
    changing = x.std((0, 1, 2)) > 0.01
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(x.std((0, 1, 2))[changing], 1, atol=1e-4)
    assert changing.tolist() == [True, kind == "idx", True]
    for split in ("val", "test"):
        assert (load(split).mean, load(split).std) == (images.mean, images.std)


@pytest.mark.parametrize("kind", KINDS)
def test_gray_images_get_three_channels_and_are_not_mirrored(dataset, kind):
    load = dataset(kind, gray=True)
    for split in SPLITS:
        images = load(split)
        assert not images.mirror
        pixels, _ = images[0]
        np.testing.assert_array_equal(pixels, tagged(index_of(pixels), gray=True))
        assert len(set(images.mean)) == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "idx"])
def test_coloured_images_are_mirrored(dataset, kind):
    assert dataset(kind)("train").mirror


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_resized_by_option(dataset, kind):
    load = dataset(kind)
    images = load("test", image_size=24)
    pixels, _ = images[0]
    assert (images.image_size, pixels.shape) == (24, (24, 24, 3))
    small = Image.fromarray(tagged(index_of(pixels), gray=kind == "idx"))
    np.testing.assert_array_equal(pixels, small.resize((24, 24), Image.Resampling.BILINEAR))
    x, _ = next(train_batches(load("train", image_size=24), 8, seed=0))
    assert x.shape == (8, 24, 24, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_no_squares_need_a_size(dataset, kind):
    load = dataset(kind, size=(10, 14))
    with pytest.raises(ValueError, match="10x14 pixels; give the size that .* --image-size, 8 or"):
        load("train")
    pixels, _ = load("train", image_size=10)[0]
    np.testing.assert_array_equal(
        pixels, tagged(index_of(pixels), size=(10, 10), gray=kind == "idx")
    )


@pytest.mark.parametrize("kind", ["array_record", "folder", "npz"])
def test_the_centre_is_cut_out(dataset, kind, monkeypatch):
    framed = np.full((10, 14, 3), 255, np.uint8)
    framed[:, 2:12] = 7
    monkeypatch.setattr(image_sets, "tagged", lambda *_, **__: framed)
    pixels, _ = dataset(kind, size=(10, 14))("train", image_size=10)[0]
    assert (pixels == 7).all()


@pytest.mark.parametrize("kind", ["tfrecord", "folder", "npz"])
def test_classes_are_mixed_in_evaluation(dataset, kind):
    """Files are class by class, and batch norm uses the statistics of batches."""
    images = dataset(kind)("train")
    batches = list(eval_batches(images, 18))
    assert [len(y) for _, y in batches] == [18, 18, 18]
    assert all(len(set(y.tolist())) == CLASSES for _, y in batches)
    assert Counter(np.concatenate([y for _, y in batches]).tolist()) == Counter(
        images.labels.tolist()
    )


@pytest.mark.parametrize("kind", ["tfrecord", "array_record", "folder"])
def test_large_images_are_decoded_batch_by_batch(dataset, kind):
    load = dataset(kind, size=(100, 100))
    images = load("train")
    assert (images.image_size, images.pixels, images.in_memory) == (100, None, False)
    assert not isinstance(images.records, list)
    pixels, found = images[5]
    np.testing.assert_array_equal(pixels, tagged(index_of(pixels), size=(100, 100)))
    assert found == label(index_of(pixels))
    (x, y), (again, _) = (next(train_batches(images, 4, seed=0)) for _ in range(2))
    assert (x.shape, y.dtype) == ((4, 100, 100, 3), np.int32)
    np.testing.assert_array_equal(x, again)
    x, y = next(eval_batches(load("test"), TEST))
    whole = (x * images.std + images.mean) * 255
    assert sorted(index_of(image) for image in whole) == [*range(TRAIN, TRAIN + TEST)]
    assert [label(index_of(image)) for image in whole] == y.tolist()


# Splits and statistics


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train"], {"train": "train"}),
        (["train", "test"], {"train": "train", "test": "test"}),
        (["train", "validation"], {"train": "train", "test": "validation"}),
        (["train", "val"], {"train": "train", "test": "val"}),
        (["train", "test", "val"], {"train": "train", "test": "test", "val": "val"}),
        (["train", "test", "extra"], {"train": "train", "test": "test"}),
    ],
)
def test_which_official_splits_are_used(names, expected):
    assert official_splits("it", names) == expected


def test_of_many_images_50000_are_held_out_in_all():
    labels = np.repeat(np.arange(5), 200_000)
    held = part_by_class("val", labels, ("val",))
    assert np.bincount(labels[held]).tolist() == [10_000] * 5
    assert len(part_by_class("train", labels, ("val",))) == 950_000


def test_statistics_are_those_of_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (1003, 4, 4, 3)).astype(np.uint8)
    mean, std = channel_statistics(pixels)
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 1, 2)), rtol=1e-12)


def test_records_that_are_many_are_read_in_parts(dataset, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK", 7)
    assert indices(dataset("tfrecord")("train")) == [*range(54)]


# Folders


def test_a_folder_with_photographs_of_all_sizes_and_kinds(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        size = (20 + i, 50) if i % 3 else (50, 30)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        path = tmp_path / ("cat", "dog")[i % 2] / f"{i}.{('jpg', 'JPEG', 'png')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        kind = "PNG" if path.suffix == ".png" else "JPEG"
        path.write_bytes(encode(pixels, kind, ("L", "RGB", "RGB", "CMYK")[i % 4] if kind == "JPEG"
                                else "P"))  # fmt: skip
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / ".thumbnails").mkdir()
    name = f"folder:{tmp_path}"
    with pytest.raises(ValueError, match="has images of several sizes; give the size"):
        load_images(name, "train")
    found = [load_images(name, split, image_size=16) for split in SPLITS]
    assert [len(images) for images in found] == [32, 4, 4]
    assert all(images.num_classes == 2 and images.mirror for images in found)
    assert [found[0].class_name(i) for i in range(2)] == ["cat", "dog"]
    large = load_images(name, "val", image_size=100)
    assert not large.in_memory
    (x, y), *_ = eval_batches(large, 4)
    assert x.shape == (4, 100, 100, 3)
    assert sorted(y.tolist()) == [0, 0, 1, 1]


def test_a_folder_may_have_all_its_parts(tmp_path):
    for part, colours in (("train", [10, 20]), ("validation", [30]), ("test", [40])):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for colour in colours:
                pixels = np.full((8, 8, 3), colour, np.uint8)
                (tmp_path / part / name / f"{colour}.png").write_bytes(encode(pixels, "PNG"))
    for split, colours in (("train", [10, 20, 10, 20]), ("val", [30, 30]), ("test", [40, 40])):
        images = load_images(f"folder:{tmp_path}", split)
        assert images.pixels[:, 0, 0, 0].tolist() == colours


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "ship"):
        (tmp_path / name).mkdir()
        for i in range(10):
            pixels = np.full((8, 8, 3), i, np.uint8)
            (tmp_path / name / f"{i}.png").write_bytes(encode(pixels, "PNG"))
    images = load_images(f"folder:{tmp_path}", "val")
    assert (images.num_classes, images.labels.tolist()) == (2, [0, 1])


# TFDS


def one_record(**values) -> dict:
    image = encode(tagged(1), "PNG")
    return {"image": image, "label": 0, "id": b"0", **values}


def test_the_version_and_the_configuration_are_chosen_by_name(tmp_path, monkeypatch):
    features = {"image": image_feature(SIZE, SIZE, 3), "label": label_feature(2)}
    for name, version, count in (("a", "1.0.0", 20), ("a", "10.0.0", 30), ("b/x", "1.0.0", 40)):
        rows = [one_record(label=i % 2) for i in range(count)]
        write_tfds(tmp_path, name, version, {"train": [rows]}, features=features)
    (tmp_path / "a" / "10.0.0" / "label.labels.txt").write_text("cat\ndog\n")
    for name, count in (("a", 30), ("a:1.0.0", 20), ("b/x", 40), ("b/x:1.0.0", 40)):
        found = [load_images(f"tfds:{name}", split, data_dir=tmp_path) for split in SPLITS]
        assert found[0].class_names == (("cat", "dog") if name == "a" else ("0", "1"))
        assert [len(images) for images in found] == [count * 8 // 10, count // 10, count // 10]
    for name, error, message in (
        ("a:3.0.0", FileNotFoundError, "/a has no version '3.0.0'; use one of 1.0.0, 10.0.0"),
        ("b", ValueError, "/b has the configurations x; give one, as tfds:b/x"),
        ("c", FileNotFoundError, "has no prepared c; expected .*/c/<version>"),
        (f"{tmp_path}/a", ValueError, "has no name; use tfds:NAME, and give the folder"),
    ):
        with pytest.raises(error, match=message):
            load_images(f"tfds:{name}", "train", data_dir=tmp_path)
    for place in (tmp_path / "a", tmp_path / "a" / "1.0.0"):
        with pytest.raises(FileNotFoundError, match=f"that a is in: data_dir='{tmp_path}'"):
            load_images("tfds:a", "train", data_dir=place)
    for place in (tmp_path / "b", tmp_path / "b" / "x", tmp_path / "b" / "x" / "1.0.0"):
        monkeypatch.chdir(place)
        with pytest.raises(FileNotFoundError, match=f"that b is in: data_dir='{tmp_path}'"):
            load_images("tfds:b", "train", data_dir=".")
    (tmp_path / "up").mkdir()
    (tmp_path / "a").rename(tmp_path / "up" / "a")
    with pytest.raises(FileNotFoundError, match=f"is in: data_dir='{tmp_path}/up'"):
        load_images("tfds:a", "train", data_dir=tmp_path)


def test_what_tfds_needs_and_has_not_is_told(monkeypatch):
    """TFDS itself is silent where a package is missing, and has no functions then."""
    import tensorflow_datasets

    monkeypatch.delattr(tensorflow_datasets, "builder_from_directory")
    monkeypatch.delattr(tensorflow_datasets, "public_api")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.public_api", None)
    with pytest.raises(ImportError, match=r"tensorflow_datasets needs .*public_api, .*pip install"):
        tfds._import_tfds()


@pytest.mark.parametrize("supervised", [(), ("photo", "fine")])
def test_features_are_found_by_their_kind_or_as_supervised_keys(tmp_path, supervised):
    features = {"photo": image_feature(SIZE, SIZE, 3), "fine": label_feature(4), "id": TEXT}
    if supervised:
        features |= {"mask": image_feature(-1, -1, 1), "coarse": label_feature(2)}
    rows = [{"photo": encode(tagged(i), "PNG"), "fine": i % 4, "id": b"0"} for i in range(20)]
    if supervised:
        rows = [{**row, "mask": b"none", "coarse": 0} for row in rows]
    write_tfds(
        tmp_path, "own", "1.0.0", {"train": [rows]}, features=features, supervised=supervised
    )
    images = load_images("tfds:own", "train", data_dir=tmp_path)
    assert images.num_classes == 4
    assert images.labels.tolist() == [i % 4 for i in range(16)]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"id": TEXT, "label": label_feature(2)}, r"features id \(Text\), label \(ClassLabel\); a"),
        (
            {"image": image_feature(8, 8, 3)},
            r"has the features image \(Image\); a dataset with one",
        ),
        (
            {"a": image_feature(8, 8, 3), "b": image_feature(8, 8, 3), "label": label_feature(2)},
            r"a \(Image\), b \(Image\), label \(ClassLabel\); a dataset with one Image and one",
        ),
        (
            {"image": image_feature(8, 8, 1, dtype="uint16"), "label": label_feature(2)},
            "has images of uint16; images of uint8 are needed",
        ),
        (
            {"image": image_feature(-1, -1, 3), "label": label_feature(2)},
            "has images of several sizes; give the size",
        ),
    ],
)
def test_tfds_datasets_that_do_not_fit(tmp_path, features, message):
    write_tfds(tmp_path, "own", "1.0.0", {"train": [[one_record()] * 10]}, features=features)
    with pytest.raises(ValueError, match=message):
        load_images("tfds:own", "train", data_dir=tmp_path)


def test_labels_out_of_range_are_refused(tmp_path):
    features = {"image": image_feature(SIZE, SIZE, 3), "label": label_feature(2)}
    rows = [one_record(label=i % 2) for i in range(20)]
    shards = {"train": [rows], "test": [[one_record(), one_record(label=7)]]}
    write_tfds(tmp_path, "own", "1.0.0", shards, features=features)
    with pytest.raises(ValueError, match="image 1 of tfds:own test has the label 7; use 0 to 1"):
        load_images("tfds:own", "test", data_dir=tmp_path)


def test_a_tfds_dataset_without_training_images(tmp_path):
    write_tfds(tmp_path, "own", "1.0.0", {"test": [[one_record()]], "extra": [[one_record()]]})
    with pytest.raises(ValueError, match="tfds:own has the splits 'extra', 'test'; one is needed"):
        load_images("tfds:own", "test", data_dir=tmp_path, image_size=8)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_file_is_named(tmp_path, kind):
    name, where = write(tmp_path, kind)
    file = tmp_path / "own" / "1.0.0" / f"own-train.{kind}-00001-of-00002"
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing; get it, or prepare the data"):
        load_images(name, "train", **where)


# Training


def test_a_hypernetwork_is_made_for_the_datasets_task(tmp_path, monkeypatch):
    name, _ = write(tmp_path / "images", "folder")
    runs = []
    monkeypatch.setattr(
        train, "train", lambda config, images, _: runs.append(loop.setup(config, images))
    )
    train.main(
        ["--preset", "demo", "--dataset", name, "--image-size", "16", "--batch-size", "6",
         "--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    )  # fmt: skip
    (run,) = runs
    run.step.close()
    assert (run.step.ghn.num_classes, run.stream.image_size) == (CLASSES, 16)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["image_size"] == 16
