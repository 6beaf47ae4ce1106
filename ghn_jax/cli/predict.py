"""Predicts all parameters of a network and writes them to a file.

    ghn-predict resnet50 --ghn ghn2-cifar10-small --out resnet50.pt   # a model of ghn_jax.zoo
    ghn-predict resnet50 --ghn runs/x --out resnet50.pt --dataset cifar10   # for one image, too
    ghn-predict arch.json --ghn runs/x --out weights              # Architecture.to_dict
    ghn-predict --split test --index 7 --ghn ghn2_cifar10.pt --out weights.safetensors --to flax

Files that end in .pt or .pth have PyTorch's names and layouts, and so have those that end in
.safetensors, without `--to flax`; a name without an ending is a folder of Orbax's. Nothing that
exists is overwritten.

Parameters are predicted, the running statistics of batch norm are not: a model that has them needs
batches of 64 images, each with its own statistics (PyTorch: `net.train()`). With `--dataset` they
are averaged over training images, so that it takes single images (`net.eval()`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from ghn_jax.cli import command
from ghn_jax.data.images import load_images, train_batches
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.evaluation.batch_statistics import average_statistics
from ghn_jax.evaluation.model_card import BATCH
from ghn_jax.interop.convert import Framework, check_target, read_network, write_network
from ghn_jax.interop.pretrained import from_pretrained
from ghn_jax.tracing.prediction import predict_model
from ghn_jax.zoo import Model

PROG = "ghn-predict"


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Which network, by which hypernetwork."""

    ghn: Annotated[str, tyro.conf.arg(aliases=["--ckpt"])]  # a folder or file, or a name
    out: Path  # the file or folder to write
    net: tyro.conf.Positional[str | None] = None  # a model of ghn_jax.zoo, or a JSON file
    split: str | None = None  # in place of a network: an evaluation set (test, deep, ...)
    index: int = 0  # of the network in that set
    image_size: int = 32  # height and width of the network's images, in pixels
    to: Framework = "torch"  # whose names and layouts a .safetensors file gets
    # whose images batch norm's running statistics are averaged over: digits, cifar10, imagenet2012,
    # tfds:NAME, folder:, npz: or idx:PATH; default: none, they stay 0 and 1
    dataset: str | None = None
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    batches: int = 50  # of 64 images, that statistics are averaged over


def read(config: PredictConfig, num_classes: int) -> Architecture | Model:
    """The network that the options name."""
    if (config.net is None) == (config.split is None):
        raise ValueError("give a network (resnet50, or a JSON file) or --split, one of them")
    if config.net is not None:
        return read_network(config.net, num_classes, config.image_size)
    networks = evaluation_set(config.split, image_size=config.image_size)
    if not 0 <= config.index < len(networks):
        raise ValueError(f"--index is {config.index}; allowed: 0 to {len(networks) - 1}")
    found = networks[config.index]
    if isinstance(found, str):  # ResNet-50 is outside the design space
        return read_network(found, num_classes, config.image_size)
    return found


def training_batches(config: PredictConfig, network: Architecture | Model) -> Iterator[np.ndarray]:
    """Training images for batch norm's running statistics, with a bar.

    Raises:
      ValueError: the network, or what it is written to, has no place for statistics.
    """
    if isinstance(network, Architecture):
        raise ValueError("--dataset is for models of the zoo: networks of the design space have no "
                         "running statistics")  # fmt: skip
    if not config.out.suffix:
        raise ValueError(f"--dataset needs a file, but {config.out} is a folder, which has no "
                         "running statistics; give NAME.pt or NAME.safetensors")  # fmt: skip
    if config.batches < 1:
        raise ValueError(f"--batches is {config.batches}; allowed: 1 or more")
    images = load_images(
        config.dataset, "train", data_dir=config.data_dir, image_size=config.image_size
    )
    found = train_batches(images, min(BATCH, len(images)), seed=0)
    chosen = itertools.islice((batch for batch, _ in found), config.batches)
    return iter(tqdm(chosen, total=config.batches, unit="batch", desc="statistics",
                     dynamic_ncols=True))  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    arguments = [a.removeprefix("--net=") for a in arguments if a != "--net"]  # as it was called
    config = tyro.cli(PredictConfig, prog=PROG, args=arguments, description=__doc__)
    check_target(config.out, config.to)
    ghn, variables = from_pretrained(config.ghn)
    network, size = read(config, ghn.num_classes), config.image_size
    batches = None if config.dataset is None else training_batches(config, network)
    if isinstance(network, Architecture):
        params = ghn.predict(variables, network, image_size=size)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"{count:,} parameters, all of them predicted")
        write_network(
            {"params": params}, ghn.graph(network, image_size=size), config.out, config.to
        )
    else:
        sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        predicted, report = predict_model(ghn, variables, network, sample)
        print(report)
        if batches is not None:
            predicted = average_statistics(network, predicted, batches)
        elif "batch_stats" in predicted:
            print("Running statistics are not predicted: batch norm needs those of each batch, of "
                  "64 images (PyTorch: net.train()); or give --dataset")  # fmt: skip
        write_network(predicted, network, config.out, config.to)
    print(f"wrote {config.out}")


run = command(PROG, main)

if __name__ == "__main__":
    run()
