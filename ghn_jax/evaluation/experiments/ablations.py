r"""GHN-2 without its parts, and variants of it (paper Tables 5 and 8; § 5.1, C.2.1).

    ghn-paper ablations --data-dir DIR --out runs/ablations                   # as the paper: weeks
    ghn-paper ablations --rows ghn2 no-normalisation bm1 --data-dir DIR --steps 5000
    ghn-paper ablations --quick

Trains a hypernetwork for each row and evaluates it on networks that it never saw. Trained ones are
in `hypernetworks/`, a folder for each, with checkpoints; what is there is not trained again. The
rows are those of `ghn-train --ablation`; what they change is in `ghn_jax/training/ablations.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from tqdm import tqdm

from ghn_jax.data.images import load_images
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.experiments.trained_ghns import (
    evaluate,
    id_and_ood,
    mean_and_error,
    train_ghn,
    unseen_networks,
)
from ghn_jax.hypernet.ghn import count_parameters
from ghn_jax.training.ablations import ABLATIONS, ablate
from ghn_jax.training.config import TrainConfig, preset
from ghn_jax.training.loop import MOST_PARAMETERS

# Row -> seconds of an update on a V100, mean and best of ID-TEST, means of WIDE, DEEP, DENSE and
# BN-FREE, in per cent; ResNet-50 and ViT (Table 8). Rows that ran out of GPU memory have none.
PAPER = {
    "ghn2": (3.6, 66.9, 77.1, 64.0, 60.5, 65.8, 36.8, 58.6, 11.4),
    "1000-archs": (3.6, 65.1, 78.4, 61.5, 56.0, 65.0, 27.6, 58.2, 10.5),
    "100-archs": (3.6, 47.1, 77.1, 38.8, 28.3, 41.9, 11.0, 38.7, 10.3),
    "no-normalisation": (3.6, 62.6, 75.9, 52.3, 59.5, 62.3, 14.4, 58.3, 17.0),
    "no-virtual-edges": (3.6, 61.5, 73.2, 58.2, 55.0, 61.5, 40.8, 41.9, 12.1),
    "no-layer-norm": (3.6, 64.5, 75.9, 62.4, 59.0, 64.6, 39.6, 55.1, 8.9),
    "no-gatedgnn": (1.5, 42.2, 60.2, 22.3, 37.9, 44.8, 23.9, 17.7, 10.0),
    "bm1-longer": (0.7, 62.4, 75.8, 63.0, 58.0, 62.1, 24.5, 57.0, 14.6),
    "bm1": (0.7, 54.3, 63.0, 53.1, 51.9, 53.4, 31.7, 50.6, 17.8),
    "bm1-no-shape-encoding": (0.7, 53.1, 61.7, 52.4, 51.4, 53.5, 24.7, 31.5, 14.0),
    "bm1-no-virtual-edges": (0.7, 51.7, 62.0, 49.7, 47.4, 52.0, 24.5, 34.2, 14.7),
    "bm1-stacked-no-virtual-edges": (0.7, 52.2, 63.6, 51.3, 46.9, 52.3, 20.2, 44.5, 15.4),
    "bm1-stacked": (0.9, 53.1, 61.3, 51.5, 50.9, 53.5, 23.1, 42.7, 15.1),
    "bm1-forward-only": (0.4, 53.9, 62.5, 51.2, 51.7, 54.3, 31.0, 49.9, 11.5),
    "bm1-five-rounds": (2.6, 54.4, 63.3, 52.8, 50.4, 53.4, 22.6, 50.1, 10.1),
    "bm1-fan-out": (0.7, 53.8, 63.6, 52.6, 51.2, 54.3, 19.8, 48.5, 11.1),
    "bm1-mlp-decoder": (0.7, 53.1, 64.0, 52.9, 52.5, 54.0, 22.1, 44.1, 16.3),
    "ghn1": (0.6, 51.4, 59.9, 43.1, 48.3, 51.8, 13.7, 19.2, 18.2),
    "ghn1-layer-norm": (0.6, 50.1, 58.9, 43.8, 47.5, 50.8, 11.4, 49.2, 16.3),
}
_COLUMNS = ("test", "best", "wide", "deep", "dense", "bnfree", "resnet50", "ViT")
# Row -> means of ID-TEST and OOD-TEST, average rank (Table 5).
PAPER_5 = {
    "ghn2": (66.9, 56.8, 1.9),
    "1000-archs": (65.1, 52.5, 2.6),
    "no-normalisation": (62.6, 47.1, 3.9),
    "no-virtual-edges": (61.5, 53.9, 4.1),
    "bm1": (54.3, 47.5, 5.5),
    "bm1-longer": (62.4, 51.9, 3.7),
    "no-gatedgnn": (42.2, 32.2, 7.4),
    "ghn1": (51.4, 39.2, 6.8),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rows are trained, on what, and evaluated on which networks."""

    rows: tuple[str, ...] = tuple(ABLATIONS)  # names of `ghn-train --ablation`
    preset: str = "ghn2"  # what the rows change
    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    steps: int | None = None  # updates of a row, but for the longer one; default: the preset's
    # of DeepNets-1M, whose networks are evaluated; predefined: ResNet-50 and ViT
    splits: tuple[str, ...] = ("test", "wide", "deep", "dense", "bnfree", "predefined")
    unseen: int | None = None  # evaluate on so many networks of the training rules, not on splits
    most_parameters: int = MOST_PARAMETERS  # rows with more are counted and not trained
    seed: int = 0  # of training
    out: Path = Path("runs/ablations")  # folder for hypernetworks, records and tables


def quick() -> Config:
    """200 updates of each row on digits: minutes on two cores."""
    return Config(preset="digits", dataset="digits", steps=200, unseen=5,
                  most_parameters=10**7, out=Path("runs/quick/ablations"))  # fmt: skip


def training(config: Config, row: str) -> TrainConfig:
    """How a row is trained."""
    before = preset(config.preset)
    before = before.replace(
        dataset=config.dataset, data_dir=config.data_dir, seed=config.seed,
        steps=before.data.steps if config.steps is None else config.steps,
    )  # fmt: skip
    return ablate(row, before).replace(out=config.out / "hypernetworks" / row)


def run(config: Config) -> list[dict]:
    """Trains and evaluates what has no record yet; writes the tables; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    configs = {row: training(config, row) for row in config.rows}
    images, test = (load_images(config.dataset, split, data_dir=config.data_dir)
                    for split in ("train", "test"))  # fmt: skip
    networks = unseen_networks(
        preset(config.preset), config.unseen, config.splits, images.image_size
    )
    without = ("rows", "data_dir", "splits", "unseen", "most_parameters", "out")
    records, engine = (
        Records.open(config.out, describe("ablations", config, without=without)),
        Engine(),
    )
    bar = tqdm(configs.items(), unit="row", dynamic_ncols=True)
    for row, how in bar:
        bar.set_postfix_str(row)
        if row not in records:
            count = count_parameters(how.ghn(images.task))
            record = {"name": row, "parameters": count, "refused": count > config.most_parameters}
            records.add(
                record
                if record["refused"]
                else {**record, **train_ghn(how, images, engine.programs)}
            )
        if records[row]["refused"]:
            continue

        def report(record: dict, row=row):
            records.add({**record, "name": f"{row}: {record['name']}", "row": row})

        missing = [(s, named) for s, named in networks if f"{row}: {named[0]}" not in records]
        evaluate(how, missing, test, engine, report)
    found = [records[row] for row in config.rows]
    found += [
        records[f"{row['name']}: {name}"]
        for row in list(found)
        if not row["refused"]
        for _, (name, _) in networks
    ]
    text = f"{table_8(found)}\n{table_5(found)}"
    write_beside(config.out / "table.md", text)
    print(text)
    return found


def _by_row(records: Sequence[Mapping]) -> tuple[list[dict], dict[str, list[dict]]]:
    """Records of rows, and of each row's networks."""
    rows = [dict(r) for r in records if "row" not in r]
    nets: dict[str, list[dict]] = {r["name"]: [] for r in rows}
    for record in records:
        if "row" in record:
            nets[record["row"]].append(dict(record))
    return rows, nets


def table_8(records: Sequence[Mapping]) -> str:
    """Markdown: accuracies of every row by split, in per cent; the paper's below."""
    rows, nets = _by_row(records)
    splits = list(dict.fromkeys(r["split"] for found in nets.values() for r in found))
    columns = [s for s in splits if s != "predefined"]
    heads = ["row", "parameters", "s/update", *columns, "best", "ResNet-50/ViT"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        name = row["name"]
        if row["refused"]:
            cells = [f"{row['parameters'] / 1e9:.1f}B: not trained", *["-"] * (len(heads) - 2)]
        else:
            found = nets[name]
            best = max([r["top1"] for r in id_and_ood(found)[0]], default=float("nan"))
            named = [f"{r['top1']:.1%}" for r in found if r["split"] == "predefined"]
            cells = [f"{row['parameters'] / 1e6:.1f}M", f"{row['seconds']:.2f}"]
            cells += [mean_and_error([r for r in found if r["split"] == s]) for s in columns]
            cells += [f"{100 * best:.1f}", "/".join(named) or "-"]
        lines.append("| " + " | ".join([ABLATIONS[name].row, *cells]) + " |")
    lines += ["", "The paper (ID-TEST, then OOD-TEST):", ""]
    heads = ["row", "parameters", "s/update", *_COLUMNS]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        shown = [*map(str, PAPER.get(row["name"], ["out of GPU memory"]))]
        shown += ["-"] * (len(heads) - 2 - len(shown))
        ablation = ABLATIONS[row["name"]]
        lines.append("| " + " | ".join([ablation.row, ablation.parameters, *shown]) + " |")
    return "\n".join(lines) + "\n"


def average_ranks(nets: Mapping[str, Sequence[Mapping]]) -> dict[str, float]:
    """The mean over networks of each row's place by accuracy; 1 is best, ties share theirs.

    Args:
      nets: row -> records of the same networks in the same order.
    """
    top1 = np.array([[r["top1"] for r in found] for found in nets.values()])
    return dict(zip(nets, rankdata(-top1, axis=0).mean(1).tolist(), strict=True))


def table_5(records: Sequence[Mapping]) -> str:
    """Markdown: means in and out of the training distribution, in per cent, and average ranks."""
    _, nets = _by_row(records)
    # The rows that the paper ranks against each other.
    nets = {row: [r for some in id_and_ood(nets[row]) for r in some]
            for row in PAPER_5 if nets.get(row)}  # fmt: skip
    if not nets:
        return ""
    ranks = average_ranks(nets)
    lines = ["| row | ID | OOD | average rank | ID, OOD, rank in the paper |",
             "|---|---|---|---|---|"]  # fmt: skip
    for row, found in nets.items():
        means = map(mean_and_error, id_and_ood(found))
        paper = ", ".join(map(str, PAPER_5[row]))
        lines.append(f"| {ABLATIONS[row].row} | {' | '.join(means)} | {ranks[row]:.1f} | {paper} |")
    return "\n".join(lines) + "\n"
