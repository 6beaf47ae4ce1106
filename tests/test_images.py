"""Images: the splits, batches that resume, views and prefetching.

ImageNet and a small CIFAR-10 are written here in the format of TFDS; tests of the real CIFAR-10
need `tfds` in the shared folder.
"""

import gc
import itertools
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from tfds_files import encode, write_tfds

from ghn_jax.data import augment, splits
from ghn_jax.data.images import (
    SPLITS,
    Images,
    eval_batches,
    load_images,
    prefetch,
    steps_per_epoch,
    train_batches,
)

ROOT = Path(__file__).resolve().parents[1]
TFDS = Path(os.environ.get("GHN_JAX_SHARED", ROOT.parent / "shared")) / "tfds"

needs_cifar10 = pytest.mark.skipif(
    not (TFDS / "cifar10").is_dir(), reason=f"no cifar10 in {TFDS}; set GHN_JAX_SHARED"
)


def photo(label: int) -> np.ndarray:
    """A smooth image of 36 to 45 by 30 pixels, upright or lying, unlike those of other labels."""
    noise = np.random.default_rng(label).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    size = (36 + label % 10, 30) if label % 2 else (30, 36 + label % 10)
    return np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory) -> Path:
    """70 training and 11 validation images; labels 0 to 80, one image each."""
    modes = {3: "L", 5: "CMYK"}  # ImageNet has some of these
    records = [
        {"image": encode(photo(i), "JPEG", modes.get(i, "RGB")), "label": i, "id": b"%d" % i}
        for i in range(81)
    ]
    splits = {"train": [records[:40], records[40:70]], "validation": [records[70:]]}
    return write_tfds(tmp_path_factory.mktemp("tfds"), "imagenet2012", "5.1.0", splits)


@pytest.fixture(scope="module")
def imagenet(imagenet_dir) -> dict[str, Images]:
    return {
        split: load_images("imagenet2012", split, data_dir=imagenet_dir, image_size=16)
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def cifar10() -> dict[str, Images]:
    return {split: load_images("cifar10", split, data_dir=TFDS) for split in SPLITS}


def plain_images(pixels: np.ndarray, **options) -> Images:
    """Images whose batches have the values of the pixels, labelled 0, 1, 2..."""
    labels = np.arange(len(pixels), dtype=np.int32)
    mean, std = (0.0,) * 3, (1 / 255,) * 3
    size = pixels.shape[1]
    return Images("plain", "train", len(pixels), size, mean, std, pixels, labels, **options)


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def assert_equal_batches(batches, others) -> None:
    for (x, y), (other_x, other_y) in zip(batches, others, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)


# Digits


def test_digits_splits_are_the_file_in_parts_that_end_where_writers_change():
    parts = [load_images("digits", split) for split in SPLITS]
    assert [len(part) for part in parts] == [1157, 258, 382]
    np.testing.assert_array_equal(
        np.concatenate([part.labels for part in parts]), load_digits().target
    )
    for part in parts:  # everyone began with 0 to 9 three times
        assert part.labels[:30].tolist() == [*range(10)] * 3
        assert (part.pixels.dtype, part.pixels.shape[1:]) == (np.uint8, (16, 16, 3))
        assert (part.labels.dtype, part.num_classes, part.image_size) == (np.int32, 10, 16)


@pytest.mark.parametrize("split", SPLITS)
def test_digits_at_their_own_size_are_the_files_images(split):
    images = load_images("digits", split, image_size=8)
    start = {"train": 0, "val": 1157, "test": 1415}[split]
    stored = load_digits().images[start : start + len(images)]  # 0 to 16
    for channel in range(3):
        assert np.abs(images.pixels[..., channel] / 255 - stored / 16).max() <= 0.5 / 255 + 1e-9


def test_digits_are_normalised_by_their_training_split():
    x = np.concatenate([x for x, _ in eval_batches(load_images("digits", "train"), 500)])
    assert abs(x.mean()) < 1e-4
    assert abs(x.std() - 1) < 1e-4
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert (test.mean, test.std) == (train.mean, train.std)


# Batches


def test_training_resumes_exactly_across_epochs():
    images = load_images("digits", "val")  # 4 batches of 64 an epoch
    batches = take(train_batches(images, 64, seed=3), 10)
    for start in (1, 4, 7):
        resumed = take(train_batches(images, 64, seed=3, start_step=start), 10 - start)
        assert_equal_batches(resumed, batches[start:])


def test_training_batches_have_the_promised_types():
    x, y = next(train_batches(load_images("digits", "val"), 64, seed=0))
    assert (x.dtype, x.shape, y.dtype, y.shape) == (np.float32, (64, 16, 16, 3), np.int32, (64,))


def test_an_epoch_is_the_images_in_random_order_without_the_rest():
    values = np.arange(1, 24, dtype=np.uint8)  # 0 is the padding
    images = plain_images(np.tile(values[:, None, None, None], (1, 8, 8, 3)))
    assert steps_per_epoch(images, 5) == 4
    batches = take(train_batches(images, 5, seed=0), 40)
    for x, y in batches:
        np.testing.assert_array_equal(np.rint(x.max((1, 2, 3))), y + 1)
    epochs = np.concatenate([y for _, y in batches]).reshape(10, 20)
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10
    assert set(epochs.ravel()) == set(range(23))  # another rest every time
    other = np.concatenate([y for _, y in take(train_batches(images, 5, seed=1), 4)])
    assert not np.array_equal(other, epochs[0])


def test_every_batch_has_its_own_augmentation():
    image = np.random.default_rng(0).integers(1, 256, (1, 16, 16, 3), dtype=np.uint8)
    images = plain_images(image)
    views = {x.tobytes() for x, _ in take(train_batches(images, 1, seed=0), 20)}
    assert len(views) > 10  # of 25 crops, mirrored or not
    other_seed = take(train_batches(images, 1, seed=1), 20)
    assert {x.tobytes() for x, _ in other_seed} != views


def test_images_are_mirrored_where_they_may_be():
    half = np.zeros((64, 16, 16, 3), np.uint8)
    half[:, :, :4] = 255  # the left side is bright; after mirroring the right one
    for mirror, mirrored in ((False, [False]), (True, [False, True])):
        x, _ = next(train_batches(plain_images(half, mirror=mirror), 64, seed=0))
        right_is_brighter = x[:, :, 8:].mean((1, 2, 3)) > x[:, :, :8].mean((1, 2, 3))
        assert sorted(set(right_is_brighter.tolist())) == mirrored
    assert not load_images("digits", "train").mirror


def test_evaluation_sees_every_image_once_in_order():
    images = load_images("digits", "val")
    batches = list(eval_batches(images, 100))
    assert [len(y) for _, y in batches] == [100, 100, 58]
    np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), images.labels)
    x = np.concatenate([x for x, _ in batches])
    assert x.dtype == np.float32
    expected = (images.pixels / 255 - np.array(images.mean)) / np.array(images.std)
    np.testing.assert_allclose(x, expected, atol=1e-5)


# ImageNet


def test_imagenet_splits_are_disjoint_and_read_only_when_asked(imagenet):
    labels = {name: [images[i][1] for i in range(len(images))] for name, images in imagenet.items()}
    # A tenth of 70 held out at the end; of the real 1,281,167 it is 50,000.
    assert labels == {"train": [*range(63)], "val": [*range(63, 70)], "test": [*range(70, 81)]}
    for images in imagenet.values():
        assert images.pixels is None
        assert images.labels is None
        assert (images.num_classes, images.image_size) == (200, 16)
    pixels, label = imagenet["train"][-1]
    assert (pixels.shape, pixels.dtype, label) == (photo(62).shape, np.uint8, 62)
    assert np.abs(pixels.astype(int) - photo(62)).mean() < 5  # JPEG
    with pytest.raises(IndexError):
        imagenet["val"][7]


def test_all_but_50000_at_most_of_the_training_images_are_kept():
    assert [splits.part(split, 1_281_167) for split in SPLITS] == [
        slice(0, 1_231_167),
        slice(1_231_167, 1_281_167),
        slice(0, 1_281_167),
    ]
    assert splits.part("val", 50_000) == slice(45_000, 50_000)


def test_imagenet_training_resumes_exactly(imagenet):
    images = imagenet["train"]  # 3 batches of 20 an epoch
    batches = take(train_batches(images, 20, seed=0), 5)
    x, y = batches[0]
    assert (x.dtype, x.shape, y.dtype, y.shape) == (np.float32, (20, 16, 16, 3), np.int32, (20,))
    assert len(set(np.concatenate([y for _, y in batches[:3]]))) == 60
    resumed = take(train_batches(images, 20, seed=0, start_step=2), 3)
    assert_equal_batches(resumed, batches[2:])


def test_imagenet_training_views_are_random_for_every_image(imagenet):
    """The views of one batch are those of its generators, one for each image."""
    images = imagenet["train"]
    x, y = take(train_batches(images, 8, seed=5), 2)[1]
    rngs = np.random.default_rng([1, 5, 1]).spawn(8)
    for view, label, rng in zip(x, y, rngs, strict=True):
        pixels = augment.random_view(images.records[label]["image"], 16, rng)
        np.testing.assert_array_equal(view, augment.normalise(pixels, images.mean, images.std))


def test_random_views_are_mirrored_half_of_the_time():
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    data = encode(half, "PNG")
    views = [augment.random_view(data, 16, np.random.default_rng(i)) for i in range(300)]
    assert views[0].shape == (16, 16, 3)
    sides = [int(view[:, 8:].sum()) - int(view[:, :8].sum()) for view in views]
    right, left = sum(side > 0 for side in sides), sum(side < 0 for side in sides)
    assert min(right, left) > 100


def test_imagenet_evaluation_is_a_fixed_shuffle_of_central_views(imagenet):
    images = imagenet["test"]
    batches = list(eval_batches(images, 4))
    assert [len(y) for _, y in batches] == [4, 4, 3]
    labels = np.concatenate([y for _, y in batches])
    assert sorted(labels) == [*range(70, 81)]
    assert labels.tolist() != sorted(labels)
    assert_equal_batches(eval_batches(images, 4), batches)
    for x, y in batches:
        for view, label in zip(x, y, strict=True):
            pixels, _ = images[label - 70]
            height, width = pixels.shape[:2]
            # The shorter side, 30 pixels, to 18 = 16 * 8 / 7, then the 16 x 16 in the middle.
            size = (width * 18 // 30, height * 18 // 30)
            small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
            top, left = round((size[1] - 16) / 2), round((size[0] - 16) / 2)
            small = small[top : top + 16, left : left + 16] / 255
            expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            np.testing.assert_allclose(view, expected, atol=1e-5)


def test_imagenet_size_is_224_of_256():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 320, 3), np.uint8))
    expected = image.resize((273, 256), Image.Resampling.BILINEAR).crop((24, 16, 248, 240))
    view = augment.central_view(encode(np.asarray(image), "PNG"), 224)
    np.testing.assert_array_equal(view, np.asarray(expected))


def test_gray_and_cmyk_photographs_become_rgb(imagenet):
    for label in (3, 5):
        pixels, found = imagenet["train"][label]
        assert found == label
        assert pixels.shape == photo(label).shape
    gray, _ = imagenet["train"][3]
    assert np.array_equal(gray[..., 0], gray[..., 2])


# CIFAR-10


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_cifar10_is_held_out_by_id_and_not_by_the_order_of_the_file(tmp_path, file_format):
    order = np.random.default_rng(0).permutation(30)
    flat = [
        {
            "image": encode(np.full((32, 32, 3), i, np.uint8), "PNG"),
            "label": int(i) % 10,
            "id": b"train_%05d" % i,
        }
        for i in order
    ]
    shards = {"train": [flat], "test": [flat[:10]]}
    write_tfds(tmp_path, "cifar10", "3.0.2", shards, file_format=file_format)
    for split, expected in (("train", range(27)), ("val", range(27, 30))):
        images = load_images("cifar10", split, data_dir=tmp_path)
        assert images.pixels.shape == (len(expected), 32, 32, 3)
        assert images.pixels[:, 5, 5, 0].tolist() == [*expected]
        assert images.labels.tolist() == [i % 10 for i in expected]
        assert images.records is None
        assert images.mirror
    small = load_images("cifar10", "val", data_dir=tmp_path, image_size=16)
    assert small.pixels.shape == (3, 16, 16, 3)
    assert len(load_images("cifar10", "test", data_dir=tmp_path)) == 10


@needs_cifar10
def test_cifar10_splits(cifar10):
    assert {split: len(images) for split, images in cifar10.items()} == {
        "train": 45_000,
        "val": 5_000,
        "test": 10_000,
    }
    counts = {split: np.bincount(images.labels) for split, images in cifar10.items()}
    assert (counts["train"] + counts["val"] == 5_000).all()
    assert (counts["test"] == 1_000).all()
    for images in cifar10.values():
        assert (images.pixels.dtype, images.pixels.shape[1:]) == (np.uint8, (32, 32, 3))
        assert (images.labels.dtype, images.num_classes) == (np.int32, 10)
    train, val, test = ({image.tobytes() for image in cifar10[split].pixels} for split in SPLITS)
    assert len(train & val) == 0
    assert len(train & test) == 0


@needs_cifar10
def test_cifar10_batches_are_normalised(cifar10):
    assert cifar10["train"].mean == (0.49139968, 0.48215827, 0.44653124)
    assert cifar10["train"].std == (0.24703233, 0.24348505, 0.26158768)
    x = np.concatenate([x for x, _ in eval_batches(cifar10["val"], 1000)])
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=0.03)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=0.03)
    x, y = next(train_batches(cifar10["train"], 64, seed=0))
    assert (x.dtype, x.shape, y.shape) == (np.float32, (64, 32, 32, 3), (64,))
    black = (0 - np.array(cifar10["train"].mean)) / np.array(cifar10["train"].std)
    padding = np.isclose(x, black, atol=1e-5).all(-1)
    assert padding[:, :4].all((1, 2)).any()  # padded before, not after, the normalisation


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar100", "train"), "unknown dataset 'cifar100'; use one of 'digits', 'cifar10', "),
        (("digits", "valid"), "unknown split 'valid'; use one of 'train', 'val', 'test'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_images(*arguments)


@pytest.mark.parametrize("size", [7, 16.0, True])
def test_image_size_has_to_be_a_whole_number_of_8_or_more(size):
    with pytest.raises(ValueError, match="image_size is .*; use a whole number from 8 to"):
        load_images("digits", "train", image_size=size)


def test_a_missing_dataset_is_named_with_the_folder_it_should_be_in(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    with pytest.raises(
        FileNotFoundError, match=f"'{gone}', which does not exist; expected {gone}/"
    ):
        load_images("cifar10", "test", data_dir=gone)
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)  # begun, not finished
    with pytest.raises(FileNotFoundError, match=f"no prepared cifar10; .*{tmp_path}/cifar10/<vers"):
        load_images("cifar10", "test", data_dir=tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "other"))
    with pytest.raises(
        FileNotFoundError, match=f"expected {tmp_path}/other/imagenet2012/<version>"
    ):
        load_images("imagenet2012", "test")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/tensorflow_datasets/imagenet2012/"):
        load_images("imagenet2012", "test")


def test_the_data_dir_is_found_by_the_environment(imagenet_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(imagenet_dir))
    images = load_images("imagenet2012", "val")
    assert (len(images), images.image_size) == (7, 224)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    folder = write_tfds(tmp_path, "imagenet2012", "5.1.0", {"train": [[]]})
    with pytest.raises(FileNotFoundError, match="no split 'validation', which 'test' is read from"):
        load_images("imagenet2012", "test", data_dir=folder)
    info = folder / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "riegeli"))
    with pytest.raises(ValueError, match="of the format 'riegeli'; use 'array_record' or 'tfrec"):
        load_images("imagenet2012", "train", data_dir=folder)


@pytest.mark.parametrize("batch_size", [0, 259, 2.0, True])
def test_batch_sizes_out_of_range_are_refused_at_once(batch_size):
    images = load_images("digits", "val")
    calls = (
        lambda: train_batches(images, batch_size, seed=0),
        lambda: eval_batches(images, batch_size),
        lambda: steps_per_epoch(images, batch_size),
    )
    message = f"batch_size for digits val is {batch_size}; use a whole number from 1 to 258"
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": 2**32}, {"seed": 0, "start_step": -1}])
def test_seeds_and_steps_out_of_range_are_refused_at_once(given):
    name = list(given)[-1]
    with pytest.raises(ValueError, match=f"{name} is {given[name]}; use a whole number from 0 to"):
        train_batches(load_images("digits", "val"), 64, **given)


# Prefetching


def eventually(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def new_threads(before: set) -> set:
    return set(threading.enumerate()) - before


def test_prefetching_changes_nothing_but_the_thread():
    images = load_images("digits", "val")
    expected = take(train_batches(images, 64, seed=0), 6)
    assert_equal_batches(take(prefetch(train_batches(images, 64, seed=0)), 6), expected)
    names = []
    items = prefetch((names.append(threading.current_thread()) or i for i in range(5)), 1)
    assert list(items) == [0, 1, 2, 3, 4]
    assert len(set(names)) == 1
    assert names[0] is not threading.current_thread()
    assert eventually(lambda: not names[0].is_alive())


def test_prefetching_is_ahead_by_its_size_and_no_more():
    computed = []
    items = prefetch((computed.append(i) or i for i in range(100)), 3)
    assert next(items) == 0
    assert eventually(lambda: len(computed) == 4)
    time.sleep(0.05)
    assert len(computed) == 4
    assert next(items) == 1
    assert eventually(lambda: len(computed) == 5)
    items.close()


def test_prefetching_raises_what_its_iterator_raises_after_the_items_before():
    def failing():
        yield 1
        raise KeyError("broken image")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(KeyError, match="broken image"):
        next(items)
    with pytest.raises(ValueError, match="size is 0"):
        prefetch([], 0)


@pytest.mark.parametrize("end", ["close", "collect"])
def test_the_thread_ends_with_its_consumer(end):
    computed, closed = [], []

    def endless():
        try:
            for i in itertools.count():
                computed.append(i)
                yield i
        finally:
            closed.append(True)

    before = set(threading.enumerate())
    items = prefetch(endless())
    assert take(items, 3) == [0, 1, 2]
    assert len(new_threads(before)) == 1
    assert eventually(lambda: len(computed) == 5)
    time.sleep(0.05)  # until it waits for a place
    if end == "close":
        items.close()
    del items
    gc.collect()
    assert eventually(lambda: not new_threads(before))
    assert eventually(lambda: closed)  # what it iterated over, too
