"""Predicted parameters made fit for fine-tuning.

What is tiled across channels repeats: copies of a filter get the same gradient and stay copies. Two
remedies from "Pretraining a Neural Network before Knowing Its Architecture" (Knyazev 2022, arXiv
2207.10049), which uses them one after the other: `add_noise` with beta = 3e-5, then
`orthogonalise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.files.messages import what_is
from ghn_jax.tracing.model_graph import map_parameters
from ghn_jax.tracing.report import ParameterReport, PredictionReport


def tiled_kernels(report: PredictionReport) -> list[str]:
    """Paths of the kernels that were tiled; the classifier, which has its own decoder, is none."""
    return [p.path for p in report.parameters if p.is_kernel and p.how.startswith("tiled")]


def _change(
    variables, report: PredictionReport, paths: Iterable[str] | None, change: Callable
) -> object:
    """Applies a change to kernels as matrices, larger side first."""
    if not isinstance(report, PredictionReport):
        raise TypeError(
            f"the report is {what_is(report)}; give the PredictionReport that predict_model "
            "returned with the variables"
        )
    rows = {p.path: p for p in report.parameters}
    chosen = list(tiled_kernels(report) if paths is None else paths)
    for path in chosen:
        if path not in rows or not rows[path].is_kernel:
            raise ValueError(f"{path!r} is no predicted kernel of a layer before the classifier")
    order = {path: i for i, path in enumerate(chosen)}
    # With no paths given, none may be tiled: then all kernels tell whose report it is.
    missing = set(chosen if paths is not None else (p.path for p in rows.values() if p.is_kernel))

    def kernel(path: str, leaf: jax.Array) -> jax.Array:
        missing.discard(path)
        if path not in order:
            return leaf
        if tuple(leaf.shape) != rows[path].shape:
            raise ValueError(
                f"{path} has shape {tuple(leaf.shape)} in the variables and {rows[path].shape} in "
                "the report; give the report of their prediction"
            )
        # PyTorch's order of (in, height, width): that of columns decides what QR makes of them.
        tensor = np.asarray(leaf, np.float32)
        tensor = np.moveaxis(tensor, -2, 0) if leaf.ndim == 4 else tensor
        matrix = _matrix(tensor, rows[path])
        wide = matrix.shape[0] < matrix.shape[1]
        matrix = change(matrix.T if wide else matrix, order[path])
        tensor = (matrix.T if wide else matrix).reshape(tensor.shape)
        tensor = np.moveaxis(tensor, 0, -2) if leaf.ndim == 4 else tensor
        return jnp.asarray(tensor, leaf.dtype)

    changed = map_parameters(variables, kernel)
    if missing:
        raise ValueError(
            f"the variables have no {', '.join(sorted(missing)[:3])}, which the report has; give "
            "the report of their prediction"
        )
    return changed


def _matrix(x: np.ndarray, row: ParameterReport) -> np.ndarray:
    """(in and positions, out); in Flax the output comes last, in one axis or in several."""
    out = row.node_shape[0]
    if not any(np.prod(x.shape[axis:], dtype=int) == out for axis in range(x.ndim)):
        raise ValueError(
            f"{row.path} of shape {x.shape} does not end with its {out} output channels; only "
            "kernels that do are changed"
        )
    return x.reshape(-1, out)


def add_noise(
    variables,
    report: PredictionReport,
    paths: Iterable[str] | None = None,
    *,
    beta: float = 3e-5,
    seed: int = 0,
):
    """Adds noise N(0, (beta * s)^2), s the standard deviation of a kernel's row correlations.

    Args:
      variables: a Linen model's variables or an NNX module, as `predict` returns them.
      report: of that prediction.
      paths: kernels to change; None: those that were tiled.
      beta: see above; the report's value.
      seed: of the noise.

    Returns:
      New variables, in a tree as they came, or a new module.

    Raises:
      TypeError: the variables or the report are something else.
      ValueError: a path is none of a predicted kernel, or the report is another model's.
    """

    def noisy(matrix, number):
        noise = np.random.default_rng((seed, number)).standard_normal(matrix.shape, np.float32)
        return matrix + beta * _correlation_deviation(matrix) * noise

    return _change(variables, report, paths, noisy)


def _correlation_deviation(matrix: np.ndarray) -> float:
    """Standard deviation of all entries of np.corrcoef(matrix), without that large matrix."""
    centred = matrix - matrix.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(norm == 0, 1, norm)
    mean = np.square(unit.sum(0)).sum() / len(unit) ** 2
    square = np.square(unit.T @ unit).sum() / len(unit) ** 2
    return float(np.sqrt(max(square - mean**2, 0.0)))


def orthogonalise(variables, report: PredictionReport, paths: Iterable[str] | None = None):
    """Replaces kernels by the orthogonal factor of their QR decomposition.

    A kernel is seen as a matrix (in and positions, out), transposed where it is wide; its columns
    become orthonormal, in the span and with the orientation of the predicted ones.

    Args:
      variables, report, paths: as for `add_noise`.

    Returns:
      New variables, in a tree as they came, or a new module.

    Raises:
      TypeError: the variables or the report are something else.
      ValueError: a path is none of a predicted kernel, or the report is another model's.
    """

    def orthogonal(matrix, number):
        q, r = np.linalg.qr(matrix)
        return q * np.where(np.diag(r) < 0, -1, 1).astype(q.dtype)

    return _change(variables, report, paths, orthogonal)
