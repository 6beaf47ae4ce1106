"""Activations of any network, layer by layer, the check of predicted ones, and Fig. 8."""

import dataclasses
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ghn_jax
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.activations import LayerStatistics, compare_activations, recorder
from ghn_jax.plot.activations import activation_figure

EDGES = (("conv_1x1", 0), ("skip_connect", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), n_cells=2, C=8, fc_layers=1)


class Net(nn.Module):
    """A convolution behind a norm and one without; a linear layer that is called twice."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        # Under `nn.remat`, nothing that is noted on the side may leave the call.
        x = nn.remat(nn.Conv)(4, (3, 3), name="conv")(x).mean((1, 2))
        again = nn.Dense(4, name="again")
        return nn.Dense(3, name="head")(again(nn.relu(again(x))))


class Same(nnx.Module):
    """`Net` in NNX."""

    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.again, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        for name, leaves in params.items():
            for leaf, value in leaves.items():
                setattr(getattr(self, name), leaf, nnx.Param(value))

    def __call__(self, x):
        x = self.conv(nnx.relu(self.norm(self.stem(x)))).mean((1, 2))
        return self.head(self.again(nnx.relu(self.again(x))))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((8, 6, 6, 3), np.float32)


@pytest.fixture(scope="module")
def variables(images):
    variables = Net().init(jax.random.key(0), images)
    params = jax.tree.map(lambda x: x + 0.1, variables["params"])
    return {**variables, "params": params}


def by_hand(params, x):
    """The outputs of the layers, in order."""

    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    stem = convolve(x, params["stem"]["kernel"])
    norm = (stem - stem.mean((0, 1, 2))) / jnp.sqrt(stem.var((0, 1, 2)) + 1e-5)
    norm = norm * params["norm"]["scale"] + params["norm"]["bias"]
    conv = convolve(jax.nn.relu(norm), params["conv"]["kernel"]) + params["conv"]["bias"]
    once = conv.mean((1, 2)) @ params["again"]["kernel"] + params["again"]["bias"]
    twice = jax.nn.relu(once) @ params["again"]["kernel"] + params["again"]["bias"]
    head = twice @ params["head"]["kernel"] + params["head"]["bias"]
    return stem, norm, conv, once, twice, head


@pytest.fixture(scope="module")
def statistics():
    return recorder(Net(), train=False)


@pytest.fixture(scope="module")
def found(statistics, variables, images):
    return statistics(variables, images)


def test_layers_in_order_of_execution(found, variables, images):
    outputs = jax.jit(by_hand)(variables["params"], images)
    assert [layer.layer for layer in found] == ["stem", "norm", "conv", "again", "again (2)",
                                                "head"]  # fmt: skip
    assert [layer.kind for layer in found][:3] == ["Conv", "BatchNorm", "Conv"]
    assert [layer.normalised for layer in found] == [True, *[False] * 5]
    for layer, output in zip(found, outputs, strict=True):
        assert layer.mean == pytest.approx(float(output.mean()), rel=1e-3, abs=1e-5)
        assert layer.variance == pytest.approx(float(output.var()), rel=1e-3)
        assert layer.zeros == layer.non_finite == 0


def test_the_same_of_nnx(found, variables, images):
    model = Same(variables["params"])
    ours = ghn_jax.activation_statistics(model, model, images)
    for a, b in zip(ours, found, strict=True):
        assert a.layer == b.layer and a.normalised == b.normalised
        np.testing.assert_allclose((a.mean, a.variance), (b.mean, b.variance), rtol=1e-3, atol=1e-5)
    # The model given is as it was.
    assert type(model.stem) is nnx.Conv and model.norm.use_running_average
    assert float(jnp.abs(model.norm.mean[...]).max()) == 0


def test_nnx_norms_that_are_told_otherwise_and_named_axes(found, variables, images):
    class Told(Same):
        def __call__(self, x):
            x = nnx.relu(self.norm(self.stem(x), use_running_average=True))
            x = self.conv(x).mean((1, 2))
            return self.head(self.again(nnx.relu(self.again(x))))

    model = Told(variables["params"])
    model.norm.axis_name = "batch"
    for ours, expected in zip(
        ghn_jax.activation_statistics(model, None, images), found, strict=True
    ):
        assert ours.layer == expected.layer and ours.kind in (expected.kind, "Linear")
        assert ours.variance == pytest.approx(expected.variance, rel=1e-3)


def test_networks_of_the_design_space():
    network = build_network(SMALL, image_size=16)
    params = random_parameters(network, 16, seed=0)
    x = np.random.default_rng(0).standard_normal((8, 16, 16, 3), np.float32)
    found = ghn_jax.activation_statistics(network, {"params": params}, x)
    stem, last = found[0], found[-1]
    convolved = jax.lax.conv_general_dilated(
        x, params["stem_0"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert stem.layer == "stem.0.weight" and stem.kind == "Convolutions"
    assert stem.variance == pytest.approx(float(convolved.var()), rel=1e-3)
    assert last.kind == "Classifier" and not last.normalised
    norms = [layer for layer in found if layer.kind == "NormSum"]
    # Batch norm at scale 1 and bias 0; two of them are added up in some.
    assert norms[0].mean == pytest.approx(0, abs=1e-4)
    assert norms[0].variance == pytest.approx(1, abs=1e-2)
    assert {layer.normalised for layer in found if layer.kind == "Convolutions"} == {True}
    assert not any(layer.normalised for layer in norms)


def changed(variables, layer, change):
    params = dict(variables["params"])
    params[layer] = {**params[layer], "kernel": change(params[layer]["kernel"])}
    return {**variables, "params": params}


def test_what_explodes_vanishes_and_is_not_finite(statistics, found, variables, images):
    def check(layer, change):
        ours = statistics(changed(variables, layer, change), images)
        return compare_activations(ours, found, 10)

    assert check("stem", lambda k: 100 * k) == []  # a norm undoes it
    (finding,) = check("head", lambda k: k / 100)
    assert (finding.layer, finding.problem) == ("head", "vanishes")
    assert finding.factor == pytest.approx(0.01, rel=1e-2)
    findings = check("stem", lambda k: k.at[0, 0, 0, 0].set(jnp.nan))
    assert [f.problem for f in findings] == ["not finite"] * 6
    more = changed(variables, "conv", lambda k: 100 * k)
    message = r"of 4 of 6 layers.*: conv explodes \(100 times\), .* and 1 more; use a hypernetwork"
    with pytest.warns(RuntimeWarning, match=message):
        findings = ghn_jax.norm_check(Net(), more, images, reference=variables)
    assert [f.layer for f in findings] == ["conv", "again", "again (2)", "head"]
    assert {f.problem for f in findings} == {"explodes"}
    assert findings[0].factor == pytest.approx(100, rel=1e-2)


def test_without_a_reference_he_initialisation_is_one(images):
    model = Net()
    given = model.init(jax.random.key(0), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ghn_jax.norm_check(model, given, images) == []
    model = Same({})
    with pytest.warns(RuntimeWarning, match="conv explodes"):
        findings = ghn_jax.norm_check(model, thousandfold(model, "conv"), images)
    assert findings[0].layer == "conv" and 100 < findings[0].factor < 2000


def thousandfold(model, layer):
    return ghn_jax.tracing.map_parameters(
        model, lambda path, x: 1000 * x if path == f"{layer}/kernel" else x
    )


class Projection(nn.Module):
    name_: str

    @nn.compact
    def __call__(self, x):
        return x @ self.param(self.name_, nn.initializers.he_normal(), (x.shape[-1], 8))


class Own(nn.Module):
    """A kernel that is called otherwise; it may have another output, which is not named."""

    another: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Projection("weight", name="own")(x))
        x = nn.Dense(10, name="head")(x.mean((1, 2)))
        return (x, x) if self.another else x


class Stacked(nn.Module):
    """Layers stacked in one tensor, and one of many heads."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.relu(nn.Dense(32, kernel_init=nn.initializers.he_normal())(x)), None

        x = nn.Dense(32)(x).reshape(len(x), -1, 32)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=12, **axes)(name="blocks")(x, None)
        x = nn.MultiHeadDotProductAttention(16, qkv_features=512, name="attention")(x)
        return nn.Dense(10, name="head")(x.mean(1))


class OwnNNX(nnx.Module):
    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 8)))
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(x @ self.w[...]).mean((1, 2)))


def larger(variables, part):
    return ghn_jax.tracing.map_parameters(
        variables, lambda path, x: 1000 * x if part in path and x.ndim > 1 else x
    )


def layers_out_of_range(model, variables, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(f.layer, f.problem) for f in ghn_jax.norm_check(model, variables, images)]


@pytest.mark.parametrize(("model", "part"), [(Own(), "own"), (Stacked(), "value")])
def test_kernels_are_told_by_what_they_do(model, part, images):
    variables = model.init(jax.random.key(0), images)
    assert layers_out_of_range(model, variables, images) == []
    assert ("head", "explodes") in layers_out_of_range(model, larger(variables, part), images)


def test_kernels_of_nnx_are_told_by_what_they_do(images):
    model = OwnNNX(nnx.Rngs(0))
    assert layers_out_of_range(model, None, images) == []
    found = layers_out_of_range(model, larger(model, "w"), images)
    assert found == [("head", "explodes"), ("", "explodes")]


def test_what_cannot_be_judged_is_said(images):
    model = Own(another=True)
    variables = model.init(jax.random.key(0), images)
    with pytest.warns(RuntimeWarning, match="cannot judge own/weight: .* nor by tracing the mod"):
        assert ghn_jax.norm_check(model, variables, images) == []


class Within(nnx.Module):
    """Calls a block in a transformation, on an activation that it gives to a norm first."""

    def __init__(self, how, rngs):
        self.how, self.stem = how, nnx.Linear(3, 8, rngs=rngs)

        def block(rngs):
            return nnx.Sequential(nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs))

        self.block = nnx.vmap(block)(rngs.split(2)) if how == "scan" else block(rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        def call(module, x):
            return module(x)

        run = {
            "scan": nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry),
            "remat": nnx.remat(call),
            "jit": nnx.jit(call),
            "cond": lambda block, x: nnx.cond(x.sum() > 0, call, call, block, x),
        }[self.how]
        return self.head(run(self.block, self.stem(x)).mean((1, 2)))


@pytest.mark.parametrize("how", ["scan", "remat", "jit", "cond"])
def test_layers_within_transformations_of_nnx_are_left_out(how, images):
    model = Within(how, nnx.Rngs(0))
    found = ghn_jax.activation_statistics(model, None, images)
    assert [layer.layer for layer in found] == ["stem", "head"]
    assert layers_out_of_range(model, None, images) == []


def test_no_arrays_outlive_the_trace(images):
    for model in (Same({}), Within("remat", nnx.Rngs(0))):
        with jax.check_tracer_leaks():
            assert ghn_jax.activation_statistics(model, None, images)


def test_factors():
    def layers(*variances):
        return [LayerStatistics(str(i), "Conv", 0, v, 0, 0) for i, v in enumerate(variances)]

    findings = compare_activations(
        layers(81, 121, 1, 0, 0, 5, math.inf), layers(1, 1, 121, 4, 0, 0, 1), 10
    )
    assert [(f.layer, f.problem) for f in findings] == [
        ("1", "explodes"), ("2", "vanishes"), ("3", "vanishes"), ("5", "explodes"),
        ("6", "explodes"),
    ]  # fmt: skip
    assert [f.factor for f in findings] == pytest.approx([11, 1 / 11, 0, math.inf, math.inf])


@pytest.mark.parametrize("model", [Net(), Same({})])
def test_images_that_do_not_fit(model, variables, images):
    variables = variables if isinstance(model, Net) else model
    for wrong, error, said in (
        (images[..., :1], ValueError, r"with images of shape \(\d+, .* 1\)"),
        (None, TypeError, "cannot be called with None"),
    ):
        with pytest.raises(error, match=said):
            ghn_jax.activation_statistics(model, variables, wrong)


def test_what_cannot_be_looked_at(variables, images):
    for call, error, message in (
        (lambda: ghn_jax.activation_statistics(len, variables, images), TypeError,
         "is a builtin_function_or_method; give a Linen or an NNX module"),
        (lambda: ghn_jax.activation_statistics(nn.Dropout(0.5, deterministic=True), {}, images),
         ValueError, "Dropout has no layer with parameters"),
        (lambda: ghn_jax.activation_statistics(Net(), variables, images[:0]), ValueError,
         "has no images"),
        (lambda: ghn_jax.norm_check(Net(), variables, images, factor=1), ValueError,
         "factor is 1; allowed: more than 1"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_figure(tmp_path):
    layer = LayerStatistics("x", "Conv", 0, 1, 0, 0)
    layers = [layer, dataclasses.replace(layer, variance=math.inf), layer]
    figure = activation_figure({"a, begin": layers, "a, trained": layers[:1], "b": layers})
    panels = figure.axes
    assert [axes.get_yscale() for axes in panels] == ["linear", "log"]
    for axes in panels:
        first, second, third = axes.lines
        np.testing.assert_array_equal(first.get_ydata(), [1, np.nan, 1])
        assert first.get_color() == second.get_color() != third.get_color()
        assert first.get_linestyle() != second.get_linestyle()
    for curves, path, message in (
        ({}, None, "no curves"), ({"a": layers}, tmp_path / "x.svg", "allowed suffixes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            activation_figure(curves, path)
