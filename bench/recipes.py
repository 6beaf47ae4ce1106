"""Ways to train a hypernetwork beside each other: what reaches the most on unseen networks.

    python bench/recipes.py                                   # of the preset `digits`
    python bench/recipes.py --changes none average --seeds 0 1 2
    python bench/recipes.py --preset ghn2-cifar10-small --narrow --changes none graphormer --seeds 0

Every way and seed makes the same number of updates; accuracies of unseen networks are measured
along it and at its end, the last ones of networks that no curve has. Seconds are the updates' own:
what is compiled once for all is not in them. The same command again goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from contextlib import closing
from pathlib import Path

import tyro

from ghn_jax.data.images import Images, load_images, steps_per_epoch
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.programs import Programs
from ghn_jax.evaluation.accuracy import summary
from ghn_jax.evaluation.experiments.records import Records
from ghn_jax.evaluation.experiments.trained_ghns import UNSEEN, evaluate, train_ghn, unseen_networks
from ghn_jax.training.config import FAST, TrainConfig, preset

# Name -> options that differ from the preset's.
_PARTS: dict[str, dict] = {
    "average": {"average": 0.998},
    "cosine": {"schedule": "cosine"},
    "warm-up": {"warmup_epochs": 2},
    "long warm-up": {"warmup_epochs": 6},
    "warm-up, 4e-3": {"warmup_epochs": 2, "learning_rate": 4e-3},
    "warm-up, cosine": {"schedule": "cosine", "warmup_epochs": 2},
    "5e-4": {"learning_rate": 5e-4},
    "1e-3": {"learning_rate": 1e-3},
    "3e-3": {"learning_rate": 3e-3},
    "4e-3": {"learning_rate": 4e-3},
    "3e-3, cosine": {"learning_rate": 3e-3, "schedule": "cosine", "warmup_epochs": 2},
    "norm penalty": {"norm_penalty": 3e-5},
    "one architecture": {"meta_batch": 1},
    "four architectures": {"meta_batch": 4},
    "64 images": {"batch_size": 64},
    "16 images": {"batch_size": 16},
    "label smoothing": {"label_smoothing": 0.1},
    "clip 1": {"clip": 1.0},
    "no virtual edges": {"virtual_edges": 1},
    "wider": {"features": 64},
}
CHANGES: dict[str, dict] = {
    "none": {},
    "identity": {"identity": 2.0},
    "muon": {"optimiser": "muon", "learning_rate": 2e-3},
    "adamw": {"optimiser": "adamw", "weight_decay": 1e-2},
    "adamw, identity": {"optimiser": "adamw", "weight_decay": 1e-2, "identity": 2.0},
    **{
        f"muon, identity {amount}": {**FAST, "identity": amount} for amount in (0.5, 1, 2, 4)
    },
    **_PARTS,
    **{f"muon, identity, {name}": {**FAST, **part} for name, part in _PARTS.items()},
    "graphormer, 32": {"encoder": "graphormer", "features": 32, "heads": 4},
    **{
        f"graphormer{name}": {"encoder": "graphormer", "features": 28, "heads": 4, **more}
        for name, more in {
            "": {}, ", 3e-3": {"learning_rate": 3e-3}, ", 5e-4": {"learning_rate": 5e-4},
            ", its recipe": {"optimiser": "adamw", "weight_decay": 1e-2, "schedule": "cosine",
                             "warmup_epochs": 2, "norm_penalty": 3e-5},
            ", muon, identity": FAST,
        }.items()
    },
}  # fmt: skip

# Options of `digits` that make an update take less time.
NARROW = ("widths", "fc_dims", "n_cells", "nodes", "norm", "meta_batch", "batch_size")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared, on what."""

    changes: tuple[str, ...] = ("none", "muon", "muon, identity 2")
    preset: str = "digits"  # of ghn-train, which changes are made to
    narrow: bool = False  # with the small networks and batches of `digits`
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    steps: int = 1500  # updates of each
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    points: int = 6  # of a learning curve
    nets: int = 50  # unseen networks at the end
    out: Path = Path("runs/bench/recipes")  # folder for hypernetworks and what was measured


def config_of(options: Options, images: Images, change: str, seed: int) -> TrainConfig:
    """How a hypernetwork is trained.

    Raises:
      ValueError: it cannot be, in so few updates.
    """
    base = preset(options.preset)
    if options.narrow:
        base = base.replace(**{name: preset("digits").options()[name] for name in NARROW})
    # The learning rate falls at the same share of the run.
    per_epoch = steps_per_epoch(images, base.data.batch_size)
    share = options.steps / (base.data.steps or base.data.epochs * per_epoch)
    scaled = tuple(round(e * share) for e in base.optimiser.decay_epochs)
    base = base.replace(
        data_dir=options.data_dir, steps=options.steps, decay_epochs=scaled, seed=seed,
        validate_every=max(1, options.steps // options.points), validate_nets=8,
        save_every=options.steps, out=options.out / f"{change} {seed}",
    )  # fmt: skip
    config = base.replace(**CHANGES[change])
    per_epoch = steps_per_epoch(images, config.data.batch_size)
    try:
        config.optimiser.rate(per_epoch, options.steps)
    except ValueError as error:
        raise ValueError(f"{change!r}: {error}; or give more --steps") from None
    return config


def measure(
    config: TrainConfig, images: Images, test: Images, nets: int, programs: Programs
) -> dict:
    """Trains a hypernetwork, or goes on, and evaluates it."""
    trained = train_ghn(config, images, programs)
    lines = (config.run.out / "metrics.jsonl").read_text().splitlines()
    curve = [(u["step"], u["val_top1"]) for u in map(json.loads, lines) if "val_top1" in u]
    found: list[dict] = []
    networks = [n for n in unseen_networks(config, nets, (), images.image_size) if n[0] == UNSEEN]
    evaluate(config, networks, test, Engine(programs=programs), found.append)
    return {**trained, "curve": curve, "top1": summary(found)[0]}


def table(records: list[dict]) -> str:
    """Markdown: a row for each change."""
    heads = ("change", "parameters", "seconds an update", "accuracy along the run, %",
             "at its end, %", "seeds")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for change in dict.fromkeys(r["change"] for r in records):
        mine = [r for r in records if r["change"] == change]
        curves = zip(*(r["curve"] for r in mine), strict=True)
        along = ", ".join(f"{100 * statistics.mean(t for _, t in point):.1f}" for point in curves)
        top1 = [100 * r["top1"] for r in mine]
        spread = f" ± {statistics.stdev(top1):.1f}" if len(top1) > 1 else ""
        seconds = statistics.median(r["seconds"] for r in mine)
        lines.append(f"| {change} | {mine[0]['parameters']:,} | {seconds:.3f} | {along} | "
                     f"{statistics.mean(top1):.1f}{spread} | {len(mine)} |")  # fmt: skip
    return "\n".join(lines)


def main(options: Options) -> None:
    """Trains every way with every seed; prints a JSON line for each, then a table."""
    for change in options.changes:
        if change not in CHANGES:
            raise ValueError(f"--changes has {change!r}; allowed: {', '.join(CHANGES)}")
    dataset = preset(options.preset).data.dataset
    images, test = (load_images(dataset, s, data_dir=options.data_dir) for s in ("train", "test"))
    settings = {k: getattr(options, k) for k in ("preset", "narrow", "steps", "points", "nets")}
    configs = {
        (seed, change): config_of(options, images, change, seed)
        for seed in options.seeds
        for change in options.changes
    }
    records = Records.open(options.out, settings)
    with closing(Programs()) as programs:
        for (seed, change), config in configs.items():
            name = f"{change} {seed}"
            if name not in records:
                record = measure(config, images, test, options.nets, programs)
                records.add({"name": name, "change": change, "seed": seed, **record})
                print(json.dumps(records[name]), flush=True)
    chosen = [r for c in options.changes for r in records.values() if r["change"] == c]
    print(table(chosen))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"recipes.py: {error}")
