"""Parameters for any Flax model: its graph is read from its trace."""

from ghn_jax.tracing.model_graph import model_graph
from ghn_jax.tracing.prediction import predict_model

__all__ = ["model_graph", "predict_model"]
