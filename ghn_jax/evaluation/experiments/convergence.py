r"""Training from predicted and from random parameters (paper § E, Fig. 13).

    ghn-paper convergence --ghn runs/ghn2 runs/ghn1 --dataset cifar10 --data-dir DIR \
        --out runs/convergence
    ghn-paper convergence --quick

ResNet-50, or another network, is trained on all training images from random (He) parameters and
from those that each hypernetwork predicts. For each of these beginnings, every learning rate and
weight decay is tried; the curve with the best validation accuracy at its end is the one that is
drawn. A run that was interrupted goes on at the epoch where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from ghn_jax.data.images import load_images, steps_per_epoch
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import predict_network, random_parameters
from ghn_jax.evaluation.experiments.predicted_networks import load_ghns_for
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.experiments.saved_state import SavedState
from ghn_jax.evaluation.experiments.trained_networks import (
    check_recipe,
    train_network,
    training_of,
)
from ghn_jax.evaluation.networks import by_name, module_of
from ghn_jax.evaluation.recipe import Recipe

HE = "He"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which network is trained, from what, and how."""

    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    network: str = "resnet50"  # DARTS, PDARTS, ViT, the zoo's
    width: int | None = None  # initial channels of those of the design space; default: 32
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    recipe: Recipe = Recipe()
    learning_rates: tuple[float, ...] = (0.01, 0.025, 0.1)  # to choose from
    weight_decays: tuple[float, ...] = (3e-4, 1e-3)  # to choose from
    seed: int = 0  # of random parameters, images and dropout
    out: Path = Path("runs/convergence")  # folder for records, table and figure


def quick() -> Config:
    """A small network on digits, 8 epochs: a minute or two on two cores."""
    return Config(
        network="DARTS", width=8, dataset="digits", recipe=Recipe(epochs=8, batch_size=64),
        learning_rates=(0.025,), weight_decays=(3e-4,), out=Path("runs/quick/convergence"),
    )  # fmt: skip


def run(config: Config) -> list[dict]:
    """Trains what has no record yet; writes the table and the figure; returns the chosen records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    if not config.learning_rates or not config.weight_decays:
        raise ValueError("give at least one learning rate and one weight decay")
    recipes = [
        dataclasses.replace(config.recipe, learning_rate=rate, weight_decay=decay)
        for rate, decay in itertools.product(config.learning_rates, config.weight_decays)
    ]
    ((_, network),) = by_name([config.network], config.width)
    for recipe in recipes:
        recipe.check()
        check_recipe(recipe, network)
    images, *others = (
        load_images(config.dataset, part, data_dir=config.data_dir, image_size=config.image_size)
        for part in ("train", "val", "test")
    )
    steps_per_epoch(images, config.recipe.batch_size)
    tests = dict(zip(("val", "test"), others, strict=True))
    ghns = load_ghns_for(config.ghn, images)
    if HE in ghns:
        raise ValueError(f"a hypernetwork is called {HE!r}, as the random start is; rename it")
    starts = {HE: None, **ghns}
    without = ("ghn", "data_dir", "learning_rates", "weight_decays", "out")
    records = Records.open(config.out, describe("convergence", config, without=without), ghns=ghns)
    runs = [(f"{start}, {r.learning_rate:g}, {r.weight_decay:g}", start, r)
            for start in starts for r in recipes]  # fmt: skip
    missing = [run for run in runs if run[0] not in records]
    engine, epochs = Engine(), config.recipe.epochs
    with tqdm(
        total=len(missing) * epochs, unit="epoch", desc="training", dynamic_ncols=True,
        disable=not missing,
    ) as bar:  # fmt: skip
        for name, start, recipe in missing:
            bar.set_postfix_str(name)
            if start == HE:
                module = module_of(network, images.task)
                params = random_parameters(module, images.image_size, config.seed)
            else:
                params = predict_network(*starts[start], network, images.image_size)[1]
            training = training_of(engine, network, recipe, images, config.seed)
            saved = SavedState(config.out / "states" / name)
            record = train_network(
                training, params, recipe, images, tests,
                report_epochs=tuple(range(1, epochs + 1)), seed=config.seed, saved=saved,
                report=lambda epoch, top1: bar.update(),
            )  # fmt: skip
            records.add({"name": name, "start": start, "learning_rate": recipe.learning_rate,
                         "weight_decay": recipe.weight_decay, **record})  # fmt: skip
            saved.remove()
    best = [
        max((records[name] for name, of, _ in runs if of == start),
            key=lambda record: record["final_val_top1"])
        for start in starts
    ]  # fmt: skip
    text = f"{table(best)}\n{claims(best)}"
    write_beside(config.out / "table.md", text)
    from ghn_jax.plot.convergence import convergence_figure  # matplotlib is of an extra

    convergence_figure(best, config.out / "convergence.png")
    print(text)
    return best


def _curve(record: Mapping) -> list[float]:
    """Test top-1 after each epoch."""
    return list(record["test_top1"].values())


def table(best: Sequence[Mapping]) -> str:
    """Markdown: test accuracy after some epochs. The paper's numbers are drawn only."""
    last = max(len(_curve(record)) for record in best)
    epochs = [e for e in (1, 2, 3, 5, 10, 20, 30, 50) if e < last] + [last]
    lines = ["| from | learning rate | weight decay | " + " | ".join(f"epoch {e}" for e in epochs)
             + " |", "|---" * (3 + len(epochs)) + "|"]  # fmt: skip
    for record in best:
        curve = _curve(record)  # shorter where training has diverged
        cells = [f"{curve[e - 1]:.1%}" if e <= len(curve) else "–" for e in epochs]
        lines.append(f"| {record['start']} | {record['learning_rate']:g} | "
                     f"{record['weight_decay']:g} | {' | '.join(cells)} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def claims(best: Sequence[Mapping]) -> str:
    """Whether predicted parameters lead at first, and from when random ones do, as in the paper."""
    (he,) = (_curve(record) for record in best if record["start"] == HE)
    text = ""
    for record in best:
        if record["start"] == HE:
            continue
        ahead = [a > b for a, b in zip(_curve(record), he, strict=False)]
        first = next((i for i, x in enumerate(ahead) if not x), len(ahead))
        last = len(ahead) - next((i for i, x in enumerate(reversed(ahead)) if x), len(ahead))
        text += (
            f"From {record['start']}: ahead of {HE} in the first {first} of {len(ahead)} epochs, "
            f"behind or level after epoch {last}; the paper: ahead for about 5, then behind.\n"
        )
    return text
