"""Hypernetworks that an experiment trains and compares, each in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ghn_jax.data.images import Images
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.programs import Programs
from ghn_jax.evaluation.accuracy import evaluate_ghn, summary
from ghn_jax.evaluation.networks import Named, of_rules, of_split
from ghn_jax.evaluation.validation import load_validation
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn
from ghn_jax.hypernet.ghn import count_parameters
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.loop import check, train

# Networks of the training rules that training never draws, and the same without batch norm.
UNSEEN, UNSEEN_BNFREE = "unseen", "unseen, no BN"
IN_DISTRIBUTION = ("test", UNSEEN)
_OUT_OF_DISTRIBUTION = ("wide", "deep", "dense", "bnfree", UNSEEN_BNFREE)


def train_ghn(config: TrainConfig, images: Images, programs: Programs) -> dict:
    """Trains a hypernetwork, or goes on with what there is in its folder; see `loop.train`.

    Accuracies along the run are measured where `--validate-every` says so.

    Returns:
      Its number of `parameters`, and of its training: `steps`, `seconds` (median of an update, in
      the second half) and `train_top1` (mean of the last tenth of updates).

    Raises:
      ValueError: options that cannot work.
    """
    folder = config.run.out
    latest = Checkpoints(folder).latest()
    if latest is None or latest < (config.data.steps or np.inf):
        config = config.replace(resume=latest is not None)
        check(config)
        validate = load_validation(config) if config.run.validate_every else None
        train(config, images, validate, programs)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    updates = [json.loads(line) for line in lines]
    return {
        "parameters": count_parameters(Checkpoints(folder).ghn()),
        "steps": len(updates),
        "seconds": float(np.median([u["seconds"] for u in updates[len(updates) // 2 :]])),
        "train_top1": float(np.mean([u["top1"] for u in updates[-max(1, len(updates) // 10) :]])),
    }


def unseen_networks(
    config: TrainConfig, count: int | None, splits: Sequence[str], image_size: int
) -> list[tuple[str, Named]]:
    """(split, network) pairs that hypernetworks are evaluated on.

    Args:
      config: whose training rules unseen networks follow.
      count: of unseen networks of each kind; None for the networks of splits.
      splits: of the evaluation sets; all networks of each.
      image_size: of the images, in pixels.
    """
    if count is None:
        return [(s, named) for s in splits for named in of_split(s, image_size=image_size)]
    if count < 1:
        raise ValueError(f"--unseen is {count}; allowed: 1 or more")
    rules = config.space.rules(image_size)
    kinds = {UNSEEN: rules, UNSEEN_BNFREE: dataclasses.replace(rules, norm="never")}
    return [
        (kind, (f"{kind} {i}", arch))
        for kind, its in kinds.items()
        for i, (_, arch) in enumerate(of_rules(its, count))
    ]


def evaluate(
    config: TrainConfig,
    networks: Iterable[tuple[str, Named]],
    images: Images,
    engine: Engine,
    report: Callable[[dict], None],
) -> None:
    """Evaluates the hypernetwork in a folder; reports a record with `split` for each network."""
    networks = list(networks)
    if not networks:
        return
    split_of = {name: split for split, (name, _) in networks}
    ghn, variables = load_ghn(config.run.out)
    evaluate_ghn(
        ghn, variables, [named for _, named in networks], images, engine=engine,
        report=lambda record: report({**record, "split": split_of[record["name"]]}),
    )  # fmt: skip


def id_and_ood(records: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Records of networks in and out of the training distribution (Tables 3 and 5)."""
    records = list(records)
    return tuple(
        [r for r in records if r["split"] in splits]
        for splits in (IN_DISTRIBUTION, _OUT_OF_DISTRIBUTION)
    )  # type: ignore[return-value]


def mean_and_error(records: list[dict]) -> str:
    """'66.9 ± 0.3', in per cent, of some networks; '-' of none."""
    if not records:
        return "-"
    mean, error, _ = summary(records)
    return f"{100 * mean:.1f} ± {100 * error:.1f}"
