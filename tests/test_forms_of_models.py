"""Forms that people's models have: of variables, of calls, of what they return."""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze

import ghn_jax
from ghn_jax.tracing.model_graph import trace, trace_once

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def ghn():
    model = ghn_jax.GHN()
    return model, model.init_variables(0)


# --- Variables and calls --------------------------------------------------------------------------


class Normed(nn.Module):
    """Convolution, norm, classifier; the head reads twice the channels where it is called so."""

    @nn.compact
    def __call__(self, x, wide=False, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3))(x)).mean((1, 2))
        if wide is True:
            x = jnp.concatenate([x, x], -1)
        return nn.Dense(10)(x)


@pytest.mark.parametrize("form", ["init", "initial", "nested"])
def test_trees_are_given_back_as_they_came(ghn, form):
    """FrozenDict where there was one, at any depth."""
    model = Normed()
    initial = model.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    if form == "init":
        with flax.config.temp_flip_flag("return_frozendict", True):
            expected = model.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
            found, _ = ghn_jax.predict_model(*ghn, Normed(), IMAGES)
        assert isinstance(found, FrozenDict)
    else:
        expected = freeze(initial) if form == "initial" else {
            "params": freeze(initial["params"]), "batch_stats": initial["batch_stats"]
        }  # fmt: skip
        found, _ = ghn_jax.predict_model(*ghn, model, IMAGES, initial=expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    usual, _ = ghn_jax.predict_model(*ghn, Normed(), IMAGES)
    jax.tree.map(np.testing.assert_array_equal, unfreeze(freeze(found)), usual)


@pytest.mark.parametrize("first, second", [(True, 1), (1, True)])
def test_equal_arguments_are_not_the_same_call(ghn, first, second):
    """True == 1, but the model tells them apart."""

    def channels(model, wide):
        found, _ = ghn_jax.predict_model(*ghn, model, IMAGES, wide=wide)
        return found["params"]["Dense_0"]["kernel"].shape[0]

    model = Normed()
    assert [channels(model, first), channels(model, second)] in ([32, 16], [16, 32])


@dataclasses.dataclass(frozen=True)
class Width:
    """Channels, of which neither `==` nor the text tells."""

    channels: int = dataclasses.field(compare=False, repr=False)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, width):
        channels = width[0] if isinstance(width, list) else width.channels
        return nn.Dense(10)(nn.Conv(channels, (3, 3))(x).mean((1, 2)))


def test_arguments_that_seem_equal_or_were_changed(ghn):
    def channels(width):
        found, _ = ghn_jax.predict_model(*ghn, model, IMAGES, width=width)
        return found["params"]["Conv_0"]["bias"].size

    model, listed = Wide(), [3]
    assert [channels(Width(3)), channels(Width(5)), channels(listed)] == [3, 5, 3]
    listed[0] = 5
    assert channels(listed) == 5


def test_a_model_is_traced_again_only_where_it_has_to_be():
    model = Normed()
    call = {"initial": None, "seed": 0}
    first = trace_once(model, IMAGES, 1, **call, call={"wide": True})
    assert trace_once(model, IMAGES, 1, **call, call={"wide": True}) is first
    with flax.config.temp_flip_flag("return_frozendict", True):
        frozen = trace_once(model, IMAGES, 1, **call, call={"wide": True})
    assert isinstance(frozen.rebuild(frozen.leaves), FrozenDict)
    assert not isinstance(first.rebuild(first.leaves), FrozenDict)


class Reads(nn.Module):
    """Reads values while it is called: as an index, as a condition, as a size, ..."""

    how: str

    @nn.compact
    def __call__(self, x):
        rates = jnp.linspace(0, 0.5, 3)
        if self.how == "item":
            x = x * rates[1].item()
        elif self.how == "index":
            x = x * (0.1, 0.2)[jnp.argmin(rates)]
        elif self.how == "condition":
            x = x if rates[0] > 1 else 2 * x
        elif self.how == "text":
            self.sow("intermediates", f"{rates[1]:.3f}", x)
        elif self.how == "mask":
            x = x * rates[rates > 0.3][0]
        elif self.how == "slice":
            x = x * rates[: jnp.argmin(rates) + 1][0]
        elif self.how == "size":
            x = x + jnp.zeros((jnp.argmin(rates) + 1, 1))
        elif self.how == "shape":
            x = x.reshape((1, jnp.argmin(rates) + 32, 32, 3))
        elif self.how == "set":
            x = x * len({rates[1]})
        elif self.how == "wait":
            x = x * rates.block_until_ready()[1]
        elif self.how == "dlpack":  # as torch.tensor(rates) does
            x = x * len(rates.__dlpack_device__())
        elif self.how == "numpy":
            x = x * np.asarray(rates)[1]
        return nn.Dense(10)(x.mean((1, 2)))


HOW = ["item", "index", "condition", "numpy", "text", "mask", "slice", "size", "shape"]
HOW += ["set", "wait", "dlpack"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("initial", [False, True])
def test_values_that_are_read_while_tracing(ghn, how, initial):
    model = Reads(how)
    made = Reads("none") if how == "set" else model  # arrays are in no set, traced or not
    given = {"initial": made.init(jax.random.key(0), jnp.zeros(IMAGES.shape))} if initial else {}
    with pytest.raises(ValueError, match=r"Reads reads .* \(line \d+ of .*forms_of_models.*np.lin"):
        ghn_jax.predict_model(*ghn, model, IMAGES, **given)


@pytest.mark.parametrize("index", ["array", "text"])
def test_layers_that_a_variable_chooses(ghn, index):
    class Chosen(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 10, rngs=nnx.Rngs(i)) for i in range(2)])
            self.which = nnx.Variable(jnp.ones((), jnp.int32))

        def __call__(self, x):
            return self.layers[self.which[...] if index == "array" else index](x.mean((1, 2)))

    error, message = (ValueError, r"Chosen reads the value .*\(line .*self\.which")
    if index == "text":
        error, message = TypeError, "Invalid index type"
    with pytest.raises(error, match=message):
        ghn_jax.predict_model(*ghn, Chosen(), IMAGES)


def test_other_errors_of_a_model_are_its_own(ghn):
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(x.mean((1, 2)) + None)

    with pytest.raises(TypeError, match="unsupported operand"):
        ghn_jax.predict_model(*ghn, Broken(), IMAGES)


class Dropped(nnx.Module):
    """Takes random numbers where it is called."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.drop = nnx.Dropout(0.1)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        return self.head(self.drop(nnx.relu(self.conv(x)).mean((1, 2)), rngs=rngs))


def test_random_numbers_given_to_the_call(ghn):
    model, rngs = Dropped(nnx.Rngs(0)), nnx.Rngs(1)
    found, report = ghn_jax.predict_model(*ghn, model, IMAGES, rngs=rngs)
    assert len(report.predicted) == 4
    assert rngs.default.count[...] == 0  # not used up
    still, _ = ghn_jax.predict_model(*ghn, Dropped(nnx.Rngs(0)), IMAGES, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(found.conv.kernel[...], still.conv.kernel[...])
    assert np.isfinite(found(jnp.ones(IMAGES.shape), rngs=rngs)).all()


class Inside(nnx.Module):
    """Takes random numbers, and a norm that it updates, somewhere in an argument."""

    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.1)
        self.head = nnx.Linear(3, 10, rngs=rngs)

    def __call__(self, x, context, name=""):
        x = self.drop(x.mean((1, 2)), rngs=context["random"][0])
        return self.head(context["norm"](x) if name == "normed" else x)


def test_random_numbers_and_modules_inside_of_arguments(ghn):
    rngs, norm = nnx.Rngs(1), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    context = {"random": [rngs, None], "norm": norm, "text": "a"}
    _, report = ghn_jax.predict_model(
        *ghn, Inside(nnx.Rngs(0)), IMAGES, context=context, name="normed"
    )
    assert len(report.predicted) == 2
    assert rngs.default.count[...] == 0
    assert not np.any(norm.mean[...])


def test_updates_of_what_is_no_part_of_the_model(ghn):
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    class Outside(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(3, 10, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(norm(x).mean((1, 2)))

    with pytest.raises(ValueError, match=r"updates BatchStat \(line .*norm\(x\).*no part of the"):
        ghn_jax.predict_model(*ghn, Outside(), IMAGES)


# --- Outputs and arguments as models have them ----------------------------------------------------


@flax.struct.dataclass
class Output:
    """As Hugging Face's models return."""

    logits: jax.Array
    hidden: jax.Array | None = None


@dataclasses.dataclass
class PlainOutput:
    """A dataclass that JAX does not know."""

    scores: jax.Array
    features: dict


class Returning(nn.Module):
    """Logits and features in some container."""

    how: str

    @nn.compact
    def __call__(self, x, noisy=False):
        x = nn.Conv(8, (3, 3), 8, name="stem")(x).mean((1, 2))
        if noisy:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        features = nn.Dense(6, name="features")(x)
        logits = nn.Dense(10, name="head")(x)
        return {
            "tuple": (logits, {"features": features}),
            "dict": {"features": features, "logits": logits, "name": "a"},
            "dataclass": Output(logits, features),
            "plain": PlainOutput(logits, {"features": features}),
            "single": Output(logits),
            "list": [features, logits],
            "nested": {"a": (features, {"b": logits})},
            "loss": (logits.mean(), logits, {"features": features}),
        }[self.how]


class Methods(nn.Module):
    """Called by another method than `__call__`."""

    def setup(self):
        self.embedding = nn.Dense(10)

    def embed(self, x):
        return self.embedding(x.mean((1, 2)))


OUTPUTS = [
    ("tuple", None), ("dict", None), ("dataclass", None), ("plain", None), ("single", None),
    ("list", 1), ("list", "1"), ("nested", "a/1/b"), ("dataclass", "logits"), ("loss", None),
]  # fmt: skip


@pytest.mark.parametrize(("how", "output"), OUTPUTS)
def test_logits_among_what_a_model_returns(how, output):
    traced = trace(Returning(how), IMAGES, 1, output=output, call={})
    reading = traced.reading
    assert reading.outputs == 10
    left = {traced.paths[leaf]: why for leaf, why in reading.reasons.items()}
    both = {"features/kernel", "features/bias"} if how != "single" else set()
    assert set(left) == both | {p for p in left if p.startswith("features")}
    assert set(left.values()) == {"it does not reach the output"}


def test_outputs_that_have_to_be_named(ghn):
    for how in ("list", "nested"):
        with pytest.raises(ValueError, match=r"returns 2 arrays \(.*\(1, 6\).*Name it, as in outp"):
            ghn_jax.predict_model(*ghn, Returning(how), IMAGES)
    with pytest.raises(ValueError, match=r"no output 'x'; allowed: '0' \(1, 6\), '1' \(1, 10\)"):
        ghn_jax.predict_model(*ghn, Returning("list"), IMAGES, output="x")
    graph = ghn_jax.model_graph(Returning("list"), IMAGES, output=0)
    assert graph.param_shapes[graph.classifier[0]] == (6, 8)


class Opaque:
    """A class that JAX does not know."""

    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("container", "named"),
    [
        (Opaque, "a value of the class Opaque, in which"),
        (lambda x: (Opaque(x), None), r"class tuple \(with Opaque\)"),
        (lambda x: None, "returns None"),
    ],
)
@pytest.mark.parametrize("output", [None, "logits"])
def test_outputs_that_jax_cannot_look_into(ghn, container, named, output):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return container(nn.Dense(10)(x.mean((1, 2))))

    with pytest.raises(ValueError, match=f"{named}.*register_pytree_node_class"):
        ghn_jax.predict_model(*ghn, Net(), IMAGES, output=output)


def test_arguments_of_apply(ghn):
    """`method`, `rngs` and `mutable` are what `apply` takes, beside the call's own."""
    key = jax.random.key(1)
    for options in (
        {"rngs": {"noise": key}, "noisy": True, "mutable": ["intermediates"]},
        {"rngs": key, "noisy": True, "mutable": True},
        {"mutable": "batch_stats"},
    ):
        reading = trace(Returning("dict"), IMAGES, 1, call=options).reading
        assert len(reading.graph) == 6
    traced = trace(Methods(), IMAGES, 1, call={"method": "embed"})
    assert traced.paths == ["embedding/bias", "embedding/kernel"]


class Wrapper:
    """As Hugging Face's models hold their module and its parameters."""

    def __init__(self, module, params=None):
        self.module, self._params = module, params

    @property
    def params(self):
        if self._params is None:
            raise ValueError("`params` cannot be accessed")
        return self._params


def test_objects_that_hold_a_module_and_its_parameters(ghn):
    initial = Returning("dict").init(jax.random.key(3), jnp.ones(IMAGES.shape))
    wrapper = Wrapper(Returning("dict"), initial["params"])
    found, report = ghn_jax.predict_model(*ghn, wrapper, IMAGES)
    assert [p.path for p in report.left] == ["features/bias", "features/kernel"]
    kept = found["params"]["features"]["kernel"]
    np.testing.assert_array_equal(kept, initial["params"]["features"]["kernel"])
    for other in (Wrapper(Returning("dict")), Wrapper(Returning("dict"), initial)):
        assert len(ghn_jax.model_graph(other, IMAGES)) == len(ghn_jax.model_graph(wrapper, IMAGES))
