"""Something else than a public function takes is said in a sentence of ours, whatever it is."""

import flax.linen as nn
import jax.numpy as jnp
import optax
import pytest

import ghn_jax
from ghn_jax.evaluation.module_training import ModuleTraining

ARCH = ghn_jax.evaluation_set("val")[0]
GHN = ghn_jax.GHN()
IMAGES = jnp.zeros((1, 32, 32, 3))
# What a function takes -> functions of one argument, which is none of it.
TAKEN = {
    "an Architecture": {
        "build_graph": ghn_jax.build_graph,
        "build_network": ghn_jax.build_network,
        "count_flops": ghn_jax.count_flops,
        "count_parameters": ghn_jax.count_parameters,
        "GHN.predict": lambda arch: GHN.predict({"params": {}}, arch),
        "GHN.embed": lambda arch: GHN.embed({"params": {}}, arch),
        "NetworkTraining": lambda arch: ghn_jax.NetworkTraining(
            ghn_jax.Engine(), arch, optax.sgd(0.1), batch_size=8
        ),
        "to_torch": lambda arch: ghn_jax.to_torch({}, arch),
        "from_torch": lambda arch: ghn_jax.from_torch({}, arch),
    },
    "a Graph": {"draw": ghn_jax.draw, "pad_graphs": lambda graph: ghn_jax.pad_graphs([graph])},
    "a Linen module": {
        "ModuleTraining": lambda module: ModuleTraining(module, optax.sgd(0.1)),
    },
    "PyTorch's names": {"from_torch": lambda arrays: ghn_jax.from_torch(arrays, ARCH)},
    "the params tree": {"to_torch": lambda params: ghn_jax.to_torch(params, ARCH)},
    "ghn.init_variables": {
        "GHN.predict": lambda variables: GHN.predict(variables, ARCH),
        "GHN.embed": lambda variables: GHN.embed(variables, ARCH),
        "predict_model": lambda variables: ghn_jax.predict_model(
            GHN, variables, nn.Dense(2), IMAGES
        ),
        "save_ghn": lambda variables: ghn_jax.save_ghn("never written", GHN, variables),
    },
    "a GHN": {
        "predict_model": lambda ghn: ghn_jax.predict_model(ghn, {}, nn.Dense(2), IMAGES),
        "save_ghn": lambda ghn: ghn_jax.save_ghn("never written", ghn, {}),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("resnet50", "a str"),
        (None, "None"),
        (ghn_jax.DARTS, "a Genotype"),
        ([1], "a list"),
        (int, "the class int"),
    ],
)
@pytest.mark.parametrize(
    ("taken", "name"), [(taken, name) for taken, names in TAKEN.items() for name in names]
)
def test_a_wrong_argument_is_named(taken, name, given, words):
    with pytest.raises(TypeError) as error:
        TAKEN[taken][name](given)
    what, _, allowed = str(error.value).partition("; allowed: ")
    assert what.endswith(words)
    assert taken in allowed
