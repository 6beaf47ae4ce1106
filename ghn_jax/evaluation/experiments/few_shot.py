r"""Fine-tuning on 100 images of each class, from predicted parameters (paper § 5.3, Table 6, left).

    ghn-paper few-shot --ghn runs/ghn2-imagenet --trained runs/sgd-imagenet --dataset cifar10 \
        --data-dir DIR --out runs/few_shot
    ghn-paper few-shot --quick

Each network starts from random (He) parameters, from those that a hypernetwork predicts, and with
`--trained` from those that `ghn-paper trained-networks --keep-parameters` trained on other images.
The learning rate and the weight decay are chosen for each start on shots that are held out; then
the network is trained on all shots with several seeds, and tested on all test images.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ghn_jax.data.images import Images, load_images, steps_per_epoch
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.experiments.kept_parameters import existing_file, read_parameters
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.experiments.trained_networks import (
    check_recipe,
    train_network,
    training_of,
)
from ghn_jax.evaluation.networks import by_name, module_of
from ghn_jax.evaluation.recipe import Recipe
from ghn_jax.evaluation.reinitialise import add_noise, orthogonalise, tiled_kernels
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.tracing.prediction import predict_model

HE = "he"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks are fine-tuned, from what, and how."""

    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    networks: tuple[str, ...] = ("resnet50", "ViT", "DARTS")  # DARTS, PDARTS, ViT, the zoo's
    width: int | None = None  # initial channels of those of the design space; default: 32
    ghn: tuple[Path, ...] = ()  # folders, files or names; default: only random parameters
    trained: tuple[Path, ...] = ()  # folders of `trained-networks --keep-parameters`
    shots: int = 100  # training images of each class
    held_out: int = 20  # of them, to choose the learning rate and the weight decay with
    learning_rates: tuple[float, ...] = (0.01, 0.025, 0.1)  # to choose from
    weight_decays: tuple[float, ...] = (3e-4, 1e-3)  # to choose from
    recipe: Recipe = Recipe()
    noise: float = 0.0  # on predicted kernels (`add_noise`): 3e-5 in the authors' later recipe
    orthogonal_from: int | None = None  # tiled kernels from this one on are made orthogonal
    seeds: int = 3  # runs, whose mean and standard deviation are given
    out: Path = Path("runs/few_shot")  # folder for records and the table


def quick() -> Config:
    """One small network on digits: a minute on two cores."""
    return Config(
        dataset="digits", networks=("DARTS",), width=8, shots=20, held_out=5,
        learning_rates=(0.025, 0.1), weight_decays=(3e-4,),
        recipe=Recipe(epochs=10, batch_size=32), seeds=2,
        out=Path("runs/quick/few_shot"),
    )  # fmt: skip


def take_shots(images: Images, first: int, last: int) -> Images:
    """Images number `first` to `last` of each class, in the order of the file.

    Raises:
      ValueError: a class has fewer; or the images are not in memory.
    """
    if images.labels is None or images.pixels is None:
        raise ValueError(f"shots are taken of images in memory; {images.name}'s are too large")
    rank = np.empty(len(images), int)
    for label in range(images.num_classes):
        (found,) = np.nonzero(images.labels == label)
        if len(found) < last:
            raise ValueError(f"{last} shots are asked for, but class {label} of {images.name} has "
                             f"{len(found)} images")  # fmt: skip
        rank[found] = np.arange(len(found))
    chosen = (rank >= first) & (rank < last)
    return dataclasses.replace(images, pixels=images.pixels[chosen], labels=images.labels[chosen])


def _with_classifier(trained: Mapping, fresh: Mapping, classes: int, origin: str) -> Mapping:
    """Trained parameters; but the classifier's of `fresh`, if it was one of other classes.

    Args:
      trained, fresh: `params` trees.
      classes: how many `fresh` tells apart.
      origin: of `trained`, for the error.

    Raises:
      ValueError: the trees are not of the same network.
    """
    if jax.tree.structure(fresh) != jax.tree.structure(trained):
        raise ValueError(f"{origin} has other parameters than the network; train the same network")

    def chosen(keys, new, old):
        if new.shape == old.shape:
            return old
        if new.shape[:-1] == old.shape[:-1] and new.shape[-1] == classes:
            return new
        raise ValueError(
            f"{origin}: {'.'.join(key.key for key in keys)} has the shape {old.shape}, but "
            f"{new.shape} is needed; train the same network, with the same --width and --image-size"
        )

    return jax.tree.map_with_path(chosen, fresh, trained)


def check(config: Config, images: Images) -> None:
    """Raises ValueError for options that cannot work, before any long work."""
    config.recipe.check()
    if not 0 < config.held_out < config.shots:
        raise ValueError(f"--held-out is {config.held_out}; allowed: 1 to {config.shots - 1}, some "
                         "of the shots")  # fmt: skip
    if config.seeds < 1:
        raise ValueError(f"--seeds is {config.seeds}; use 1 or more")
    if not config.learning_rates or not config.weight_decays:
        raise ValueError("give at least one learning rate and one weight decay")
    take_shots(images, 0, config.shots)
    kept = take_shots(images, 0, config.shots - config.held_out)
    steps_per_epoch(kept, config.recipe.batch_size)


def run(config: Config) -> list[dict]:
    """Fine-tunes what has no record yet; writes the table; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    source = {"data_dir": config.data_dir, "image_size": config.image_size}
    shots = load_images(config.dataset, "train", **source)
    check(config, shots)
    networks = by_name(config.networks, config.width)
    for _, network in networks:
        check_recipe(config.recipe, network)
    test = load_images(config.dataset, "test", **source)
    kept = take_shots(shots, 0, config.shots - config.held_out)
    held = take_shots(shots, config.shots - config.held_out, config.shots)
    every = take_shots(shots, 0, config.shots)
    engine = Engine()
    ghns = load_ghns(config.ghn) if config.ghn else {}
    trained = {folder.name: folder for folder in config.trained}
    starts = [HE, *ghns, *trained]
    if len(set(starts)) < 1 + len(ghns) + len(config.trained):
        raise ValueError(f"{', '.join(starts)}: two beginnings have the same name; rename a folder")

    def start(origin: str, name: str, network: Architecture | str, seed: int) -> Mapping:
        module = module_of(network, test.task)
        if origin not in ghns:
            fresh = random_parameters(module, test.image_size, seed)
            if origin == HE:
                return fresh
            file = existing_file(trained[origin], name)
            return _with_classifier(read_parameters(file), fresh, test.num_classes, str(file))
        # A hypernetwork for another number of classes leaves the classifier as it is initialised.
        sample = jax.ShapeDtypeStruct((1, test.image_size, test.image_size, 3), jnp.float32)
        variables, report = predict_model(*ghns[origin], module, sample, seed=seed)
        if config.noise:
            variables = add_noise(variables, report, beta=config.noise, seed=seed)
        if config.orthogonal_from is not None:
            kernels = tiled_kernels(report)[config.orthogonal_from :]
            variables = orthogonalise(variables, report, kernels)
        return variables["params"]

    def train(network, params, recipe: Recipe, images: Images, tested: Images, seed: int) -> float:
        training = training_of(engine, network, recipe, images, seed)
        record = train_network(
            training, params, recipe, images, {"test": tested}, report_epochs=(), seed=seed,
            report=lambda epoch, top1: bar.update(),
        )  # fmt: skip
        return record["final_test_top1"]

    for origin, (name, network) in itertools.product(trained, networks):
        start(origin, name, network, 0)  # what is missing or does not fit is said now
    without = ("data_dir", "networks", "ghn", "trained", "seeds", "out")
    files = {
        f"{name} from {origin}": existing_file(folder, name)
        for origin, folder in trained.items()
        for name, _ in networks
    }
    settings = describe("few_shot", config, without=without)
    records = Records.open(config.out, settings, ghns=ghns, trained=files)
    grid = list(itertools.product(config.learning_rates, config.weight_decays))
    todo = [(f"{name} from {origin}", functools.partial(start, origin, name, network), network)
            for name, network in networks for origin in starts]  # fmt: skip
    runs = sum(
        (f"{title}, tuned" not in records) * len(grid)
        + sum(f"{title}, seed {seed}" not in records for seed in range(config.seeds))
        for title, *_ in todo
    )
    total = runs * config.recipe.epochs
    with tqdm(total=total, unit="epoch", desc="fine-tuning", dynamic_ncols=True) as bar:
        for title, begin, network in todo:
            bar.set_postfix_str(title)
            tuned = f"{title}, tuned"
            if tuned not in records:
                tops, params = [], begin(0)
                for rate, decay in grid:
                    recipe = dataclasses.replace(
                        config.recipe, learning_rate=rate, weight_decay=decay
                    )
                    tops.append(train(network, params, recipe, kept, held, 0))
                best = int(np.argmax(tops))
                records.add({"name": tuned, "learning_rate": grid[best][0],
                             "weight_decay": grid[best][1], "held_out_top1": tops})  # fmt: skip
            recipe = dataclasses.replace(
                config.recipe,
                learning_rate=records[tuned]["learning_rate"],
                weight_decay=records[tuned]["weight_decay"],
            )
            for seed in range(config.seeds):
                key = f"{title}, seed {seed}"
                if key not in records:
                    top1 = train(network, begin(seed), recipe, every, test, seed)
                    records.add({"name": key, "test_top1": top1})
    text = table(records, starts, config)
    write_beside(config.out / "table.md", text)
    print(text)
    return list(records.values())


def table(records: Records, starts: Sequence[str], config: Config) -> str:
    """Test accuracy, mean and standard deviation over seeds, as in Table 6: Markdown."""
    names = config.networks
    lines = ["| from | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for origin in starts:
        cells = []
        for name in names:
            keys = [f"{name} from {origin}, seed {seed}" for seed in range(config.seeds)]
            tops = [records[key]["test_top1"] for key in keys]
            cells.append(f"{np.mean(tops):.1%} ± {np.std(tops):.1%}")
        lines.append(f"| {origin} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
