r"""Variance of activations under predicted parameters (paper § B.2.2, Fig. 8).

    ghn-paper activations --ghn runs/ghn2 runs/ghn1 --trained runs/sgd --dataset cifar10 \
        --data-dir DIR --out runs/activations
    ghn-paper activations --quick

A batch of test images goes through ResNet-50 with parameters from the beginning and from the end of
each hypernetwork's training; random (He) parameters, and with `--trained` those that `ghn-paper
trained-networks --keep-parameters` wrote, stand beside. The paper does not say whether its layers
end before or behind batch norm; both are drawn. Without `--ghn`, a GHN-2 and a GHN-1 are looked at
before their training only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ghn_jax.data.images import eval_batches, load_images
from ghn_jax.evaluation.accuracy import predict_network, random_parameters
from ghn_jax.evaluation.activations import LayerStatistics, recorder
from ghn_jax.evaluation.experiments.kept_parameters import existing_file, read_parameters
from ghn_jax.evaluation.experiments.predicted_networks import load_ghns_for
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.networks import by_name, module_of
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.ghn import GHN, ghn1
from ghn_jax.hypernet.identity_start import near_identity

BEGIN, TRAINED = "begin", "trained"
HE, SGD = f"SGD, {BEGIN} (He)", f"SGD, {TRAINED}"
ALIKE = 2.0  # variances within this factor are called alike
EXPLODES = 10.0  # a variance this many times He's largest is said to explode
# The only number that the paper has is the largest of GHN-1's, read off the linear axis.
PAPER = f"GHN-1, {TRAINED}, the paper", 200.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Whose activations are looked at, and on what."""

    ghn: tuple[Path, ...] = ()  # folders, files or names; default: two untrained ones
    trained: Path | None = None  # folder of `trained-networks --keep-parameters`
    network: str = "resnet50"  # DARTS, PDARTS, ViT, the zoo's
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    batch_size: int = 64  # test images
    layers: int = 18  # the first ones
    seed: int = 0  # of random parameters, and of hypernetworks whose folder does not tell theirs
    out: Path = Path("runs/activations")  # folder for records, table and figures


def quick() -> Config:
    """ResNet-50 on digits of 32 pixels, hypernetworks before training: a minute on two cores."""
    return Config(dataset="digits", image_size=32, batch_size=32,
                  out=Path("runs/quick/activations"))  # fmt: skip


def _start(source: Path, seed: int) -> tuple[int, float] | None:
    """The seed and the identity that a run started with, as far as its folder tells.

    Args:
      source: of a hypernetwork: a folder, a file or a name.
      seed: if the folder does not tell its own.

    Returns:
      Both; None of a file, and where the run went on from another hypernetwork.
    """
    training = Checkpoints(source).config().get("training", {}) if source.is_dir() else None
    if training is None or training.get("model", training).get("init") is not None:
        return None
    return training.get("run", training).get("seed", seed), training.get("identity", 0.0)


def _begin(ghn: GHN, seed: int, identity: float) -> dict:
    """The variables of a hypernetwork before its training."""
    params = ghn.init_variables(seed)["params"]
    return {"params": near_identity(ghn, params, identity)}


def _hypernetworks(
    config: Config, loaded: Mapping[str, tuple[GHN, dict]], num_classes: int
) -> dict[str, tuple[GHN, Callable[[], Any]]]:
    """Name of a curve -> a hypernetwork, and what makes its variables.

    Args:
      config: of the experiment.
      loaded: the hypernetworks of `config.ghn` by name.
      num_classes: of those that are made where there are none.
    """
    if not loaded:
        both = {"GHN-2": GHN(num_classes), "GHN-1": ghn1(num_classes)}
        return {
            f"{name}, {BEGIN}": (ghn, lambda ghn=ghn: ghn.init_variables(config.seed))
            for name, ghn in both.items()
        }
    found: dict[str, tuple[GHN, Callable[[], Any]]] = {}
    for folder, (name, (ghn, variables)) in zip(config.ghn, loaded.items(), strict=True):
        if (start := _start(folder, config.seed)) is None:
            print(f"{name} does not tell where its training began: that is left out")
        else:
            found[f"{name}, {BEGIN}"] = ghn, functools.partial(_begin, ghn, *start)
        found[f"{name}, {TRAINED}"] = ghn, lambda variables=variables: variables
    return found


def run(config: Config) -> list[dict]:
    """Looks at what has no record yet; writes the table and figures; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    for name in ("batch_size", "layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; allowed: 1 "
                             "or more")  # fmt: skip
    ((_, network),) = by_name([config.network])
    file = config.trained and existing_file(config.trained, config.network)
    images = load_images(
        config.dataset, "test", data_dir=config.data_dir, image_size=config.image_size
    )
    loaded = load_ghns_for(config.ghn, images) if config.ghn else {}
    ghns = _hypernetworks(config, loaded, images.num_classes)
    settings = describe(
        "activations", config, without=("ghn", "trained", "data_dir", "layers", "out")
    )
    trained = {SGD: file} if file else {}
    records = Records.open(config.out, settings, ghns=loaded, trained=trained)
    batch, _ = next(iter(eval_batches(images, min(config.batch_size, len(images)))))
    module = module_of(network, images.task)
    statistics = recorder(module)

    def predicted(ghn: GHN, variables: Callable[[], Any]) -> Mapping:
        return predict_network(ghn, variables(), network, images.image_size)[1]

    curves: dict[str, Callable[[], Mapping]] = {
        HE: lambda: random_parameters(module, images.image_size, config.seed)
    }
    if file:
        curves[SGD] = lambda: read_parameters(file)
    for name, pair in ghns.items():
        curves[name] = lambda pair=pair: predicted(*pair)
    todo = [name for name in curves if name not in records]
    for name in tqdm(todo, unit="network", dynamic_ncols=True, disable=not todo):
        layers = statistics({"params": curves[name]()}, batch)
        records.add({"name": name, "layers": [dataclasses.asdict(layer) for layer in layers]})
    found = {name: _layers(records[name]) for name in curves}
    normalises = {name: ghn.normalise for name, (ghn, _) in ghns.items()}
    from ghn_jax.plot.activations import activation_figure  # matplotlib is of an extra

    text = ""
    for what, file_name, normalised in (
        ("that no norm reads", "activations.png", False),
        ("that a norm reads", "activations_before_norm.png", True),
    ):
        first = {
            name: [layer for layer in layers if layer.normalised == normalised][: config.layers]
            for name, layers in found.items()
        }
        if all(first.values()):
            activation_figure(first, config.out / file_name)
            text += f"Layers {what}:\n\n{table(first)}\n{claims(first, normalises)}\n"
    if not config.ghn:
        text += "No --ghn was given: nothing can be said about the end of training.\n"
    write_beside(config.out / "table.md", text)
    print(text)
    return [records[name] for name in curves]


def _layers(record: Mapping) -> list[LayerStatistics]:
    return [LayerStatistics(**layer) for layer in record["layers"]]


def table(curves: Mapping[str, Sequence[LayerStatistics]]) -> str:
    """Markdown: variances of the first layers, the paper's largest below ours."""
    lines = [
        "| parameters | layers | variance, least | median | largest |",
        "|---|---|---|---|---|",
    ]
    for name, layers in curves.items():
        v = [layer.variance for layer in layers]
        numbers = " | ".join(f"{x:.3g}" for x in (np.min(v), np.median(v), np.max(v)))
        lines.append(f"| {name} | {len(v)} | {numbers} |")
    lines.append(f"| {PAPER[0]} | 18 | – | – | about {PAPER[1]:.0f} |")
    return "\n".join(lines) + "\n"


def claims(curves: Mapping[str, Sequence[LayerStatistics]], normalises: Mapping[str, bool]) -> str:
    """Which of the paper's observations hold, a sentence each.

    Args:
      curves: as drawn.
      normalises: name of a hypernetwork's curve -> whether it normalises what it predicts (GHN-2).
    """
    he = np.array([layer.variance for layer in curves[HE]])
    text = ""
    for name, normalise in normalises.items():
        ours = np.array([layer.variance for layer in curves[name]])
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.exp(np.abs(np.log(ours / he)))
        worst = float(np.max(factors)) if np.isfinite(factors).all() else math.inf
        median = float(np.median(ours / he))
        begins = name.endswith(BEGIN)
        if begins and normalise:
            text += _claim(f"{name}: activations are those of He initialisation", worst <= ALIKE,
                           f"up to {worst:.2g} times apart")  # fmt: skip
        elif begins:
            text += _claim(f"{name}: activations are small", median < 1 / ALIKE,
                           f"{median:.2g} times He's variance in the median")  # fmt: skip
        elif not normalise:
            largest = float(np.max(ours)) / he.max()
            text += _claim(f"{name}: activations explode", not largest < EXPLODES,
                           f"the largest variance is {largest:.3g} times He's")  # fmt: skip
        else:
            # Less than He's, but more than those of the network that SGD has trained.
            above = SGD not in curves or median > np.median(
                [layer.variance for layer in curves[SGD]] / he
            )
            text += _claim(f"{name}: activations have decreased, by less than SGD's",
                           bool(median < 1 and above),
                           f"{median:.2g} times He's variance in the median")  # fmt: skip
    return text


def _claim(what: str, holds: bool, numbers: str) -> str:
    return f"{what}: {'holds' if holds else 'does not hold'} ({numbers}).\n"
