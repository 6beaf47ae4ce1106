"""`predict`: every tensor in its place, and a report of all of them."""

import json
import re

import flax.linen as nn
import freeze_torchvision as frozen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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


@pytest.mark.parametrize("name", frozen.FAMILIES)
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
    assert left == {
        "convnext_tiny": {"layer_scale"},
        "vit_b_16": {"class_token"},
        "swin_t": {"relative_position_bias_table"},
    }.get(name, set())
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


@pytest.mark.parametrize(
    ("shape", "noted"), [((1, 3, 16, 16), True), ((1, 16, 16, 3), False), ((1, 3, 4, 3), False)]
)
def test_images_in_the_order_of_pytorch_are_noted(ghn, shape, noted):
    sample = jax.ShapeDtypeStruct(shape, jnp.float32)
    _, report = ghn_jax.predict_model(*ghn, nn.Conv(4, (1, 1)), sample)
    assert any("PyTorch's order is (B, C, H, W)" in note for note in report.notes) == noted


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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda v: v["params"], r"it has first, .*not 'params'; allowed.*initial=\{'params'"),
        (lambda v: {"batch_stats": {}}, "it has batch_stats, not 'params'"),
        (lambda v: {}, "it has nothing, not 'params'"),
        (lambda v: (v, None), "initial is a tuple"),
        (lambda v: nnx.Linear(3, 3, rngs=nnx.Rngs(0)), "initial is a Linear"),
        (lambda v: {"params": v["params"]}, 'collection "batch_stats".*allowed: all'),
        (lambda v: Small(5).init(jax.random.key(0), jnp.zeros((1, 32, 32, 1))), "not of this mod"),
        (lambda v: nn.Dense(3).init(jax.random.key(0), jnp.zeros(3)), "Could not find parameter"),
    ],
)
def test_initial_values_that_are_not_the_models(ghn, wrong, said):
    variables = Small().init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    with pytest.raises(ValueError, match="(?s)^initial is .*allowed: all that") as error:
        ghn_jax.predict_model(*ghn, Small(), IMAGES, initial=wrong(variables))
    assert re.search(said, str(error.value))


def test_hypernetworks_that_are_none(ghn):
    model, variables = ghn
    for given, said in (
        ((variables, model), "the hypernetwork is a dict"),
        ((type(model), variables), "the hypernetwork is the class GHN"),
        ((ghn, Small()), "the hypernetwork is a tuple"),
        ((model, variables["params"]), "variables are a dict of "),
        ((model, None), "variables are None"),
    ):
        with pytest.raises(TypeError, match=f"{said}.*allowed"):
            ghn_jax.predict_model(*given, Small(), IMAGES)


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


CONSTANT_INITIALIZERS = {
    "NumPy": lambda key, shape, dtype: np.full(shape, 0.5, dtype),
    "a deviation of 0": nn.initializers.normal(0.0),
    "a product": lambda key, shape, dtype: 0.0 * jax.random.normal(key, shape, dtype),
    "a tile": lambda key, shape, dtype: jnp.tile(jnp.zeros(shape[1:], dtype), (shape[0], 1)),
    "parts": lambda key, shape, dtype: jnp.concatenate([jnp.ones((n, 10), dtype) for n in (1, 2)]),
    "padding": lambda key, shape, dtype: jnp.pad(jnp.zeros((1, 10), dtype), ((0, 2), (0, 0))),
    "an update": lambda key, shape, dtype: jnp.zeros(shape, dtype).at[0].set(0),
    "a choice": lambda key, shape, dtype: jnp.where(
        jax.random.bernoulli(key, 0.5, shape), jnp.zeros(shape, dtype), 0.0
    ),
}
VARIED_INITIALIZERS = {
    "NumPy": lambda key, shape, dtype: np.arange(30, dtype=dtype).reshape(shape),
    "parts": lambda key, shape, dtype: jnp.concatenate([jnp.full((n, 10), n) for n in (1, 2)]),
    "padding": lambda key, shape, dtype: jnp.pad(jnp.ones((1, 10), dtype), ((0, 2), (0, 0))),
    "an update": lambda key, shape, dtype: jnp.zeros(shape, dtype).at[0].set(1),
    "a product": lambda key, shape, dtype: 0.5 * jax.random.normal(key, shape, dtype),
}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("how", CONSTANT_INITIALIZERS)
def test_constants_are_known_however_they_are_made(how, scanned):
    """And are computed so: those that vary are not taken for constants."""

    def constant(init):
        class Turn(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(10, use_bias=False, kernel_init=init)(x)

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                turns = nn.scan(Turn, {"params": 0}, split_rngs={"params": True}, length=2)
                x = x.mean((1, 2))
                return turns()(x, None)[1].sum(0) if scanned else Turn()(x, None)[1]

        traced = trace(Net(), IMAGES, 1, call={})
        (value,) = traced.initial([0])
        expected = Net().init(jax.random.key(0), jnp.zeros(IMAGES.shape))
        np.testing.assert_allclose(value, jax.tree.leaves(expected)[0], rtol=1e-5)
        return traced.constant(0), value

    found, value = constant(CONSTANT_INITIALIZERS[how])
    assert found is not None
    np.testing.assert_array_equal(value, found)
    if how in VARIED_INITIALIZERS:
        assert constant(VARIED_INITIALIZERS[how])[0] is None


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
