"""Evaluation (paper § 5.1, C.1), training of single networks, and what prepares them for it."""

from ghn_jax.evaluation.accuracy import (
    Accuracy,
    evaluate_ghn,
    evaluate_network,
    predict_network,
    random_parameters,
    summary,
)
from ghn_jax.evaluation.activations import (
    LayerStatistics,
    NormFinding,
    activation_statistics,
    norm_check,
)
from ghn_jax.evaluation.batch_statistics import apply_on_batch, average_statistics
from ghn_jax.evaluation.module_training import ModuleTraining
from ghn_jax.evaluation.network_training import NetworkTraining
from ghn_jax.evaluation.networks import named_architectures
from ghn_jax.evaluation.precision import to_bfloat16
from ghn_jax.evaluation.recipe import Recipe
from ghn_jax.evaluation.reinitialise import add_noise, orthogonalise

__all__ = [
    "Accuracy",
    "LayerStatistics",
    "ModuleTraining",
    "NetworkTraining",
    "NormFinding",
    "Recipe",
    "activation_statistics",
    "add_noise",
    "apply_on_batch",
    "average_statistics",
    "evaluate_ghn",
    "evaluate_network",
    "named_architectures",
    "norm_check",
    "orthogonalise",
    "predict_network",
    "random_parameters",
    "summary",
    "to_bfloat16",
]
