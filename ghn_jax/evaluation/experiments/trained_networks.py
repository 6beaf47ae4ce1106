r"""Networks trained by SGD or Adam (paper Tables 3 and 4, lower halves; § 5).

    ghn-paper trained-networks --dataset cifar10 --data-dir DIR --split test --out runs/sgd
    ghn-paper trained-networks --quick

Trains the networks of a split, or named ones, from random parameters (or from predicted ones, with
--ckpt), and takes what § 5.2 predicts: accuracy on clean and on noisy images, seconds of inference,
and how soon training has converged. Writes one record for each network. What is there is not
computed again, and a network that was interrupted goes on at the epoch where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ghn_jax.data.augment import cut_out
from ghn_jax.data.images import Images, load_images, prefetch, steps_per_epoch, train_batches
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.sampling import seeded
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import (
    count_correct,
    full_batches,
    predict_network,
    random_parameters,
    summary,
)
from ghn_jax.evaluation.experiments.cluster import ClusterConfig, run_units
from ghn_jax.evaluation.experiments.kept_parameters import parameters_file, write_parameters
from ghn_jax.evaluation.experiments.predicted_networks import load_ghns_for
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.experiments.saved_state import SavedState
from ghn_jax.evaluation.module_training import ModuleTraining
from ghn_jax.evaluation.network_training import NetworkTraining
from ghn_jax.evaluation.networks import Named, by_name, module_of, of_file, of_split
from ghn_jax.evaluation.recipe import Recipe

NEVER = 2.0  # convergence of a network that did not, as in the authors' results


@dataclasses.dataclass(frozen=True)
class Config:
    """Which networks are trained, how, and on what."""

    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    split: str = "test"  # val, test, wide, deep, dense, bnfree, predefined
    start: int = 0  # first network of the split
    stop: int | None = None  # one behind the last; default: all
    networks: tuple[str, ...] = ()  # these in place of a split: DARTS PDARTS ViT resnet50 ...
    nets: Path | None = None  # file with networks: HDF5 as the official ones, or JSON, name -> one
    width: int | None = None  # initial channels; default: each architecture's own
    recipe: Recipe = Recipe()
    report_epochs: tuple[int, ...] = (1, 5, 10, 20, 30, 40, 50)  # when accuracies are taken
    noise: float = 0.08  # standard deviation of noise on images from 0 to 1; ImageNet 0.18
    ckpt: Path | None = None  # hypernetwork whose predicted parameters training starts from
    seed: int = 0  # of parameters and images
    keep_parameters: bool = False  # write trained parameters into `out`, a safetensors file each
    at_once: int = 1  # networks that train at once, where one does not fill the device
    cluster: ClusterConfig = ClusterConfig()
    unit: str = ""  # names the file of records, where several processes share `out`
    out: Path = Path("runs/trained_networks")  # folder for records, table and figure


def quick() -> Config:
    """24 small networks on digits, half of them for `properties` to fit to: some minutes."""
    recipe = Recipe(epochs=4, batch_size=64)
    return Config(
        dataset="digits", stop=24, width=8, recipe=recipe, report_epochs=(1, 2, 4),
        out=Path("runs/quick/trained_networks"),
    )  # fmt: skip


# --- One network ----------------------------------------------------------------------------------


def check_recipe(recipe: Recipe, network: Architecture | str) -> None:
    """Raises ValueError for a model of the zoo with drop path or an auxiliary head."""
    if isinstance(network, str) and (recipe.auxiliary or recipe.drop_path):
        raise ValueError(
            f"{network} is no network of the design space, which drop path and the auxiliary head "
            "are for; set both to 0"
        )


def training_of(
    engine: Engine, network: Architecture | str, recipe: Recipe, images: Images, seed: int
) -> NetworkTraining | ModuleTraining:
    """Updates of a network by a recipe.

    Raises:
      ValueError: a model of the zoo with drop path or an auxiliary head.
    """
    optimizer = recipe.optimizer(steps_per_epoch(images, recipe.batch_size))
    options: dict[str, Any] = dict(clip=recipe.clip, smoothing=recipe.smoothing, seed=seed)
    check_recipe(recipe, network)
    if isinstance(network, Architecture):
        return NetworkTraining(
            engine, network, optimizer,
            batch_size=recipe.batch_size, num_classes=images.num_classes,
            image_size=images.image_size, drop_path=recipe.drop_path > 0,
            auxiliary=recipe.auxiliary, **options,
        )  # fmt: skip
    module = module_of(network, images.task)
    return ModuleTraining(module, optimizer, image_size=images.image_size, **options)


def noisy(batch: np.ndarray, images: Images, std: float, seed) -> np.ndarray:
    """Normalised images with Gaussian noise: added to values from 0 to 1, which are clipped."""
    mean, scale = np.float32(images.mean), np.float32(images.std)
    noise = np.random.default_rng(seed).standard_normal(batch.shape, np.float32) * np.float32(std)
    return (np.clip(batch * scale + mean + noise, 0, 1) - mean) / scale


def accuracy(training, state, images: Images, batch_size: int, noise: float = 0.0) -> float:
    """Top-1 on a set of images, batch norm on running averages."""
    correct = []
    batch_size = min(batch_size, len(images))
    for i, (x, labels, counted) in enumerate(full_batches(images, batch_size)):
        x = noisy(x, images, noise, [i]) if noise else x
        correct.append(count_correct(training.logits(state, x), labels, counted))
    return float(np.sum(jax.device_get(correct), 0)[0] / len(images))


def convergence(top1: list[float], epochs: int, level: float = 0.95) -> float:
    """The share of all epochs after which training top-1 is at a level; `NEVER` if it is not."""
    reached = (i for i, value in enumerate(top1, 1) if value >= level)
    return next((i / epochs for i in reached), NEVER)


def _epochs(images: Images, recipe: Recipe, seed: int, first: int) -> Iterator[Iterator]:
    """The batches of each epoch, from one on."""
    steps = steps_per_epoch(images, recipe.batch_size)
    batches = prefetch(
        train_batches(images, recipe.batch_size, seed=seed, start_step=first * steps)
    )
    for _ in range(first, recipe.epochs):
        yield itertools.islice(batches, steps)


def train_network(
    training: NetworkTraining | ModuleTraining,
    params,
    recipe: Recipe,
    images: Images,
    tests: Mapping[str, Images],
    *,
    report_epochs: tuple[int, ...],
    noise: float = 0.0,
    seed: int = 0,
    saved: SavedState | None = None,
    keep: Callable[[Mapping], None] = lambda params: None,
    report: Callable[[int, float], None] = lambda epoch, top1: None,
) -> dict:
    """Trains a network and takes its properties.

    Args:
      training: of the network (`training_of`).
      params: that it starts from.
      recipe: how it is trained.
      images: to train on.
      tests: name -> images to test on, 'val' among them if properties are wanted.
      report_epochs: when accuracies are taken; after the last epoch in any case.
      noise: standard deviation of the noise on 'val' images; 0 for none.
      seed: of the order of images and their augmentation.
      saved: where the state is kept after each epoch.
      keep: called with the trained parameters.
      report: called after each epoch with its number and training top-1.

    Returns:
      Its losses and training top-1 by epoch; `<test>_top1` by epoch; `val_top1_noise`;
      `inference_seconds` for all of 'val'; `convergence`; `seconds` of training.
    """
    state = training.init(params)
    record: dict[str, Any] = {"loss": [], "train_top1": [], "seconds": 0.0}
    record |= {f"{name}_top1": {} for name in tests}
    if saved is not None and (found := saved.load(state)) is not None:
        state, record = found
    first = recipe.epochs if "diverged" in record else len(record["loss"])
    for epoch, batches in enumerate(_epochs(images, recipe, seed, first), first):
        start = time.perf_counter()
        losses, right = [], []
        for step, (x, labels) in enumerate(batches):
            if recipe.cutout:
                x = cut_out(x, recipe.cutout, np.random.default_rng([seed, epoch, step]))
            drop_path = recipe.drop_probability(epoch)
            state, loss, top1 = training.step(state, x, labels, drop_path=drop_path)
            losses.append(loss)
            right.append(top1)
            if len(losses) % 8 == 0:  # so that not all updates of an epoch are queued at once
                jax.block_until_ready(losses[-8])
        record["loss"].append(float(np.mean(jax.device_get(losses))))
        record["train_top1"].append(float(np.mean(jax.device_get(right))))
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 2)
        if epoch + 1 in report_epochs or epoch + 1 == recipe.epochs:
            for name, some in tests.items():
                value = accuracy(training, state, some, recipe.batch_size)
                record[f"{name}_top1"][str(epoch + 1)] = value
        if not np.isfinite(record["loss"][-1]):  # it stays so
            record["diverged"] = epoch + 1
        if saved is not None:
            saved.save(state, record)
        report(epoch + 1, record["train_top1"][-1])
        if "diverged" in record:
            break
    if "val" in tests:
        val = tests["val"]
        if noise:
            record["val_top1_noise"] = accuracy(training, state, val, recipe.batch_size, noise)
        start = time.perf_counter()  # programs are compiled by now
        accuracy(training, state, val, recipe.batch_size)
        record["inference_seconds"] = round(time.perf_counter() - start, 4)
    keep(training.params(state))
    record["convergence"] = convergence(record["train_top1"], recipe.epochs)
    for name in tests:
        values = list(record[f"{name}_top1"].values())
        chance = 1 / images.num_classes
        record[f"final_{name}_top1"] = values[-1] if "diverged" not in record else chance
    return record


# --- The experiment -------------------------------------------------------------------------------


def settings(config: Config) -> dict:
    """What the records depend on."""
    where = ("data_dir", "split", "start", "stop", "networks", "nets", "at_once", "cluster", "unit",
             "keep_parameters")  # fmt: skip
    return describe("trained_networks", config, without=(*where, "out"))


def _images(config: Config, split: str) -> Images:
    return load_images(
        config.dataset, split, data_dir=config.data_dir, image_size=config.image_size
    )


def networks(config: Config, image_size: int) -> list[Named]:
    """Those that are to be trained."""
    if config.networks:
        found = by_name(config.networks, config.width)
    elif config.nets is not None and config.nets.suffix == ".json":
        found = of_file(config.nets, config.width)
    else:
        return of_split(
            config.split, config.start, config.stop,
            image_size=image_size, width=config.width, nets=config.nets,
        )  # fmt: skip
    return found[config.start : config.stop]


def run(config: Config) -> list[dict]:
    """Trains what has no record yet; writes a table and a figure; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    config.recipe.check()
    if config.at_once < 1:
        raise ValueError(f"--at-once is {config.at_once}; use 1 or more")
    train = _images(config, "train")
    steps_per_epoch(train, config.recipe.batch_size)
    todo = networks(config, train.image_size)
    for _, network in todo:
        check_recipe(config.recipe, network)
    ghns = {} if config.ckpt is None else load_ghns_for([config.ckpt], train)
    records = Records.open(config.out, settings(config), config.unit, ghns=ghns)
    _check_architectures(todo, records, config.out)
    if config.cluster.cluster is not None:
        run_units(run, config, config.start, config.start + len(todo))
        return _finish(config, todo, Records.open(config.out, settings(config), ghns=ghns))
    tests = {part: _images(config, part) for part in ("val", "test")}
    ghn = next(iter(ghns.values()), None)
    missing = [
        (name, network)
        for name, network in todo
        if name not in records
        or (config.keep_parameters and not parameters_file(config.out, name).exists())
    ]
    engine = Engine()

    def one(name: str, network: Architecture | str) -> dict:
        training = training_of(engine, network, config.recipe, train, config.seed)
        if ghn is None:
            module = module_of(network, train.task)
            # Of its own: networks whose parameters have equal names would start from equal numbers.
            seed = int(seeded(f"initial parameters, {name}", config.seed, 0).integers(2**31))
            params = random_parameters(module, train.image_size, seed)
        else:
            params = predict_network(*ghn, network, train.image_size)[1]
        epochs.set_postfix_str(name)

        def keep(params: Mapping) -> None:
            if config.keep_parameters:
                write_parameters(parameters_file(config.out, name), params)

        saved = SavedState(config.out / "states" / name)
        record = train_network(
            training, params, config.recipe, train, tests, report_epochs=config.report_epochs,
            noise=config.noise, seed=config.seed, saved=saved,
            keep=keep, report=lambda epoch, top1: epochs.update(),
        )  # fmt: skip
        count = sum(x.size for x in jax.tree.leaves(params))
        records.add(
            {"name": name, "architecture": _described(network), "parameters": count, **record}
        )
        saved.remove()
        return record

    total = len(missing) * config.recipe.epochs
    with tqdm(total=total, unit="epoch", desc="training", dynamic_ncols=True) as epochs:
        pool = ThreadPoolExecutor(config.at_once)
        try:
            list(pool.map(lambda pair: one(*pair), missing))
        finally:  # after an error no other network is begun
            pool.shutdown(cancel_futures=True)
    return _finish(config, todo, records)


def _described(network: Architecture | str) -> str | dict:
    """What a record says of a network, JSON-ready."""
    return network if isinstance(network, str) else json.loads(json.dumps(network.to_dict()))


def _check_architectures(networks: list[Named], records: Records, folder: Path) -> None:
    """Raises ValueError where a record is of another network of the same name."""
    for name, network in networks:
        if name in records and records[name]["architecture"] != _described(network):
            raise ValueError(
                f"{folder} has a record of another network that is called {name}; give another "
                "folder, or rename it"
            )


def _finish(config: Config, todo: list[Named], records: Records) -> list[dict]:
    """The records, after their table and figure; a unit of a cluster leaves these to the others."""
    found = [records[name] for name, _ in todo if name in records]
    if not config.unit:
        write_beside(config.out / "table.md", table(found))
        from ghn_jax.plot.experiments import epoch_curves  # matplotlib is of an extra

        epoch_curves(found, config.out / "training.png")
        print(table(found))
    return found


def table(records: list[dict]) -> str:
    """Mean test accuracy after some epochs, as in Table 3: Markdown."""
    epochs = sorted({int(e) for r in records for e in r["test_top1"]})
    lines = ["| networks | epochs | test top-1 | standard error | best |", "|---|---|---|---|---|"]
    for epoch in epochs:
        rows = [{"top1": r["test_top1"][str(epoch)]} for r in records
                if str(epoch) in r["test_top1"]]  # fmt: skip
        mean, error, best = summary(rows)
        lines.append(f"| {len(rows)} | {epoch} | {mean:.1%} | {error:.1%} | {best:.1%} |")
    return "\n".join(lines) + "\n"
