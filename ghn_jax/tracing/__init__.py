"""Parameters for any Flax model: its graph is read from its trace."""

from ghn_jax.tracing.model_graph import (
    TracedModel,
    map_parameters,
    model_graph,
    place_tensor,
    trace,
    trace_once,
)
from ghn_jax.tracing.prediction import predict_model
from ghn_jax.tracing.report import ParameterReport, PredictionReport

predict = predict_model  # its name in version 0.1, for one release

__all__ = [
    "ParameterReport",
    "PredictionReport",
    "TracedModel",
    "map_parameters",
    "model_graph",
    "place_tensor",
    "predict",
    "predict_model",
    "trace",
    "trace_once",
]
