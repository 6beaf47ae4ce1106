"""Labelled images to train and evaluate target networks on (paper § 5.1).

    images = load_images("cifar10", "train")
    for x, y in prefetch(train_batches(images, 64, seed=0)):  # without end
        ...  # x (64, 32, 32, 3) float32, normalised; y (64,) int32

| name | dataset |
|---|---|
| `digits` | scikit-learn's handwritten digits, which come with it |
| `cifar10`, `imagenet2012` | the paper's, prepared by TFDS in `<data_dir>/<name>/<version>` |
| `tfds:NAME` | another one that TFDS has prepared; also `NAME/CONFIG`, `NAME:VERSION` |
| `folder:PATH` | PNG or JPEG files in a folder for each class |
| `npz:PATH` | a file of NumPy arrays |
| `idx:PATH` | a folder of MNIST's kind of files, such as Debian's `dataset-fashion-mnist` |
"""

from __future__ import annotations

import os
from pathlib import Path

from ghn_jax.data.arrays import load_idx, load_npz
from ghn_jax.data.batches import Batch, eval_batches, steps_per_epoch, train_batches
from ghn_jax.data.checks import MIN_IMAGE_SIZE, check_choice, check_whole
from ghn_jax.data.digits import load_digits
from ghn_jax.data.folders import load_folder
from ghn_jax.data.prefetch import prefetch
from ghn_jax.data.splits import SPLITS, Images
from ghn_jax.data.tfds import load_cifar10, load_imagenet, load_tfds

__all__ = [
    "SPLITS",
    "Batch",
    "Images",
    "eval_batches",
    "load_images",
    "prefetch",
    "steps_per_epoch",
    "train_batches",
]

_NAMES = ("digits", "cifar10", "imagenet2012")
_FILES = {"folder": load_folder, "npz": load_npz, "idx": load_idx}


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
    tfds:NAME: the only image and the only label of each record, or those of its supervised keys.
      The last version, by name, if none is given.
    folder:PATH: `PATH/train/CLASS/*.png` (or .jpg, .jpeg), the same in `PATH/test`, and in
      `PATH/val` or `PATH/validation`; or `PATH/CLASS/*.png`. Classes are numbered in the order of
      their names.
    npz:PATH: the arrays `x_train` and `y_train`, with `x_test` and `y_test` if there are test
      images; or `images` and `labels`. Images are (N, height, width) or (N, height, width, 1 or 3)
      uint8, or floats from 0 to 1; labels whole numbers from 0.
    idx:PATH: `train-images-idx3-ubyte` and `train-labels-idx1-ubyte` in the folder, and `t10k-...`
      for tests, each compressed (.gz) or not.

    For the last four: a set with a validation split alone has it as `test`. What is missing is held
    out of the training images: for `val` the last 10 %, but at most 50,000, for `test` as many
    before them; of `tfds:` in the order of the files, of others for each class by itself. Images
    are normalised by their training split: by all of its images for `npz:` and `idx:`, by 5,000 for
    others. Gray images get three equal channels, and sets of them are not mirrored in training.
    Images of up to 96 pixels are decoded now, larger ones batch by batch. Where networks get
    another size, the shorter side is resized (bilinear) and the centre cut out.

    Args:
      name: as in the table above.
      split: 'train', 'val' or 'test'.
      data_dir: folder of the datasets that TFDS has prepared; without it the environment variable
        TFDS_DATA_DIR, else ~/tensorflow_datasets. Other datasets do not use it.
      image_size: height and width in pixels of the images in batches; without it 16, 32 and 224 for
        the first three, and for others the size of the dataset's own images.

    Raises:
      ValueError: unknown name or split, image_size below 8, images of several sizes without
        image_size, or files that are not what they should be.
      FileNotFoundError: the dataset, or the split, is not there.
    """
    kind, _, what = name.partition(":")
    if not (what and kind in ("tfds", *_FILES)):
        kinds = ("tfds:NAME", *(f"{kind}:PATH" for kind in _FILES))
        check_choice("dataset", name, (*_NAMES, *kinds))
    check_choice("split", split, SPLITS)
    if image_size is not None:
        check_whole("image_size", image_size, MIN_IMAGE_SIZE)
    if name == "digits":
        return load_digits(split, image_size)
    if name == "cifar10":
        return load_cifar10(split, image_size, data_dir)
    if name == "imagenet2012":
        return load_imagenet(split, image_size, data_dir)
    if kind == "tfds":
        return load_tfds(name, what, split, image_size, data_dir)
    return _FILES[kind](name, Path(what).expanduser(), split, image_size)
