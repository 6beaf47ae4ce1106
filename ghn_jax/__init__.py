"""Graph HyperNetworks in JAX: parameter prediction for unseen deep architectures.

ghn, variables = ghn_jax.load_ghn("runs/x")
arch = ghn_jax.evaluation_set("test")[7]
params = ghn.predict(variables, arch)
logits = ghn_jax.build_network(arch).apply({"params": params}, images)

model = ghn_jax.zoo.resnet50()  # or any other Flax model
variables, report = ghn_jax.predict_model(ghn, variables, model, jnp.zeros((1, 32, 32, 3)))
"""

from ghn_jax import zoo
from ghn_jax.deepnets1m.architecture import DARTS, PDARTS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.counts import count_flops, count_parameters
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph, build_graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import RULES, SPLITS, Rules, sample_architecture
from ghn_jax.deepnets1m.wiring import DisconnectedError
from ghn_jax.engine import Engine
from ghn_jax.evaluation.batch_statistics import apply_on_batch, average_statistics
from ghn_jax.evaluation.network_training import NetworkTraining
from ghn_jax.evaluation.precision import to_bfloat16
from ghn_jax.evaluation.reinitialise import add_noise, orthogonalise
from ghn_jax.hypernet.checkpoint import load_ghn, save_ghn
from ghn_jax.hypernet.ghn import GHN, ghn1, mlp_baseline
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.interop.old_names import keep_old_names
from ghn_jax.interop.torch_ghn import load_torch_ghn, save_torch_ghn
from ghn_jax.interop.torch_network import from_torch, to_torch
from ghn_jax.tracing.model_graph import model_graph
from ghn_jax.tracing.prediction import predict_model
from ghn_jax.tracing.report import ParameterReport, PredictionReport
from ghn_jax.training.meta_loss import meta_loss

keep_old_names()
predict = predict_model  # its name in version 0.1, for one release

__all__ = [
    "DARTS",
    "GHN",
    "PDARTS",
    "PRIMITIVES",
    "RULES",
    "SPLITS",
    "VIT",
    "Architecture",
    "DisconnectedError",
    "Engine",
    "Genotype",
    "Graph",
    "NetworkTraining",
    "ParameterReport",
    "PredictionReport",
    "Rules",
    "add_noise",
    "apply_on_batch",
    "average_statistics",
    "build_graph",
    "build_network",
    "count_flops",
    "count_parameters",
    "draw",
    "evaluation_set",
    "from_torch",
    "ghn1",
    "load_ghn",
    "load_torch_ghn",
    "meta_loss",
    "mlp_baseline",
    "model_graph",
    "orthogonalise",
    "pad_graphs",
    "predict",
    "predict_model",
    "sample_architecture",
    "save_ghn",
    "save_torch_ghn",
    "to_bfloat16",
    "to_torch",
    "zoo",
]


def __getattr__(name: str):
    # Matplotlib takes longer to import than all else together, and few need it.
    if name == "draw":
        from ghn_jax.plot.drawing import draw_graph

        return draw_graph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
