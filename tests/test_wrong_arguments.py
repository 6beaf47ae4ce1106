"""Something else than a public function takes is said in a sentence of ours, whatever it is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ghn_jax
from ghn_jax.evaluation.module_training import ModuleTraining
from ghn_jax.tracing.model_graph import trace

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


class Named(nn.Module):
    """Has no `__call__`."""

    def setup(self):
        self.head = nn.Dense(10)

    def forward(self, x):
        return self.head(x.mean((1, 2)))


class NnxNamed(nnx.Module):
    """Has no `__call__`."""

    def __init__(self):
        self.head = nnx.Linear(3, 10, rngs=nnx.Rngs(0))

    def forward(self, x):
        return self.head(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": jax.random.key(0)}, TypeError, r"seed is .*; allowed: a whole number"),
        ({"seed": jax.random.PRNGKey(0)}, TypeError, r"seed is .*; allowed: a whole number"),
        ({"seed": "0"}, TypeError, "seed is a str; allowed: a whole number"),
        ({"seed": 1.5}, TypeError, "seed is a float; allowed: a whole number"),
        ({"seed": 2**70}, ValueError, r"seed is \d+; allowed"),
        ({"method": "forwards"}, ValueError, "Named has no forwards; .*, of forward$"),
        ({"method": None}, ValueError, "Named has no __call__; .*, of forward$"),
        ({"method": 3}, TypeError, "method is an int; allowed"),
        ({"mutable": 3}, TypeError, "mutable is an int; allowed"),
    ],
)
def test_options_of_a_call(options, error, message):
    options = {"method": "forward", **options}
    with pytest.raises(error, match=message):
        ghn_jax.predict_model(GHN, GHN.init_variables(0), Named(), IMAGES, **options)


def test_what_is_allowed_of_a_call():
    for seed in (3, np.int64(3), jnp.int32(3)):
        for mutable in (True, "a", ("a",), frozenset("a"), nn.DenyList("a")):
            call = {"mutable": mutable, "method": Named.forward}
            assert len(trace(Named(), IMAGES, 1, seed=seed, call=call).paths) == 2


def test_nnx_modules_that_cannot_be_called():
    with pytest.raises(TypeError, match="NnxNamed has no __call__.* calls forward$"):
        ghn_jax.model_graph(NnxNamed(), IMAGES)
