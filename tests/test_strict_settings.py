"""JAX's strict settings, which many code bases set: each in a process of its own."""

import os
import subprocess
import sys

import pytest

# What users call, small; printed is what went wrong.
PROGRAM = """
import sys, warnings
import jax
name, value = sys.argv[1:]
jax.config.update(name, {"True": True}.get(value, value))
import flax.linen as nn, jax.numpy as jnp
import ghn_jax

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), 8, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).reshape(len(x), -1, 8)
        positions = self.param("positions", nn.initializers.normal(), (1, 16, 8))
        x = x + jnp.broadcast_to(positions, x.shape)
        return nn.Dense(10)(x.mean(1))

ghn = ghn_jax.GHN(max_shape=(16, 16, 11, 11), features=8)
ghn_variables = ghn.init_variables(0)
images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3), jnp.float32)
variables, report = ghn_jax.predict_model(ghn, ghn_variables, Net(), images)
assert not report.left, report
logits = ghn_jax.apply_on_batch(Net(), variables, images)
assert jnp.isfinite(logits).all()
ghn_jax.average_statistics(Net(), variables, [images])
if sys.argv[1] == "jax_numpy_rank_promotion":  # networks of the design space
    from ghn_jax.deepnets1m.architecture import Architecture
    edges = [("cse", 0), ("msa", 0), ("sep_conv_3x3", 1), ("max_pool_3x3", 0)]
    genotype = {"normal": edges, "normal_concat": [2, 3], "reduce": edges, "reduce_concat": [2, 3]}
    options = {"C": 8, "n_cells": 1, "fc_layers": 1, "fc_dim": 8, "stem_type": 0}
    for norm in ("bn", None):
        arch = Architecture.from_dict({"genotype": genotype, "norm": norm, **options})
        params = ghn.predict(ghn_variables, arch)
        ghn_jax.build_network(arch).apply({"params": params}, images)
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_debug_nans", "True"),
        ("jax_enable_x64", "True"),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_strict_settings(name, value):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", PROGRAM, name, value]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
