"""Graph HyperNetworks in JAX: parameter prediction for unseen deep architectures.

ghn, variables = ghn_jax.from_pretrained("runs/x")
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
from ghn_jax.evaluation import NetworkTraining, apply_on_batch, average_statistics, to_bfloat16
from ghn_jax.evaluation.activations import (
    LayerStatistics,
    NormFinding,
    activation_statistics,
    norm_check,
)
from ghn_jax.evaluation.reinitialise import add_noise, orthogonalise
from ghn_jax.hypernet import (
    GHN,
    ghn1,
    load_ghn,
    mlp_baseline,
    pad_graphs,
    save_ghn,
    write_ghn_file,
)
from ghn_jax.interop import (
    available,
    from_pretrained,
    from_torch,
    load_torch_ghn,
    save_torch_ghn,
    to_torch,
)
from ghn_jax.plot import draw
from ghn_jax.tracing import ParameterReport, PredictionReport, model_graph, predict, predict_model
from ghn_jax.training.meta_loss import meta_loss

__all__ = ["DARTS", "GHN", "PDARTS", "PRIMITIVES", "RULES", "SPLITS", "VIT", "Architecture",
  "DisconnectedError", "Engine", "Genotype", "Graph", "LayerStatistics", "NetworkTraining",
  "NormFinding", "ParameterReport", "PredictionReport", "Rules", "activation_statistics",
  "add_noise", "apply_on_batch", "available", "average_statistics", "build_graph", "build_network",
  "count_flops", "count_parameters", "draw", "evaluation_set", "from_pretrained", "from_torch",
  "ghn1", "load_ghn", "load_torch_ghn", "meta_loss", "mlp_baseline", "model_graph", "norm_check",
  "orthogonalise",
  "pad_graphs", "predict", "predict_model", "sample_architecture", "save_ghn", "save_torch_ghn",
  "to_bfloat16", "to_torch", "write_ghn_file", "zoo"]  # fmt: skip
