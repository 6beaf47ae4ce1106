"""Evaluation (paper § 5.1, C.1) and training of single networks."""

from ghn_jax.evaluation.accuracy import (
    Accuracy,
    evaluate_ghn,
    evaluate_network,
    named_architectures,
    predict_network,
    random_parameters,
    summary,
)

__all__ = [
    "Accuracy",
    "evaluate_ghn",
    "evaluate_network",
    "named_architectures",
    "predict_network",
    "random_parameters",
    "summary",
]
