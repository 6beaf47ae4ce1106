"""Graph HyperNetworks in JAX: parameter prediction for unseen deep architectures.

ghn, variables = ghn_jax.load_ghn("runs/x")
arch = ghn_jax.evaluation_set("test")[7]
params = ghn.predict(variables, arch)
logits = ghn_jax.build_network(arch).apply({"params": params}, images)

model = ghn_jax.zoo.resnet50()  # or any other Flax model
variables, report = ghn_jax.predict(ghn, variables, model, jnp.zeros((1, 32, 32, 3)))
"""

from ghn_jax import zoo
from ghn_jax.architecture import DARTS, PDARTS, VIT, Architecture, Genotype
from ghn_jax.batch_statistics import apply_on_batch, average_statistics
from ghn_jax.checkpoint import load_ghn, save_ghn
from ghn_jax.counts import count_flops, count_parameters
from ghn_jax.engine import Engine
from ghn_jax.evaluation_sets import evaluation_set
from ghn_jax.ghn import GHN, ghn1, mlp_baseline
from ghn_jax.graph import PRIMITIVES, Graph, build_graph, pad_graphs
from ghn_jax.meta_loss import meta_loss
from ghn_jax.network import build_network
from ghn_jax.network_training import NetworkTraining
from ghn_jax.precision import to_bfloat16
from ghn_jax.prediction import predict
from ghn_jax.reinitialise import add_noise, orthogonalise
from ghn_jax.report import ParameterReport, PredictionReport
from ghn_jax.sampling import RULES, SPLITS, Rules, sample_architecture
from ghn_jax.torch_ghn import load_torch_ghn, save_torch_ghn
from ghn_jax.torch_network import from_torch, to_torch
from ghn_jax.tracing import model_graph
from ghn_jax.wiring import DisconnectedError

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
        from ghn_jax.drawing import draw_graph

        return draw_graph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
