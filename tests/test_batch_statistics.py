"""Batch norm on the statistics of a batch, of any model."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import ghn_jax

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def ghn():
    model = ghn_jax.GHN()
    return model, model.init_variables(0)


class OwnNorm(nn.Module):
    """A batch norm of the model's own."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        return x - mean.value


def test_statistics_of_a_norm_of_the_models_own():
    images = jnp.ones((4, 8, 8, 3))
    model = nn.Sequential([nn.Conv(4, (3, 3)), OwnNorm()])
    variables = model.init(jax.random.key(0), images)
    for call in (
        lambda: ghn_jax.apply_on_batch(model, variables, images),
        lambda: ghn_jax.average_statistics(model, variables, [images]),
    ):
        with pytest.raises(ValueError, match="layers_1 is a OwnNorm, which keeps mean in 'batch_s"):
            call()
    # What spectral norm keeps there are no statistics of a batch.
    model = nn.SpectralNorm(nn.Dense(3))
    variables = model.init(jax.random.key(0), images, update_stats=False)
    ghn_jax.apply_on_batch(model, variables, images, update_stats=False)


class NnxNormed(nnx.Module):
    """Batch norm that is told by the module's mode, or (`told`) by an argument of the call."""

    def __init__(self, norm=nnx.BatchNorm, told=False):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), strides=4, use_bias=False, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)
        self.told = {"use_running_average": True} if told else {}

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x), **self.told)).mean((1, 2)))


@pytest.mark.parametrize("told", [False, True])
def test_statistics_of_nnx_modules(told):
    images = np.random.default_rng(0).standard_normal((3, 4, 16, 16, 3), np.float32)
    model = NnxNormed(told=told)
    model.eval()
    trained = NnxNormed()
    trained.train()
    expected = trained(images[0])
    for variables in (None, model):
        logits = ghn_jax.apply_on_batch(model, variables, images[0])
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    averaged = ghn_jax.average_statistics(model, None, images)
    features = np.stack([model.conv(x) for x in images])
    means = features.mean((1, 2, 3)).mean(0)
    np.testing.assert_allclose(averaged.norm.mean[...], means, rtol=1e-4, atol=1e-6)
    variances = features.var((1, 2, 3)).mean(0)
    np.testing.assert_allclose(averaged.norm.var[...], variances, rtol=1e-4)
    # The module given is as it was, and the new one is of the same class.
    np.testing.assert_array_equal(model.norm.mean[...], 0.0)
    assert type(averaged.norm) is nnx.BatchNorm
    assert type(model.norm) is nnx.BatchNorm
    assert averaged.norm.use_running_average
    assert averaged.norm.momentum == model.norm.momentum


class NnxOwnNorm(nnx.Module):
    """A batch norm of the model's own."""

    def __init__(self, features, rngs):
        self.mean = nnx.BatchStat(jnp.zeros(features))

    def __call__(self, x):
        return x - self.mean[...]


def test_statistics_of_nnx_norms_of_the_models_own():
    images = jnp.ones((2, 16, 16, 3))
    model = NnxNormed(NnxOwnNorm)
    for call in (
        lambda: ghn_jax.apply_on_batch(model, model, images),
        lambda: ghn_jax.average_statistics(model, model, [images]),
    ):
        with pytest.raises(ValueError, match="norm is a NnxOwnNorm, which keeps mean in nnx.Batch"):
            call()
    none = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"the module has no nnx\.BatchStat"):
        ghn_jax.average_statistics(none, None, [images])
    with pytest.raises(ValueError, match="no batch was given"):
        ghn_jax.average_statistics(NnxNormed(), None, [])
    with pytest.raises(ValueError, match=r"one array \(2, 16, 16, 3\); .* or \[images\] for one"):
        ghn_jax.average_statistics(NnxNormed(), None, images)


# --- Statistics elsewhere than in Flax's batch norm -----------------------------------------------


class Elsewhere(nn.Module):
    """Keeps arrays in some collection beside a batch norm of Flax's."""

    collection: str
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(4, (3, 3))(x))
        kept = [self.variable(self.collection, n, jnp.zeros, x.shape[-1:]) for n in self.names]
        return x + sum(v.value for v in kept)


ERROR, WARNING, NOTHING = "error", "warning", "nothing"
KEPT = [
    (("mean", "var"), "stats", ERROR),
    (("running_mean", "running_var"), "state", ERROR),
    (("moving_mean", "moving_variance"), "ema", ERROR),
    (("mean", "var"), "constants", WARNING),  # a frozen batch norm, perhaps
    (("running_mean",), "buffers", WARNING),
    (("mean", "std"), "state", WARNING),  # of pixels, perhaps
    (("index", "meaning"), "state", NOTHING),
]


def told(kind, calls, message):
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            if kind == NOTHING:
                call()
                continue
            error = ValueError if kind == ERROR else RuntimeWarning
            with pytest.raises(error, match=message):
                call()


@pytest.mark.parametrize("names, collection, kind", KEPT)
def test_statistics_in_other_collections(names, collection, kind):
    images = jnp.ones((2, 8, 8, 3))
    model = Elsewhere(collection, names)
    variables = model.init(jax.random.key(0), images)
    calls = [
        lambda: ghn_jax.apply_on_batch(model, variables, images),
        lambda: ghn_jax.average_statistics(model, variables, [images]),
        lambda: ghn_jax.activation_statistics(model, variables, images),
    ]
    told(kind, calls, f"the model keeps {', '.join(names)} in '{collection}' .*batch norm")


class Buffer(nnx.Variable):
    """What is not updated."""


@pytest.mark.parametrize(
    "names, variable, kind",
    [
        (("mean", "var"), nnx.Variable, ERROR),
        (("running_mean",), nnx.Cache, ERROR),
        (("mean", "var"), Buffer, WARNING),
        (("mean", "std"), nnx.Variable, WARNING),
        (("index",), nnx.Variable, NOTHING),
    ],
)
def test_statistics_in_other_variables(names, variable, kind):
    class Own(nnx.Module):
        def __init__(self, features, rngs):
            self.real = nnx.BatchNorm(features, rngs=rngs)
            for name in names:
                setattr(self, name, variable(jnp.zeros(features)))

        def __call__(self, x):
            return self.real(x) + sum(getattr(self, name)[...] for name in names)

    images = jnp.ones((2, 16, 16, 3))
    model = NnxNormed(Own)
    calls = [
        lambda: ghn_jax.apply_on_batch(model, None, images),
        lambda: ghn_jax.average_statistics(model, None, [images]),
        lambda: ghn_jax.activation_statistics(model, None, images),
    ]
    told(kind, calls, f"norm keeps {', '.join(names)} in (nnx.)?{variable.__name__} .*batch norm")


def test_statistics_of_the_other_kind_of_module():
    """NNX's batch norm within Linen, and Linen's within NNX."""
    images = jnp.ones((2, 8, 8, 3))

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    linen = nnx.bridge.ToLinen(nnx.BatchNorm, args=(3,))
    variables = linen.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="the model is a ToLinen, which keeps mean, var"):
        ghn_jax.apply_on_batch(linen, variables, images)
    module = nnx.bridge.ToNNX(Normed(), rngs=nnx.Rngs(0)).lazy_init(images)
    with pytest.raises(ValueError, match="ToNNX, which keeps BatchNorm_0/mean, BatchNorm_0/var"):
        ghn_jax.apply_on_batch(module, None, images)


# --- What is given, and given back ----------------------------------------------------------------


class Linen(nn.Module):
    """Convolution, batch norm, classifier."""

    @nn.compact
    def __call__(self, x, train=False, axis=None, form="array"):
        x = nn.Conv(8, (3, 3), strides=4)(x)
        y = nn.BatchNorm(use_running_average=not train, axis_name=axis)(x).mean((1, 2))
        self.sow("intermediates", "features", y)
        logits = nn.Dense(10)(y)
        if form == "array":
            return logits
        return Returned(logits, {"name": "text", "none": None}) if form == "dataclass" else {
            "logits": logits, "name": "text"
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Returned:
    """A dataclass that JAX does not know."""

    logits: jax.Array
    more: dict


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((4, 16, 16, 3), np.float32)


@pytest.fixture(scope="module")
def variables(images):
    return Linen().init(jax.random.key(0), images)


@pytest.mark.parametrize("form", ["frozen", "nested", "dicts"])
def test_averaged_variables_are_a_tree_as_they_came(variables, images, form):
    given = {
        "frozen": freeze(variables),
        "nested": {name: freeze(tree) for name, tree in variables.items()},
        "dicts": variables,
    }[form]
    averaged = ghn_jax.average_statistics(Linen(), given, [images])
    assert jax.tree.structure(averaged) == jax.tree.structure(given)
    expected = ghn_jax.average_statistics(Linen(), variables, [images])
    for ours, theirs in zip(jax.tree.leaves(averaged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("mutable", [["intermediates"], "intermediates", True, nn.DenyList([])])
def test_more_is_mutable(variables, images, mutable):
    expected = ghn_jax.average_statistics(Linen(), variables, [images])
    averaged = ghn_jax.average_statistics(Linen(), variables, [images], mutable=mutable)
    jax.tree.map(np.testing.assert_array_equal, averaged, expected)
    found = ghn_jax.activation_statistics(Linen(), variables, images, mutable=mutable)
    assert [layer.kind for layer in found] == ["Conv", "BatchNorm", "Dense"]


def test_a_model_that_updates_something_else(images):
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("calls", "n", lambda: jnp.zeros((), jnp.int32))
            calls.value += 1  # refused where the collection is not mutable
            return nn.BatchNorm(use_running_average=False)(x)

    given = Counting().init(jax.random.key(0), images)
    averaged = ghn_jax.average_statistics(Counting(), given, [images], mutable=["calls"])
    assert int(averaged["calls"]["n"]) == int(given["calls"]["n"])
    mean = averaged["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("form", ["dict", "dataclass"])
def test_outputs_that_jax_does_not_know_with_a_named_axis(variables, images, form):
    expected = ghn_jax.apply_on_batch(Linen(), variables, images)
    found = ghn_jax.apply_on_batch(Linen(), variables, images, axis="batch", form=form)
    if form == "dataclass":
        assert isinstance(found, Returned) and found.more == {"name": "text", "none": None}
        logits = found.logits
    else:
        assert found["name"] == "text"
        logits = found["logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


class Wrapper:
    """As Hugging Face's models are."""

    def __init__(self, variables):
        self.module, self.params = Linen(), variables


def test_wrappers(variables, images):
    wrapper = Wrapper(variables)
    expected = ghn_jax.apply_on_batch(Linen(), variables, images)
    averaged = ghn_jax.average_statistics(Linen(), variables, [images])
    layers = ghn_jax.activation_statistics(Linen(), variables, images)
    for given in (variables, None):
        logits = ghn_jax.apply_on_batch(wrapper, given, images)
        np.testing.assert_array_equal(logits, expected)
        found = ghn_jax.average_statistics(wrapper, given, [images])
        jax.tree.map(np.testing.assert_array_equal, found, averaged)
        assert ghn_jax.activation_statistics(wrapper, given, images) == layers
        ghn_jax.norm_check(wrapper, given, images)


@pytest.mark.parametrize(
    "name", ["apply_on_batch", "average_statistics", "activation_statistics", "norm_check"]
)
def test_wrong_models_and_variables(variables, images, name):
    module = NnxNormed()
    abstract = nnx.eval_shape(NnxNormed)
    state = nnx.state(module)
    batch = [images] if name == "average_statistics" else images
    for model, given, error, message in (
        (Linen, variables, TypeError, "the model is the class Linen; give"),
        (NnxNormed, None, TypeError, "the model is the class NnxNormed; give"),
        (len, variables, TypeError, "the model is a builtin_function_or_method; give"),
        (Linen(), variables["params"], ValueError, "have no 'params' but 'Conv_0', 'BatchNorm_0'"),
        (Linen(), (variables, None), TypeError, r"are a tuple; .* give the first"),
        (Wrapper(variables), (variables, None), TypeError, r"are a tuple; .* give the first"),
        (Linen(), None, TypeError, "the variables are None; allowed"),
        (Linen(), module, TypeError, r"a Linen module, but .* an NNX module \(NnxNormed"),
        (module, variables, TypeError, "an NNX module, but the variables are a dict"),
        (module, state, TypeError, "an NNX module, but the variables are a State"),
        (abstract, None, ValueError, "the NnxNormed is abstract"),
    ):
        with pytest.raises(error, match=message):
            getattr(ghn_jax, name)(model, given, batch)
    with pytest.raises(ValueError, match="a batch is a tuple; give arrays"):
        ghn_jax.average_statistics(Linen(), variables, [(images, 0)])


FUNCTIONS = ["apply_on_batch", "average_statistics", "activation_statistics", "norm_check"]


@pytest.mark.parametrize(
    ("kind", "name"), [("linen", f) for f in FUNCTIONS] + [("nnx", f) for f in FUNCTIONS[:2]]
)
def test_images_that_do_not_fit(variables, images, name, kind):
    model, given = (Linen(), variables) if kind == "linen" else (NnxNormed(), None)
    other = images[..., :1]
    batch = [other] if name == "average_statistics" else other
    shape = ", ".join(map(str, other.shape))
    message = rf"with images of shape \({shape}\).*; images are \(B, H, W, C\), of the size"
    with pytest.raises(ValueError, match=message):
        getattr(ghn_jax, name)(model, given, batch)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_images_that_are_no_arrays(variables, images, kind):
    model, given = (Linen(), variables) if kind == "linen" else (NnxNormed(), None)
    for other, message in (
        (None, "cannot be called with None"),
        ({"image": images}, "cannot be called with a dict"),
        (np.array([["a"]]), "the images are of type <U1; allowed"),
    ):
        with pytest.raises(TypeError, match=message):
            ghn_jax.apply_on_batch(model, given, other)
    for other, message in (
        (None, "batches is None; allowed"),
        ({"image": images}, "batches is a dict; allowed"),
        ([np.array([["a"]])], "the images are of type <U1; allowed"),
    ):
        with pytest.raises(TypeError, match=message):
            ghn_jax.average_statistics(model, given, other)


def test_models_that_take_a_dict_of_images(variables, images):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, batch):
            return Linen(name="within")(batch["image"])

    given = {name: {"within": tree} for name, tree in variables.items()}
    found = ghn_jax.apply_on_batch(Named(), given, {"image": images})
    expected = ghn_jax.apply_on_batch(Linen(), variables, images)
    np.testing.assert_array_equal(found, expected)
