"""`predict`: every tensor in its place, and a report of all of them."""

import dataclasses
import json

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze

import ghn_jax
from ghn_jax.tracing.model_graph import trace

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def ghn():
    model = ghn_jax.GHN()
    return model, model.init_variables(0)


class Small(nn.Module):
    """A bit of everything.

    Attributes:
      classes: of the last layer.
      param_dtype: of the first layer.
    """

    classes: int = 10
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        c = 96
        x = nn.Conv(c, (3, 3), 4, param_dtype=self.param_dtype, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Conv(c, (3, 3), feature_group_count=c, use_bias=False, name="depthwise")(x)
        x = nn.Conv(c, (5, 5), feature_group_count=4, use_bias=False, name="grouped")(x)
        x = x.reshape(len(x), -1, c)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, c))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c)), x], 1)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, 65, c))
        x = nn.MultiHeadDotProductAttention(4, name="attention")(x)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])


@pytest.fixture(scope="module")
def small(ghn):
    return ghn_jax.predict_model(*ghn, Small(), IMAGES)


def rows(report):
    return {p.path: p for p in report.parameters}


def test_design_space_networks_get_what_the_hypernetwork_predicts(ghn):
    model, variables = ghn
    arch = ghn_jax.evaluation_set("test")[3].replace(n_cells=3, C=16)
    network = ghn_jax.build_network(arch)
    predicted, report = ghn_jax.predict_model(model, variables, network, IMAGES, strict=True)
    expected = model.predict(variables, arch)
    assert jax.tree.structure(predicted["params"]) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (predicted["params"], expected)), strict=True):
        # Nodes are in another order, so that sums over edges are rounded otherwise.
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert report.nodes == len(model.graph(arch))


@pytest.mark.parametrize("name", sorted(ghn_jax.zoo.MODELS))
def test_zoo(name, ghn):
    """Shapes only: nothing is compiled, and the largest have half a gigabyte of parameters."""
    hypernetwork, ghn_variables = ghn
    model = ghn_jax.zoo.MODELS[name]()
    reports = []

    def shapes(ghn_variables):
        variables, report = ghn_jax.predict_model(hypernetwork, ghn_variables, model, IMAGES)
        reports.append(report)
        return variables

    predicted = jax.eval_shape(shapes, ghn_variables)
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGES.shape))
    assert jax.tree.map(jnp.shape, predicted) == jax.tree.map(jnp.shape, expected)
    (report,) = reports
    sizes = [leaf.size for leaf in jax.tree.leaves(expected["params"])]
    assert [p.size for p in report.parameters] == sizes
    left = {p.path.split("/")[-1] for p in report.left}
    assert left == {"convnext_tiny": {"layer_scale"}, "vit_b_16": {"class_token"}}.get(name, set())
    assert all(p.norm is None for p in report.predicted)


def test_the_same_model_is_traced_once(ghn):
    """And one that equals it again: a class that it uses may be another by now."""
    traced = 0

    class Counting(nn.Module):
        width: int = 8

        @nn.compact
        def __call__(self, x, train: bool = False):
            nonlocal traced
            traced += 1
            return nn.Dense(10)(nn.Conv(self.width, (3, 3))(x).mean((1, 2)))

    model = Counting()
    first, _ = ghn_jax.predict_model(*ghn, model, IMAGES)
    once = traced
    again, _ = ghn_jax.predict_model(*ghn, model, IMAGES)
    assert traced == once
    jax.tree.map(np.testing.assert_array_equal, first, again)
    larger = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    for how in (
        lambda: ghn_jax.predict_model(*ghn, Counting(), IMAGES),
        lambda: ghn_jax.predict_model(*ghn, model, larger),
        lambda: ghn_jax.predict_model(*ghn, model, IMAGES, seed=1),
        lambda: ghn_jax.predict_model(*ghn, model, IMAGES, train=True),
        lambda: ghn_jax.predict_model(*ghn, model, IMAGES, initial=first),
    ):
        before = traced
        how()
        assert traced > before
    ghn_jax.predict_model(*ghn, model, IMAGES)
    other = jax.tree.map(lambda v: 2 * v, ghn[1])
    different, _ = ghn_jax.predict_model(ghn[0], other, model, IMAGES)
    assert np.any(different["params"]["Conv_0"]["kernel"] != first["params"]["Conv_0"]["kernel"])


def test_running_averages_are_at_their_initial_values(small):
    statistics = small[0]["batch_stats"]["norm"]
    np.testing.assert_array_equal(statistics["mean"], np.zeros(96))
    np.testing.assert_array_equal(statistics["var"], np.ones(96))


def test_layouts(ghn, small):
    """Each tensor is its node's, transposed and reshaped as the module's axes say."""
    model, variables = ghn
    predicted, report = small
    params = predicted["params"]
    reading = trace(Small(), IMAGES, 50, call={}).reading
    paths = [p.path for p in report.parameters]
    tensors = model.tensors(variables, reading.graph)

    def tensor(path):
        (placement,) = reading.placements[paths.index(path)]
        return tensors[placement.node][placement.tensor]

    def close(value, expected):
        np.testing.assert_allclose(value, expected, atol=1e-6)

    attention = params["attention"]
    assert tensor("attention/query/kernel").shape == (96, 96)
    close(attention["query"]["kernel"], tensor("attention/query/kernel").reshape(96, 4, 24))
    close(attention["value"]["bias"], tensor("attention/value/bias").reshape(4, 24))
    close(attention["out"]["kernel"], tensor("attention/out/kernel").reshape(4, 24, 96))
    assert params["depthwise"]["kernel"].shape == (3, 3, 1, 96)
    close(params["depthwise"]["kernel"], tensor("depthwise/kernel"))
    close(params["grouped"]["kernel"], tensor("grouped/kernel"))
    close(params["norm"]["scale"], tensor("norm/scale"))
    close(params["norm"]["bias"], tensor("norm/bias"))
    close(params["position"][:, 1:], tensor("position").reshape(1, 64, 96))


def test_weights_of_any_layout(ghn):
    """A model that keeps (out, in) and (in, out, height, width) gets them transposed."""
    model, variables = ghn

    class Transposed(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("conv", nn.initializers.normal(), (3, 8, 5, 3))
            x = jax.lax.conv_general_dilated(
                x, w, (4, 4), "SAME", dimension_numbers=("NHWC", "IOHW", "NHWC")
            )
            w = self.param("dense", nn.initializers.normal(), (10, 8))
            return jnp.einsum("bc,oc->bo", x.mean((1, 2)), w)

    class Usual(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (5, 3), 4, use_bias=False, name="conv")(x)
            return nn.Dense(10, use_bias=False, name="dense")(x.mean((1, 2)))

    ours = ghn_jax.predict_model(model, variables, Transposed(), IMAGES, strict=True)[0]["params"]
    usual = ghn_jax.predict_model(model, variables, Usual(), IMAGES, strict=True)[0]["params"]
    np.testing.assert_array_equal(ours["conv"], usual["conv"]["kernel"].transpose(2, 3, 0, 1))
    np.testing.assert_array_equal(ours["dense"], usual["dense"]["kernel"].T)


def test_a_classifier_is_found_by_where_the_output_comes_from(ghn):
    """Without a bias, and as SqueezeNet's convolution, it is decoded as classifiers are."""

    class Last(nn.Module):
        convolution: bool

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(64, (3, 3), 8, use_bias=False, name="first")(x)
            if self.convolution:
                return nn.relu(nn.Conv(10, (1, 1), use_bias=False, name="last")(x)).mean((1, 2))
            return nn.Dense(10, use_bias=False, name="last")(x.mean((1, 2)))

    model, variables = ghn
    for convolution in (False, True):
        _, report = ghn_jax.predict_model(model, variables, Last(convolution), IMAGES, strict=True)
        # A classifier's kernel has all of its classes, others would be slices of 64 channels.
        assert rows(report)["last/kernel"].how == "decoded"
        assert rows(report)["first/kernel"].how == "sliced"


def test_the_report(small):
    predicted, report = small
    by_path = rows(report)
    assert by_path["first/kernel"].how == "tiled 2x1"
    assert by_path["grouped/kernel"].how == "tiled 2x1"
    assert by_path["grouped/kernel"].primitive == "sep_conv"
    assert by_path["grouped/kernel"].node_shape == (96, 24, 5, 5)
    assert by_path["depthwise/kernel"].how == "tiled 2"
    assert by_path["head/kernel"].how == "tiled 2"
    assert by_path["head/bias"].how == "decoded"
    assert by_path["position"].note.startswith("the first of 65 positions is left")
    (token,) = report.left
    assert token.path == "token"
    assert "concatenated to activations in Small" in token.note
    kernel = by_path["first/kernel"]
    norm = np.linalg.norm(np.asarray(predicted["params"]["first"]["kernel"]))
    assert kernel.norm == pytest.approx(norm, rel=1e-5)
    draws = nn.initializers.he_normal()(jax.random.key(0), (3, 3, 3, 96))
    assert kernel.he_norm == pytest.approx(float(jnp.linalg.norm(draws)), rel=0.1)
    data = report.to_dict()
    assert json.loads(json.dumps(data))["left"] == 96
    total = sum(leaf.size for leaf in jax.tree.leaves(predicted["params"]))
    assert data["predicted"] + data["left"] == total
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.parameters) + 1 + len(report.notes)
    assert any(line.startswith("token ") and "initial" in line for line in lines)
    assert f"predicted {data['predicted']:,} values" in str(report)


def test_shapes_off_the_tables_are_told(ghn):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(61, (2, 2), 8, use_bias=False)(x)
            return nn.Dense(10)(x.mean((1, 2)))

    _, report = ghn_jax.predict_model(*ghn, Odd(), IMAGES)
    note = rows(report)["Conv_0/kernel"].note
    assert note == "encoded with out 61 as 64, height 2 as 3, width 2 as 3"


def test_what_is_left_is_as_it_was_initialised(ghn, small):
    @jax.jit
    def initial(key):
        params = Small().init(key, jnp.zeros(IMAGES.shape))["params"]
        return params["token"], params["position"]

    token, position = initial(jax.random.key(0))
    np.testing.assert_allclose(small[0]["params"]["token"], token, rtol=1e-6)
    np.testing.assert_allclose(small[0]["params"]["position"][:, 0], position[:, 0], rtol=1e-6)
    other, _ = ghn_jax.predict_model(*ghn, Small(), IMAGES, seed=1)
    assert not np.allclose(other["params"]["token"], token)
    given = jax.tree.map(lambda x: jnp.full(x.shape, 7.0), small[0])
    kept, _ = ghn_jax.predict_model(*ghn, Small(), IMAGES, initial=given)
    assert float(kept["params"]["token"].min()) == 7
    assert float(kept["batch_stats"]["norm"]["mean"].min()) == 7
    assert float(jnp.abs(kept["params"]["first"]["kernel"]).max()) < 7


def test_strict(ghn):
    with pytest.raises(ValueError, match=r"1 of 18 parameters would be left .*token: concat"):
        ghn_jax.predict_model(*ghn, Small(), IMAGES, strict=True)


@pytest.mark.parametrize("classes", [10, 37])
def test_heads_that_are_left(ghn, small, classes):
    options = {"keep_head": True} if classes == 10 else {}
    predicted, report = ghn_jax.predict_model(*ghn, Small(classes), IMAGES, **options)
    why = {p.path: p.note for p in report.left if p.path != "token"}
    reason = "keep_head"
    if classes == 37:
        reason = "the classifier is for 37 classes, the hypernetwork for 10"
    assert why == {"head/kernel": reason, "head/bias": reason}
    assert predicted["params"]["head"]["kernel"].shape == (96, classes)
    # All else is as if the model had the hypernetwork's classes.
    for name in ("first", "attention"):
        for ours, theirs in zip(
            jax.tree.leaves(predicted["params"][name]),
            jax.tree.leaves(small[0]["params"][name]),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_kernels_that_no_decoder_makes(ghn):
    class Large(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.Conv(8, (13, 13), 8)(x).mean((1, 2)))

    _, report = ghn_jax.predict_model(*ghn, Large(), IMAGES)
    (left,) = report.left
    assert left.path == "Conv_0/kernel"
    assert "kernels of this hypernetwork go up to 11x11" in left.note


def test_training_mode_and_types(ghn):
    predicted, report = ghn_jax.predict_model(
        *ghn, Small(param_dtype=jnp.bfloat16), IMAGES, train=True
    )
    assert predicted["params"]["first"]["kernel"].dtype == jnp.bfloat16
    assert predicted["params"]["head"]["kernel"].dtype == jnp.float32
    assert len(report.left) == 1


def test_inputs_that_are_no_images_are_told(ghn):
    sample = jax.ShapeDtypeStruct((2, 12), jnp.float32)

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Dense(8)(x)))

    _, report = ghn_jax.predict_model(*ghn, Dense(), sample, strict=True)
    assert any("(2, 12) is not a batch of images" in note for note in report.notes)


def test_predictions_are_differentiable(ghn):
    class Tiny(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.Conv(4, (3, 3), 8)(x).mean((1, 2)))

    model, variables = ghn

    def loss(variables):
        predicted, _ = ghn_jax.predict_model(model, variables, Tiny(), IMAGES)
        return (Tiny().apply(predicted, jnp.ones(IMAGES.shape)) ** 2).sum()

    # Traced only: whatever left JAX on its way would raise an error.
    gradient = jax.eval_shape(jax.grad(loss), variables)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, variables)


# --- What is filled with one number on purpose ----------------------------------------------------


class Adapted(nn.Module):
    """LoRA, a gated residual, a last layer of zeros, and what is as usual."""

    def constant(self, name, shape, value):
        return self.param(name, nn.initializers.constant(value), shape)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), 8, name="stem")(x).mean((1, 2))
        lora_a = self.param("lora_a", nn.initializers.normal(), (8, 2))
        x = nn.Dense(8, name="dense")(x) + (x @ lora_a) @ self.constant("lora_b", (2, 8), 0.0)
        gate = nn.LayerNorm(scale_init=nn.initializers.zeros, name="gate")
        x = x + gate(nn.relu(nn.LayerNorm(name="norm")(x)))
        bias = nn.initializers.constant(-10.0)
        return nn.Dense(10, kernel_init=nn.initializers.zeros, bias_init=bias, name="head")(x)


CONSTANTS = {"lora_b": "0", "gate/scale": "0", "head/kernel": "0", "head/bias": "-10"}


@pytest.mark.parametrize("given", [False, True])
def test_what_is_constant_on_purpose_is_left(ghn, given):
    initial = Adapted().init(jax.random.key(0), jnp.ones(IMAGES.shape)) if given else None
    found, report = ghn_jax.predict_model(*ghn, Adapted(), IMAGES, initial=initial)
    assert {p.path: p.note.split(";")[0] for p in report.left} == {
        path: f"on purpose, the model fills it with {value}" for path, value in CONSTANTS.items()
    }
    np.testing.assert_array_equal(found["params"]["head"]["bias"], -10.0)
    np.testing.assert_array_equal(found["params"]["lora_b"], 0.0)
    assert "predict_constants=True" in report.left[0].note
    all_of_it, report = ghn_jax.predict_model(
        *ghn, Adapted(), IMAGES, initial=initial, predict_constants=True, strict=True
    )
    assert float(jnp.abs(all_of_it["params"]["lora_b"]).min()) > 0


def test_constants_of_stacks_and_of_nnx_modules(ghn):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(8, kernel_init=nn.initializers.zeros, name="out")(x), None

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x = nn.Conv(8, (3, 3), 8)(x).mean((1, 2))
            return nn.Dense(10)(scanned(name="blocks")(x, None)[0])

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            zeros = nnx.initializers.zeros_init()
            self.out = nnx.Linear(3, 10, kernel_init=zeros, rngs=rngs)
            self.first = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.first(x)).mean((1, 2)))

    for model in (Blocks(), Nnx(nnx.Rngs(0))):
        _, report = ghn_jax.predict_model(*ghn, model, IMAGES)
        assert [p.path.removeprefix("blocks/") for p in report.left] == ["out/kernel"]
        assert "fills it with 0" in report.left[0].note


def test_kernels_that_the_model_rescales_are_told(ghn):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Conv(8, (3, 3), 8, name="a"))(x).mean((1, 2))
            x = nn.SpectralNorm(nn.Dense(8, name="b"))(x, update_stats=False)
            w = self.param("c", nn.initializers.normal(), (8, 8))
            return nn.Dense(10)(x @ ((w - w.mean(0)) / (w.std(0) + 1e-5)))

    _, report = ghn_jax.predict_model(*ghn, Normed(), IMAGES)
    (note,) = report.notes
    assert note.startswith("3 times: the model rescales ")


# --- NNX ------------------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(16, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.relu(self.norm(self.conv(x))))


class Modern(nnx.Module):
    def __init__(self, rngs, classes=10):
        self.stem = nnx.Conv(3, 16, (3, 3), strides=8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.scale = nnx.Param(jnp.full(16, 0.5))
        self.head = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head((self.attention(x.reshape(len(x), -1, 16)) * self.scale).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_nnx(ghn, training):
    module = Modern(nnx.Rngs(0))
    if not training:
        module.eval()
    before = jax.tree.map(jnp.copy, nnx.state(module, nnx.Param, nnx.BatchStat))
    predicted, report = ghn_jax.predict_model(*ghn, module, jnp.zeros(IMAGES.shape))
    assert isinstance(predicted, Modern)
    assert [p.path for p in report.left] == ["scale"]
    assert rows(report)["blocks/1/norm/scale"].primitive == "bn"
    assert rows(report)["attention/query/kernel"].node_shape == (16, 16)
    np.testing.assert_array_equal(predicted.scale[...], 0.5)
    norm = rows(report)["stem/kernel"].norm
    assert float(jnp.linalg.norm(predicted.stem.kernel[...])) == pytest.approx(norm, rel=1e-5)
    assert predicted(jnp.ones((2, 16, 16, 3))).shape == (2, 10)
    # The module given is not changed, not even by running the new one.
    after = nnx.state(module, nnx.Param, nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_nnx_and_linen_get_the_same(ghn):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(16, (3, 3), 4, name="stem")(x))
            return nn.Dense(10, name="head")(x.mean((1, 2)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 16, (3, 3), strides=4, rngs=rngs)
            self.head = nnx.Linear(16, 10, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.stem(x)).mean((1, 2)))

    linen, _ = ghn_jax.predict_model(*ghn, Linen(), IMAGES)
    module, _ = ghn_jax.predict_model(*ghn, Nnx(nnx.Rngs(0)), IMAGES)
    np.testing.assert_array_equal(module.stem.kernel[...], linen["params"]["stem"]["kernel"])
    np.testing.assert_array_equal(module.head.bias[...], linen["params"]["head"]["bias"])


def test_bad_nnx(ghn):
    abstract = nnx.eval_shape(lambda: Modern(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the module is abstract .* but scale stays"):
        ghn_jax.predict_model(*ghn, abstract, IMAGES)
    with pytest.raises(ValueError, match="an NNX module holds its initial values"):
        ghn_jax.predict_model(*ghn, Modern(nnx.Rngs(0)), IMAGES, initial={})


def test_no_params(ghn):
    with pytest.raises(ValueError, match="Small has no parameters"):
        ghn_jax.predict_model(*ghn, Small(), IMAGES, initial={"batch_stats": {}})


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


class Reads(nn.Module):
    """Reads values while it is called: as text, as an index, as a condition or by NumPy."""

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
        else:
            x = x * np.asarray(rates)[1]
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.parametrize("how", ["item", "index", "condition", "numpy"])
@pytest.mark.parametrize("initial", [False, True])
def test_values_that_are_read_while_tracing(ghn, how, initial):
    model = Reads(how)
    given = {"initial": model.init(jax.random.key(0), jnp.zeros(IMAGES.shape))} if initial else {}
    with pytest.raises(ValueError, match=r"Reads reads .* \(line \d+ of .*test_prediction.*np.lin"):
        ghn_jax.predict_model(*ghn, model, IMAGES, **given)


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
        }[self.how]


class Methods(nn.Module):
    """Called by another method than `__call__`."""

    def setup(self):
        self.embedding = nn.Dense(10)

    def embed(self, x):
        return self.embedding(x.mean((1, 2)))


OUTPUTS = [
    ("tuple", None), ("dict", None), ("dataclass", None), ("plain", None), ("single", None),
    ("list", 1), ("list", "1"), ("nested", "a/1/b"), ("dataclass", "logits"),
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
