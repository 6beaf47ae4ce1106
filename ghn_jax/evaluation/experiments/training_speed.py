r"""How fast hypernetworks are trained (paper § C.4, Table 13).

    ghn-paper training-speed --out runs/training_speed           # on the devices that there are
    ghn-paper training-speed --quick

Seconds of an update and hours of an epoch, of hypernetworks by their number of architectures in an
update (b_m), and of a single ResNet-50 trained by SGD. Updates are made as `ghn-train` makes them,
on images of noise of a dataset's size: what is in them takes no time. Compiling is counted apart.
All devices of this process share the images; runs that share architectures out between processes
(`ghn-train --mesh`) log their own seconds in `metrics.jsonl`.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.module_training import ModuleTraining
from ghn_jax.evaluation.networks import by_name, module_of
from ghn_jax.evaluation.recipe import Recipe
from ghn_jax.training.config import PRESETS, TrainConfig, demo, preset
from ghn_jax.training.mesh import DATA, make_mesh, networks_at_once
from ghn_jax.training.meta_batch import Stream
from ghn_jax.training.update import MetaStep


class Dataset(NamedTuple):
    """What an update and an epoch depend on.

    Attributes:
      task: classes and size of images.
      images: that an epoch has.
      batch_size: images in an update.
    """

    task: Task
    images: int
    batch_size: int


DATASETS = {
    "cifar10": Dataset(Task(10, 32), 45_000, 64),
    "imagenet2012": Dataset(Task(1000, 224), 1_231_167, 256),
    "digits": Dataset(Task(10, 16), 1_157, 32),
}
SINGLE = "single network"
# (model, b_m, number of GPUs) -> dataset -> seconds of an update, on V100s; None: out of memory.
PAPER: dict[tuple[str, int, int], dict[str, float | None]] = {
    (SINGLE, 1, 1): {"cifar10": 0.10, "imagenet2012": 0.77},
    ("mlp", 1, 1): {"cifar10": 0.32, "imagenet2012": 0.67},
    ("ghn2", 1, 1): {"cifar10": 1.16, "imagenet2012": 1.54},
    ("ghn2", 8, 1): {"cifar10": 7.17, "imagenet2012": None},
    ("ghn2", 8, 4): {"cifar10": 4.62, "imagenet2012": 5.53},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    models: tuple[str, ...] = ("mlp", "ghn1", "ghn2")  # presets of `ghn-train`
    meta_batches: tuple[int, ...] = (1, 8)  # architectures in an update
    network: str | None = "resnet50"  # trained alone, by SGD: DARTS, PDARTS, ViT, the zoo's
    dataset: str = "cifar10"  # whose images' size and number: cifar10, imagenet2012 or digits
    updates: int = 20  # that the median is over
    small: bool = False  # the demonstration's narrow networks
    dtype: Literal["float32", "bfloat16"] = "float32"  # of networks' activations
    seed: int = 0  # of architectures and images
    out: Path = Path("runs/training_speed")  # folder for records and the table


def quick() -> Config:
    """Narrow networks on images as digits, a few updates: some minutes on two cores."""
    return Config(models=("mlp", "ghn2"), meta_batches=(1, 2), network=None, dataset="digits",
                  updates=3, small=True, out=Path("runs/quick/training_speed"))  # fmt: skip


def check(config: Config) -> None:
    """Raises ValueError for options that cannot work, before any long work."""
    for name, given, allowed in (
        ("models", config.models, PRESETS), ("dataset", [config.dataset], DATASETS)
    ):  # fmt: skip
        unknown = [x for x in given if x not in allowed]
        if unknown:
            raise ValueError(f"--{name} has {unknown[0]!r}; allowed: {', '.join(allowed)}")
    if config.updates < 1 or min(config.meta_batches, default=1) < 1:
        sizes = " ".join(map(str, config.meta_batches))
        raise ValueError(f"--updates is {config.updates} and --meta-batches {sizes}; allowed: 1 or "
                         "more")  # fmt: skip
    if config.network is not None:
        by_name([config.network])
    devices, images = make_mesh().shape[DATA], DATASETS[config.dataset].batch_size
    if images % devices:
        raise ValueError(f"{images} images cannot be divided between {devices} devices; hide some "
                         "of them (CUDA_VISIBLE_DEVICES)")  # fmt: skip


def _train_config(config: Config, model: str, meta_batch: int) -> TrainConfig:
    options, space = preset(model), demo().space
    if config.small:
        options = dataclasses.replace(
            options.replace(tile_channels=demo().model.tile_channels), space=space
        )
    return options.replace(
        meta_batch=meta_batch, seed=config.seed, batch_size=DATASETS[config.dataset].batch_size,
        dtype=config.dtype,
    )  # fmt: skip


def _noise(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """A batch of images and labels."""
    (classes, size), _, batch = DATASETS[config.dataset]
    rng = np.random.default_rng(config.seed)
    images = rng.standard_normal((batch, size, size, 3), np.float32)
    return images, rng.integers(0, classes, batch).astype(np.int32)


def timed(make: Callable[[Any, int], tuple[Any, Any]], state: Any, updates: int) -> list[float]:
    """Seconds of updates as a training loop makes them: it reads what one left an update later.

    Args:
      make: (state, number of an update) -> state, and what it leaves to be read.
      state: before the first.
      updates: how many.
    """
    seconds, before = [], None
    start = time.perf_counter()
    for i in range(updates + 1):
        left = None
        if i < updates:
            state, left = make(state, i)
        if before is not None:
            jax.block_until_ready(before)
            now = time.perf_counter()
            seconds.append(now - start)
            start = now
        before = left
    return seconds


def _of_hypernetwork(config: Config, model: str, meta_batch: int, bar: tqdm) -> dict:
    """Times updates of a hypernetwork."""
    options, task = _train_config(config, model, meta_batch), DATASETS[config.dataset].task
    ghn, mesh = options.ghn(task), make_mesh()
    rules = options.space.rules(task.image_size)
    images, labels = _noise(config)
    stream = Stream(
        ghn, lambda i: sample_architecture("train", config.seed, i, rules=rules),
        size=meta_batch, image_size=task.image_size, graph_nodes=options.space.graph_nodes,
        max_nodes=options.space.max_nodes,
    )  # fmt: skip
    counter, began = CompilationCounter(), time.perf_counter()
    step = MetaStep(
        ghn, options.optimiser.make(1000, 300_000), mesh=mesh, seed=config.seed,
        workers=networks_at_once(options.run.workers, mesh), dtype=options.run.dtype,
    )  # fmt: skip
    with closing(step):
        state, prepared, prepare_seconds = step.init(config.seed), [], []
        batches = stream.batches(0)
        for _ in range(config.updates):
            start = time.perf_counter()
            prepared.append(step.prepare(next(batches), len(images)))
            prepare_seconds.append(time.perf_counter() - start)
        for update in prepared:  # every program is compiled and has run once
            state, metrics = step(state, update, images, labels)
            jax.block_until_ready(metrics)
            bar.update()
        warm = time.perf_counter() - began

        def make(state, i):
            state, metrics = step(state, prepared[i], images, labels)
            bar.update()
            return state, metrics

        seconds = timed(make, state, config.updates)
    return {
        "seconds": seconds,
        "prepare_seconds": statistics.median(prepare_seconds),
        "nodes": statistics.mean(update.batch.nodes for update in prepared),
        **_compilation(counter, warm),
    }


def _of_network(config: Config, bar: tqdm) -> dict:
    """Times updates of a single network, compiled as a whole."""
    task, images = DATASETS[config.dataset].task, _noise(config)
    assert config.network is not None
    ((_, network),) = by_name([config.network])
    counter, began = CompilationCounter(), time.perf_counter()
    training = ModuleTraining(
        module_of(network, task), Recipe().optimizer(1000), image_size=task.image_size
    )
    state = training.init()

    def make(state, i):
        state, loss, _ = training.step(state, *images)
        bar.update()
        return state, loss

    for i in range(2):
        state, loss = make(state, i)
        jax.block_until_ready(loss)
    warm = time.perf_counter() - began
    return {"seconds": timed(make, state, config.updates), **_compilation(counter, warm)}


def _compilation(counter: CompilationCounter, warm: float) -> dict:
    """What was compiled: thread-seconds of the compiler, and what passed until all had run once."""
    return {"programs": counter.count, "compile_seconds": counter.seconds, "warm_seconds": warm}


def _devices() -> str:
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def run(config: Config) -> list[dict]:
    """Times what has no record yet; writes the table; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    check(config)
    without = ("models", "meta_batches", "network", "dataset", "out")
    records = Records.open(config.out, describe("training_speed", config, without=without))
    devices = _devices()
    print(f"{devices}, jax {jax.__version__}")
    todo: list[tuple[str, int]] = [] if config.network is None else [(SINGLE, 1)]
    todo += [(model, size) for size in config.meta_batches for model in config.models]
    names = {(m, size): f"{m if m != SINGLE else config.network}, {size}, {config.dataset}, "
             f"{devices}" for m, size in todo}  # fmt: skip
    missing = [key for key in todo if names[key] not in records]
    with tqdm(unit="update", dynamic_ncols=True, disable=not missing) as bar:
        for model, size in missing:
            bar.set_postfix_str(names[model, size])
            try:
                single = model == SINGLE
                found = (
                    _of_network(config, bar) if single
                    else _of_hypernetwork(config, model, size, bar)
                )  # fmt: skip
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                found = {"seconds": None}  # out of memory, as one in the paper's table
            records.add({
                "name": names[model, size], "model": model, "network": config.network,
                "meta_batch": size, "dataset": config.dataset, "devices": devices,
                "count": jax.local_device_count(), **found,
            })  # fmt: skip
    found = [records[names[key]] for key in todo]
    text = table(found)
    write_beside(config.out / "table.md", text)
    print(text)
    return found


def hours(seconds: float, dataset: str) -> float:
    """Of an epoch, given seconds of an update."""
    _, images, batch = DATASETS[dataset]
    return seconds * (images // batch) / 3600


def _cells(seconds: float | None, dataset: str) -> str:
    if seconds is None:
        return "out of memory | –"
    return f"{seconds:.3g} | {hours(seconds, dataset):.2g}"


def table(records: Sequence[Mapping]) -> str:
    """Markdown: Table 13, the paper's numbers below ours."""
    lines = ["| model | b_m | dataset | devices | seconds of an update | hours of an epoch | "
             "slowest update | compiling, seconds |", "|---" * 8 + "|"]  # fmt: skip
    for r in records:
        seconds = r["seconds"]
        median = None if seconds is None else statistics.median(seconds)
        rest = "– | –" if seconds is None else f"{max(seconds):.3g} | {r['compile_seconds']:.0f}"
        model = r["network"] if r["model"] == SINGLE else r["model"]
        lines.append(f"| {model} | {r['meta_batch']} | {r['dataset']} | {r['devices']} | "
                     f"{_cells(median, r['dataset'])} | {rest} |")  # fmt: skip
    for (model, size, count), by_dataset in PAPER.items():
        for dataset in dict.fromkeys(r["dataset"] for r in records):
            if dataset in by_dataset:
                name = "resnet50" if model == SINGLE else model
                lines.append(f"| {name}, the paper | {size} | {dataset} | {count} x V100 | "
                             f"{_cells(by_dataset[dataset], dataset)} | – | – |")  # fmt: skip
    return "\n".join(lines) + "\n"
