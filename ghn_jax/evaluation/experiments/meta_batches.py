r"""How the number of architectures in an update changes training (paper § B.2.3, Fig. 9).

    ghn-paper meta-batches --runs runs/ghn2-bm1 runs/ghn2 --out runs/meta_batches
    ghn-paper meta-batches --quick

The training loss of runs of `ghn-train` with several meta-batch sizes b_m, by update and by share
of a run; how much it varies; and the norm of the gradient. Without `--runs`, hypernetworks are
trained here, with smaller meta-batches for longer: all of them see as many architectures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from ghn_jax.data.images import load_images
from ghn_jax.engine.programs import Programs
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.training.config import TrainConfig, preset
from ghn_jax.training.loop import check, train

# Meta-batch size -> mean and standard deviation of the gradient's norm (B.2.3).
PAPER = {1: (7.4, 145.0), 8: (2.7, 18.0)}
POINTS = 200  # of a curve: means over as many parts of a run


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs are compared, or how they are made."""

    runs: tuple[Path, ...] = ()  # folders of `ghn-train`, of several meta-batch sizes
    preset: str = "ghn2"  # of runs that are made here: ghn2, ghn1, mlp or digits
    meta_batches: tuple[int, ...] = (1, 8)  # architectures in an update, of these runs
    epochs: int = 300  # of the run with the largest meta-batches
    steps: int | None = None  # its updates, in place of epochs
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    seed: int = 0  # of parameters, images and architectures
    out: Path = Path("runs/meta_batches")  # folder for runs, records, table and figure


def quick() -> Config:
    """A small hypernetwork, 150 updates of 4 and 600 of one: minutes on two cores."""
    return Config(preset="digits", meta_batches=(1, 4), steps=150, dataset="digits",
                  out=Path("runs/quick/meta_batches"))  # fmt: skip


def _run_config(config: Config, size: int) -> TrainConfig:
    """Options of a run with meta-batches of some size.

    Its learning rate falls at the same shares of it as the longest meta-batches' does.
    """
    made = preset(config.preset)
    longer = max(config.meta_batches) / size
    epochs = round(config.epochs * longer)
    return made.replace(
        dataset=config.dataset, data_dir=config.data_dir, image_size=config.image_size,
        meta_batch=size, epochs=epochs,
        steps=None if config.steps is None else round(config.steps * longer),
        decay_epochs=tuple(round(e * epochs / made.data.epochs)
                           for e in made.optimiser.decay_epochs),
        seed=config.seed, out=config.out / f"bm{size}",
    )  # fmt: skip


def _train(config: Config) -> tuple[Path, ...]:
    """Makes the runs that have no record yet, or goes on with them; returns their folders."""
    sizes = config.meta_batches
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ValueError(f"--meta-batches is {' '.join(map(str, sizes))!r}; allowed: different "
                         "numbers from 1")  # fmt: skip
    made = [_run_config(config, size) for size in sizes]
    records = Records.open(
        config.out, describe("meta_batches", config, without=("runs", "data_dir", "out"))
    )
    todo = []
    for options in made:
        if options.run.out.name not in records:
            resume = Checkpoints(options.run.out).latest() is not None
            todo.append(options.replace(resume=resume))
            check(todo[-1])
    if todo:
        images = load_images(
            config.dataset, "train", data_dir=config.data_dir, image_size=config.image_size
        )
        with closing(Programs()) as programs:
            for options in todo:
                print(f"training with meta-batches of {options.space.meta_batch}")
                train(options, images, programs=programs)
                folder = options.run.out
                records.add({"name": folder.name, **describe_run(*read_run(folder))})
    return tuple(options.run.out for options in made)


def read_run(folder: Path) -> tuple[int, dict[str, np.ndarray]]:
    """A run's meta-batch size, and what it logged for each update, (S,) each, NaN where it failed.

    Raises:
      ValueError: the folder has no metrics, or is no run of `ghn-train`.
    """
    training = Checkpoints(folder).config().get("training")
    path = folder / "metrics.jsonl"
    if training is None or not path.exists():
        raise ValueError(f"{folder} is no run of ghn-train: it has no metrics.jsonl, or its "
                         "config.json tells no options")  # fmt: skip
    size = training.get("space", training)["meta_batch"]
    records = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error!r})") from error
    if not records:
        raise ValueError(f"{path} has no records; training writes one for each update")
    steps = sorted(records)
    return size, {
        key: np.array([records[s].get(key) for s in steps], float)
        for key in ("step", "loss", "grad_norm")
    }


def smooth(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses of at most `POINTS` parts of a run, NaN for none, and the last update of each."""
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
    finite = np.isfinite(losses)
    means = [losses[p][finite[p]].mean() if finite[p].any() else np.nan for p in parts]
    return steps[[p[-1] for p in parts]], np.array(means)


def describe_run(size: int, metrics: Mapping[str, np.ndarray]) -> dict:
    """Of a run: losses at the end, how much they vary between updates, and the gradient's norm."""
    loss = metrics["loss"]
    kept = loss[np.isfinite(loss)]
    if len(kept) < 2:
        raise ValueError(f"a run with b_m = {size} has {len(kept)} updates that did not fail; two "
                         "are needed")  # fmt: skip
    norms = metrics["grad_norm"][np.isfinite(metrics["grad_norm"])]
    last = kept[-max(1, len(kept) // 10) :]
    return {
        "meta_batch": size,
        "updates": len(loss),
        "failed": int((~np.isfinite(loss)).sum()),
        "loss": float(last.mean()),
        # The deviation around the trend: of an update from the one before it.
        "noise": float(np.diff(kept).std() / np.sqrt(2)),
        "grad_norm": float(norms.mean()) if len(norms) else None,
        "grad_norm_std": float(norms.std()) if len(norms) else None,
    }


def run(config: Config) -> list[dict]:
    """Trains what has no record yet; writes the table and the figure; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder that holds no run.
    """
    folders = config.runs or _train(config)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs are in folders of one name: {', '.join(names)}; rename one")
    runs = {folder.name: read_run(folder) for folder in folders}
    found = [{"name": name, **describe_run(*run)} for name, run in runs.items()]
    config.out.mkdir(parents=True, exist_ok=True)
    text = f"{table(found)}\n{claims(found)}"
    write_beside(config.out / "table.md", text)
    from ghn_jax.plot.convergence import meta_batch_figure  # matplotlib is of an extra

    curves = {f"{name}, $b_m$ = {size}": smooth(metrics["step"], metrics["loss"])
              for name, (size, metrics) in runs.items()}  # fmt: skip
    meta_batch_figure(curves, config.out / "meta_batches.png")
    print(text)
    return found


def table(records: Sequence[Mapping]) -> str:
    """Markdown: a line for each run, and what the paper says of the gradient's norm."""
    lines = ["| run | b_m | updates | failed | loss of the last tenth | noise | gradient's norm |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in records:
        norm = f"{r['grad_norm']:.2g} ± {r['grad_norm_std']:.2g}" if r["grad_norm"] else "–"
        lines.append(f"| {r['name']} | {r['meta_batch']} | {r['updates']} | {r['failed']} | "
                     f"{r['loss']:.3f} | {r['noise']:.3f} | {norm} |")  # fmt: skip
    for size, (mean, std) in PAPER.items():
        lines.append(f"| the paper | {size} | – | – | – | – | {mean:g} ± {std:g} |")
    return "\n".join(lines) + "\n"


def claims(records: Sequence[Mapping]) -> str:
    """Whether larger meta-batches give a lower, less noisy loss and steadier gradients."""
    small, large = (pick(records, key=lambda r: r["meta_batch"]) for pick in (min, max))
    if small["meta_batch"] == large["meta_batch"]:
        return "All runs have one meta-batch size: there is nothing to compare.\n"
    text = ""
    for what, key in (("a less noisy loss", "noise"), ("a lower loss in the end", "loss"),
                      ("gradient norms that vary less", "grad_norm_std")):  # fmt: skip
        if small[key] is None or large[key] is None:
            continue
        holds = "holds" if large[key] < small[key] else "does not hold"
        few, many = (f"b_m = {r['meta_batch']}" for r in (small, large))
        text += f"{many} has {what} than {few}: {holds} ({large[key]:.3g}, {small[key]:.3g}).\n"
    return text
