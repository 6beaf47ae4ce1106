r"""Accuracy, robustness, speed and convergence predicted from embeddings (paper § 5.2, Fig. 4, 11).

    ghn-paper properties --fit runs/sgd-val --test runs/sgd-test --ghn runs/ghn2 runs/ghn1
    ghn-paper properties --quick

A regression from the embeddings of networks that were trained to each of their properties ranks
others; Kendall's tau says how well. `ghn-paper trained-networks` writes what `--fit` and `--test`
name. NeuPred, which is trained for each property, is the baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.evaluation.experiments import neupred
from ghn_jax.evaluation.experiments.records import (
    Records,
    describe,
    read_records,
    write_beside,
)
from ghn_jax.evaluation.experiments.regression import (
    FOLDS,
    Result,
    correlations,
    predict_property,
    rank_correlation,
)
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.hypernet.ghn import GHN

NEUPRED = "NeuPred"
# Seconds depend on the device. Rounding, and the regression's grid, are for numbers of about ten,
# as the authors' seconds are, so all are brought to this mean.
MEAN_SECONDS = 10.0


class Property(NamedTuple):
    """Something that is measured of a trained network.

    Attributes:
      name: as figures have it.
      key: of a record.
      rounded: predictions to integers, see `regression.predict_property`.
      low, high: what a record may say.
    """

    name: str
    key: str
    rounded: bool
    low: float
    high: float


PROPERTIES = (
    Property("clean accuracy", "final_val_top1", True, 0, 1),
    Property("noisy accuracy", "val_top1_noise", True, 0, 1),
    Property("inference time", "inference_seconds", True, 0, np.inf),
    Property("convergence time", "convergence", False, 0, 2),
)


def property_values(records: Sequence[Mapping]) -> dict[str, np.ndarray]:
    """The properties of some networks: name -> (N,), accuracies in per cent.

    Raises:
      ValueError: no records, one that lacks a property, or a value that is out of range.
    """
    if not records:
        raise ValueError("there are no records; give one for each network")
    columns = {}
    for p in PROPERTIES:
        values = []
        for i, record in enumerate(records):
            value = record.get(p.key)
            if not isinstance(value, (int, float)) or not p.low <= value <= p.high:
                raise ValueError(
                    f"{p.key} of record {i} is {value!r}; allowed: {p.low} to {p.high}"
                )
            values.append(float(value))
        scale = 100.0 if p.high == 1 else 1.0
        columns[p.name] = scale * np.array(values)
    return columns


def predict_properties(
    fit_records: Sequence[Mapping],
    test_records: Sequence[Mapping],
    ghns: Mapping[str, tuple[GHN, Mapping]],
    *,
    image_size: int = 32,
    neupred_runs: int = 5,
    neupred_epochs: int = 300,
    progress: bool = False,
    known: Container[str] = (),
) -> Iterator[dict]:
    """How well methods rank networks by their properties when they have been told those of others.

    Args:
      fit_records: of the networks to fit to.
      test_records: of the networks to rank.
      ghns: name -> hypernetwork and its variables; networks' embeddings are regressed from.
      image_size: height and width of the images, in pixels.
      neupred_runs: seeds of the baseline, which is trained for each property; 0 leaves it out.
      neupred_epochs: passes over the networks to fit to.
      progress: shows bars.
      known: names of records that are not computed again.

    Yields:
      For each property and method, of NeuPred for each seed,
      {'name', 'property', 'method', 'taus'}: Kendall's tau of some runs. `summarise` joins them.
      None of a property that all networks to rank share: it ranks nothing.

    Raises:
      ValueError: see `property_values` and `regression.fit`.
    """
    fit_values, test_values = property_values(fit_records), property_values(test_records)
    targets = {
        p: _targets(p, fit_values[p.name], test_values[p.name])
        for p in PROPERTIES
        if np.ptp(test_values[p.name])
    }
    architectures = [
        [Architecture.from_dict(record["architecture"]) for record in records]
        for records in (fit_records, test_records)
    ]

    def bar(items, what: str):
        return tqdm(items, desc=what, disable=not progress, leave=False)

    def missing(method: str, runs: Sequence[str]) -> list[tuple[Property, str, dict]]:
        """Properties and runs that have no record, with the record but for its taus."""
        return [
            (p, run, {"name": name, "property": p.name, "method": method})
            for p in targets
            for run in runs
            if (name := f"{p.name}, {method}{run}") not in known
        ]

    for method, (ghn, variables) in ghns.items():
        todo = missing(method, [""])
        if not todo:
            continue
        fit_x, test_x = (
            embed_graphs(
                ghn,
                variables,
                (ghn.graph(a, image_size=image_size) for a in bar(some, f"{method} embedding")),
            )
            for some in architectures
        )
        for p, _, record in bar(todo, f"{method} regression"):
            fit_y, test_y = targets[p]
            result = predict_property(fit_x, fit_y, test_x, test_y, p.rounded)
            yield {**record, "taus": result.taus.tolist()}
    todo = missing(NEUPRED, [f" {seed}" for seed in range(neupred_runs)])
    if not todo:
        return
    fit_graphs, test_graphs = (
        [build_graph(arch, 1, image_size=image_size) for arch in bar(some, "graphs")]
        for some in architectures
    )
    for p, run, record in bar(todo, NEUPRED):
        fit_y, test_y = targets[p]
        fitted = neupred.fit(fit_graphs, fit_y, epochs=neupred_epochs, seed=int(run))
        predicted = fitted.predict(test_graphs)
        predicted = np.round(predicted) if p.rounded else predicted
        yield {**record, "taus": [float(rank_correlation(predicted, test_y))]}


def summarise(records: Iterable[Mapping]) -> list[dict]:
    """Of each property and method {'property', 'method', 'mean', 'std', 'taus'} (Fig. 4).

    Args:
      records: of `predict_properties`, in any order.
    """
    taus: dict[tuple[str, str], list[float]] = {}
    for record in records:
        taus.setdefault((record["property"], record["method"]), []).extend(record["taus"])
    return [
        {"property": p.name, "method": method, "mean": result.mean, "std": result.std,
         "taus": result.taus.tolist()}
        for p in PROPERTIES
        for (name, method), found in taus.items()
        if name == p.name
        for result in [Result.of(found)]
    ]  # fmt: skip


def _targets(p: Property, fit_y: np.ndarray, test_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A property in the units that it is fitted in."""
    scale = MEAN_SECONDS / fit_y.mean() if p.key == "inference_seconds" else 1.0
    return scale * fit_y, scale * test_y


def _names(results: Sequence[Mapping], key: str) -> list[str]:
    return list(dict.fromkeys(result[key] for result in results))


def table(results: Sequence[Mapping]) -> str:
    """Markdown: Kendall's tau of each property and method, mean ± standard deviation.

    A property without results is one that all networks share.
    """
    methods = _names(results, "method")
    cells = {(r["property"], r["method"]): f"{r['mean']:.3f} ± {r['std']:.3f}" for r in results}
    lines = [f"| property | {' | '.join(methods)} |", "|---" * (1 + len(methods)) + "|"]
    for name in (p.name for p in PROPERTIES):
        row = [cells.get((name, method), "–") for method in methods]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


# --- The experiment -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Networks whose properties are known, and what they are predicted from."""

    fit: tuple[Path, ...] = (Path("runs/sgd-val"),)  # folders of trained networks to fit to
    test: tuple[Path, ...] = (Path("runs/sgd-test"),)  # of those to rank; none: half of `fit`
    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    image_size: int = 32  # of the images, in pixels
    neupred_runs: int = 5  # seeds of the baseline; 0 leaves it out
    neupred_epochs: int = 300  # passes over the networks to fit to
    out: Path = Path("runs/properties")  # folder for results, table and figures


def quick() -> Config:
    """Of the networks that `ghn-paper trained-networks --quick` has trained."""
    return Config(
        fit=(Path("runs/quick/trained_networks"),), test=(), image_size=16, neupred_runs=1,
        neupred_epochs=200, out=Path("runs/quick/properties"),
    )  # fmt: skip


def _records(folders: Sequence[Path]) -> list[dict]:
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; make it with ghn-paper trained-networks")
        some = read_records(folder).values()
        found += [record for record in some if isinstance(record["architecture"], dict)]
    return found


def run(config: Config) -> list[dict]:
    """Predicts all properties; writes records, table and figures. What there is stays.

    Raises:
      ValueError: folders without trained networks, or too few of them; or `out` has records of
        other options.
    """
    fit, test = _records(config.fit), _records(config.test)
    if not config.test:
        fit, test = fit[: len(fit) // 2], fit[len(fit) // 2 :]
    if len(fit) < 2 * FOLDS:
        raise ValueError(
            f"{len(fit)} networks to fit to; allowed: {2 * FOLDS} or more, and without --test half "
            "of those that --fit has; train more with ghn-paper trained-networks"
        )
    settings = describe("properties", config, without=("out", "neupred_runs"))
    ghns = load_ghns(config.ghn)
    settings["networks"] = [len(fit), len(test)]
    records = Records.open(config.out, settings, ghns=ghns)
    for record in predict_properties(
        fit, test, ghns, image_size=config.image_size,
        neupred_runs=config.neupred_runs, neupred_epochs=config.neupred_epochs, progress=True,
        known=records,
    ):  # fmt: skip
        records.add(record)
    results = summarise(records.values())
    write_beside(config.out / "table.md", table(results))
    from ghn_jax.plot.experiments import correlation_matrix, property_bars  # matplotlib: an extra

    property_bars(results, config.out / "properties.png")
    values = property_values(test)
    correlation_matrix(correlations(values), list(values), config.out / "correlations.png")
    print(f"Kendall's tau, {len(fit)} networks to fit to, {len(test)} to rank\n\n{table(results)}")
    return results
