"""Properties of networks by regression from their embeddings (paper § 5.2, C.2.3).

    result = predict_property(fit_x, fit_y, test_x, test_y, rounded=True)
    print(result.mean, result.std)

A network's embedding is the mean of its nodes' final states (`embedding.embed_graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import kendalltau

# The authors' grid. Its epsilons, in units of the property, suit values of some tens: per cent.
GRID = {
    "C": [1, 10, 50, 100, 200, 500, 1000],
    "gamma": ["auto", 0.05, 0.1, 0.2, 0.5],
    "epsilon": [0.05, 0.1, 0.2],
}
FOLDS = 5
SEEDS = (0, 1, 2, 3, None)  # of the permutations that folds are cut from; None: as they are


class Result(NamedTuple):
    """How well a property was predicted.

    Attributes:
      mean, std: of `taus`.
      taus: (runs,) Kendall's tau between predictions and the truth.
    """

    mean: float
    std: float
    taus: np.ndarray

    @classmethod
    def of(cls, taus) -> Result:
        """The result of some runs."""
        taus = np.asarray(taus, float)
        return cls(float(taus.mean()), float(taus.std()), taus)


def permutation(n: int, seed: int | None) -> np.ndarray:
    """(n,) the authors' order of `n` networks for a seed (NumPy's old generator)."""
    return np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)


def fit(embeddings: np.ndarray, values: np.ndarray, permutation: np.ndarray) -> Any:
    """Fits support vector regression, its parameters found by cross-validation.

    Args:
      embeddings: (N, d).
      values: (N,) the property.
      permutation: (N,) order of the networks that folds are cut from.

    Returns:
      scikit-learn's regressor, fitted to all networks: `predict((M, d)) -> (M,)`.

    Raises:
      ValueError: fewer networks than two for each fold, a number that is not finite, or shapes that
        do not go together.
    """
    from sklearn.model_selection import GridSearchCV  # slow to import, and of an extra
    from sklearn.svm import SVR

    x, y = _check(embeddings, values)
    if len(x) < 2 * FOLDS:
        raise ValueError(f"{len(x)} networks to fit; allowed: {2 * FOLDS} or more")
    search = GridSearchCV(SVR(), GRID, cv=FOLDS, refit=False, error_score="raise")
    search.fit(x[permutation], y[permutation])
    return SVR(**search.best_params_).fit(x, y)


def _check(embeddings, values) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(embeddings, float), np.asarray(values, float)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"embeddings {x.shape} and values {y.shape} do not go together; give (N, d) and (N,)"
        )
    for name, array in (("embeddings", x), ("values", y)):
        if not np.isfinite(array).all():
            raise ValueError(f"{(~np.isfinite(array)).sum()} of the {name} are not finite")
    return x, y


def rank_correlation(predicted, truth) -> float:
    """Kendall's tau-b between two (N,) arrays; 0 where one of them is constant and ranks nothing.

    Raises:
      ValueError: a number that is not finite, or other shapes.
    """
    predicted, truth = np.asarray(predicted, float), np.asarray(truth, float)
    if predicted.shape != truth.shape or predicted.ndim != 1:
        raise ValueError(f"shapes are {predicted.shape} and {truth.shape}; give (N,) twice")
    if not (np.isfinite(predicted).all() and np.isfinite(truth).all()):
        raise ValueError("ranks of numbers that are not finite are not defined")
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(kendalltau(predicted, truth).statistic)


def predict_property(
    fit_x: np.ndarray, fit_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, rounded: bool
) -> Result:
    """Fits to some networks and ranks others, once for each of `SEEDS`.

    Args:
      fit_x: (N, d) embeddings of the networks to fit to.
      fit_y: (N,) their property.
      test_x: (M, d) embeddings of those to rank.
      test_y: (M,) their property.
      rounded: predictions to integers, as the authors do except for convergence: networks that
        differ by less are taken to be equal.

    Raises:
      ValueError: see `fit`.
    """
    test_x, test_y = _check(test_x, test_y)
    taus = []
    for seed in SEEDS:
        predicted = fit(fit_x, fit_y, permutation(len(fit_x), seed)).predict(test_x)
        taus.append(rank_correlation(np.round(predicted) if rounded else predicted, test_y))
    return Result.of(taus)


def correlations(properties: Mapping[str, np.ndarray]) -> np.ndarray:
    """(P, P) Kendall's tau between P properties of the same networks (Fig. 11).

    Args:
      properties: name -> (N,) values; those of one that all networks share have no tau, but NaN.
    """
    columns = list(properties.values())
    taus = np.array([[rank_correlation(a, b) for b in columns] for a in columns])
    shared = np.array([np.ptp(a) == 0 for a in columns])
    return np.where(shared[:, None] | shared, np.nan, taus)
