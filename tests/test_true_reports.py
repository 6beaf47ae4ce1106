"""Reports are true: what "does not reach the output" has a zero gradient, all else has none."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ghn_jax
from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.hypernet.tiling import CLASSIFIER, tile_kind
from ghn_jax.tracing.model_graph import trace
from ghn_jax.tracing.named_axes import bind_axes

FEATURES = jax.ShapeDtypeStruct((2, 8, 8, 8), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def ghn():
    model = ghn_jax.GHN(max_shape=(16, 16, 3, 3), features=8)
    return model, model.init_variables(0)


def param(module, name, shape):
    return module.param(name, nn.initializers.normal(), shape)


def tokens_of(x):
    return x.reshape(len(x), -1, x.shape[-1])


# --- Models: (module, input), features by way of `nn.Dense` and so on -----------------------------


def head_twice(m, x):
    head = nn.Dense(5, name="head")
    m.sow("intermediates", "map", head(x))
    return head(x.mean((1, 2)))


def positions_by_ids(m, x):
    x = tokens_of(nn.Conv(8, (3, 3), use_bias=False)(x))
    ids = jnp.expand_dims(jnp.arange(64), 0)
    return nn.Dense(5)((x + nn.Embed(64, 8, name="positions")(ids)).mean(1))


def grid_by_ids(m, x):
    rows, columns = jnp.meshgrid(jnp.arange(8), jnp.arange(8), indexing="ij")
    positions = nn.Embed(64, 8, name="positions")(rows * 8 + columns)
    return nn.Dense(5)((nn.Conv(8, (3, 3))(x) + positions).mean((1, 2)))


def more_ids_than_used(m, x):
    x = tokens_of(nn.Conv(8, (3, 3), use_bias=False)(x))
    return nn.Dense(5)((x + nn.Embed(100, 8, name="positions")(jnp.arange(64))).mean(1))


def resized_positions(method):
    def layer(m, x):
        table = jax.image.resize(param(m, "positions", (1, 7, 7, 8)), (1, 8, 8, 8), method)
        return nn.Dense(5)(nn.relu(nn.Conv(8, (3, 3))(x) + table).mean((1, 2)))

    return layer


def resized_tokens(m, x):
    table = param(m, "positions", (1, 50, 8))
    grid = jax.image.resize(table[:, 1:].reshape(1, 7, 7, 8), (1, 8, 8, 8), "bilinear")
    positions = jnp.concatenate([table[:, :1], grid.reshape(1, 64, 8)], 1)
    token = jnp.broadcast_to(param(m, "token", (1, 1, 8)), (2, 1, 8))
    x = jnp.concatenate([token, tokens_of(x)], 1) + positions
    return nn.Dense(5)(nn.Dense(8)(x)[:, 0])


def resized_features(m, x):
    x = jax.image.resize(nn.Conv(8, (3, 3), use_bias=False)(x), (2, 16, 16, 8), "bilinear")
    return nn.Dense(5)(nn.relu(x).mean((1, 2)))


def repeated_features(m, x):
    x = nn.Conv(8, (3, 3), use_bias=False)(x)
    x = nn.relu(jnp.repeat(jnp.repeat(x, 2, 1), 3, 2))
    return nn.Dense(5)(tokens_of(x).mean(1))


def repeated_positions(m, x):
    table = jnp.repeat(jnp.repeat(param(m, "positions", (1, 4, 4, 8)), 2, 1), 2, 2)
    return nn.Dense(5)(nn.relu(nn.Conv(8, (3, 3), use_bias=False)(x) + table).mean((1, 2)))


def rows_and_columns(m, x):
    table = (param(m, "rows", (8, 1, 8)) + param(m, "columns", (1, 8, 8))).reshape(64, 8)
    return nn.Dense(5)(nn.relu(tokens_of(nn.Conv(8, (3, 3), use_bias=False)(x)) + table).mean(1))


def class_attention(m, x):
    x = tokens_of(nn.Conv(8, (3, 3))(x))
    token = jnp.broadcast_to(param(m, "token", (1, 1, 8)), (2, 1, 8))
    for _ in range(2):
        both = jnp.concatenate([token, x], 1)
        token = token + nn.MultiHeadDotProductAttention(2)(token, both)
    return nn.Dense(5)(token[:, 0])


def summed_heads(m, x):
    x = nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2))
    return (nn.Dense(5)(x) + nn.Dense(5)(x)) / 2


def stacked_heads(m, x):
    x = nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2))
    return jnp.stack([nn.Dense(5)(x) for _ in range(3)]).mean(0)


def heads_in_one(m, x):
    x = nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2))
    return nn.DenseGeneral((3, 5))(x).mean(1)


def several_axes(m, x):
    norm = nn.BatchNorm(use_running_average=False, axis_name=("batch", "model"))
    x = nn.Conv(8, (3, 3), use_bias=False)(x)
    return jax.lax.pmean(nn.Dense(5)(nn.relu(norm(x)).mean((1, 2))), "devices")


def tied(m, x):
    table = nn.Embed(8, 8, name="table")
    nn.Dense(3, name="unused")(x)
    return table.attend(nn.Dense(8)(x.mean((1, 2))))


def printed(m, x):
    layer = nn.Dense(5, name="head")
    jax.debug.callback(lambda y: None, layer(x))  # kept, though it reaches nothing
    return layer(x.mean((1, 2)))


def shared_with_a_query(m, x):
    layer = nn.Dense(8, name="shared")
    query, x = layer(param(m, "query", (1, 8))), layer(tokens_of(x))
    return nn.Dense(5)(nn.relu(x * nn.sigmoid((x * query).sum(-1, keepdims=True))).mean(1))


def shared_with_a_prompt(m, x):
    conv, dense = nn.Conv(4, (3, 3), 4), nn.Dense(8)
    prompt, x = (
        dense(conv(y).mean((1, 2))) for y in (param(m, "prompt", (1, 8, 8, 8)), x)
    )  # fmt: skip
    return nn.Dense(5)(x * nn.sigmoid(prompt))


def recurrent(m, x):
    cell, x = nn.GRUCell(8, name="cell"), x.mean((1, 2))
    state = jnp.zeros_like(x)
    for _ in range(2):
        state, y = cell(state, x)
    return nn.Dense(5)(y)


def first_of_zeros(m, x):
    layer, x = nn.Dense(8, name="shared"), x.mean((1, 2))
    state = jnp.zeros_like(x)
    for _ in range(2):
        state = nn.tanh(x + layer(state))
    return nn.Dense(5)(state)


MODELS = {
    "a head used twice": (head_twice, {}),
    "positions looked up": (positions_by_ids, {"pos_enc": 1}),
    "a grid looked up": (grid_by_ids, {"pos_enc": 1}),
    "some positions looked up": (more_ids_than_used, {"pos_enc": 1}),
    "positions resized": (resized_positions("bilinear"), {"pos_enc": 1, "bias": 2, "glob_avg": 1}),
    "positions resized to the nearest": (resized_positions("nearest"), {"pos_enc": 1, "bias": 2}),
    "tokens resized": (resized_tokens, {"pos_enc": 1, "bias": 2}),
    "features resized": (resized_features, {"glob_avg": 1, "bias": 1}),
    "features repeated": (repeated_features, {"glob_avg": 1, "bias": 1}),
    "positions repeated": (repeated_positions, {"pos_enc": 1, "bias": 1, "glob_avg": 1}),
    "positions of rows and columns": (rows_and_columns, {"pos_enc": 1, "bias": 1, "glob_avg": 1}),
    "a class token with residuals": (class_attention, {"msa": 2, "bias": 9, "sum": 1}),
    "heads added up": (summed_heads, {"sum": 1, "bias": 3}),
    "heads stacked": (stacked_heads, {"bias": 4}),
    "heads in one": (heads_in_one, {}),
    "named axes": (several_axes, {"bn": 1, "glob_avg": 1}),
    "a tied table": (tied, {}),
    "a callback": (printed, {}),
    "a layer of a query too": (shared_with_a_query, {"bias": 2}),
    "layers of a prompt too": (shared_with_a_prompt, {"bias": 3}),
    "a layer of zeros first": (first_of_zeros, {"bias": 2}),
    "a recurrent cell": (recurrent, {}),
}

LEFT = {
    "some positions looked up": {"positions/embedding": "a resize from 100 to 64 positions"},
    "positions resized": {"positions": "a linear map, such as a resize,"},
    "positions resized to the nearest": {"positions": "a resize from 49 to 64 positions"},
    "positions repeated": {"positions": "a resize from 16 to 64 positions"},
    "positions of rows and columns": {
        "rows": "a resize from 8 to 64 positions",
        "columns": "combined with rows",
    },
    "tokens resized": {
        "positions": "concatenate",
        "token": "concatenated to activations",
    },
    "a class token with residuals": {
        "token": "concatenated to activations",
        "MultiHeadDotProductAttention_0/query/kernel": "image by image",
        "MultiHeadDotProductAttention_0/query/bias": "combined with",
    },
    "a layer of a query too": {"query": "combined with shared/kernel"},
    "layers of a prompt too": {"prompt": "a scale without a norm"},
    "a tied table": {
        "unused/kernel": "does not reach the output",
        "unused/bias": "does not reach the output",
    },
}


def module_of(function):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(self, x)

    return Net()


def gradient_norms(model, sample):
    """Of each parameter, at random values: initial zeros would hide one behind another."""
    draw = np.random.default_rng(0).standard_normal
    x = draw(sample.shape, np.float32)
    shapes = jax.eval_shape(bind_axes(model.init), jax.random.key(0), x)
    params = jax.tree.map(lambda v: draw(v.shape, np.float32) / 3, shapes["params"])
    rest = {name: jax.tree.map(lambda v: np.ones(v.shape, np.float32), tree)
            for name, tree in shapes.items() if name != "params"}  # fmt: skip

    @bind_axes
    def loss(params):
        y = model.apply({"params": params, **rest}, x, mutable=list(rest))[0]
        return (y * np.arange(1, y.size + 1, dtype=np.float32).reshape(y.shape)).sum()

    return [float(jnp.abs(g).sum()) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params))]


@pytest.mark.parametrize("name", MODELS)
def test_what_does_not_reach_the_output_has_no_gradient(name):
    function, nodes = MODELS[name]
    model = module_of(function)
    traced = trace(model, FEATURES, 1, call={})
    reasons = {traced.paths[leaf]: why for leaf, why in traced.reading.reasons.items()}
    expected = LEFT.get(name, {})
    assert set(reasons) == set(expected)
    for path, part in expected.items():
        assert part in reasons[path]
    primitives = [PRIMITIVES[p] for p in traced.reading.graph.primitives]
    assert {p: primitives.count(p) for p in nodes} == nodes
    norms = gradient_norms(model, FEATURES)
    for path, norm in zip(traced.paths, norms, strict=True):
        assert (norm == 0) == ("does not reach" in reasons.get(path, "")), path


@pytest.mark.parametrize("name", ["heads added up", "heads stacked"])
def test_all_heads_of_an_ensemble_are_classifiers(name, ghn):
    function, _ = MODELS[name]
    graph = trace(module_of(function), FEATURES, 1, call={}).reading.graph
    heads = [i for i, shape in enumerate(graph.param_shapes) if shape and shape[0] == 5]
    assert sorted(graph.classifier) == heads
    assert [tile_kind(graph, i) for i in heads] == list(CLASSIFIER) * (len(heads) // 2)
    _, report = ghn_jax.predict_model(*ghn, module_of(function), FEATURES)
    assert len(report.left) == len(heads)
    assert {p.note for p in report.left} == {
        "the classifier is for 5 classes, the hypernetwork for 10"
    }


def test_the_classes_of_heads_in_one_tensor_are_told(ghn):
    _, report = ghn_jax.predict_model(*ghn, module_of(heads_in_one), FEATURES)
    assert {p.note for p in report.left} == {
        "the last layer makes 15 values, of which come 5 outputs; the hypernetwork's classifiers "
        "are for 10 classes"
    }


def test_layers_side_by_side_are_no_heads():
    def beside(m, x):
        x = nn.Dense(8)(x.mean((1, 2)))
        return jnp.concatenate([nn.Dense(4)(x), nn.Dense(6)(x)], -1)

    def residual(m, x):
        x = nn.Dense(8)(x.mean((1, 2)))
        return x + nn.Dense(8)(nn.LayerNorm()(x))

    for function in (beside, residual):
        assert trace(module_of(function), FEATURES, 1, call={}).reading.graph.classifier == ()


# --- Named axes -----------------------------------------------------------------------------------


class Synchronised(nn.Module):
    """As Flax's own ImageNet example has its batch norm."""

    axis: str | None = "batch"

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), 4, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class SynchronisedNnx(nnx.Module):
    def __init__(self, axis):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), strides=4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, axis_name=axis, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_named_axes_are_bound(ghn):
    """On one device they add nothing: all is as without a name."""
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    found = []
    for model in (Synchronised(), Synchronised(None)):
        variables, report = ghn_jax.predict_model(*ghn, model, IMAGES)
        assert not report.left
        logits = ghn_jax.apply_on_batch(model, variables, images, train=False)
        averaged = ghn_jax.average_statistics(model, variables, [images], train=False)
        found.append((variables["params"], logits, averaged["batch_stats"]))
    jax.tree.map(np.testing.assert_array_equal, *found)
    graphs = [ghn_jax.model_graph(SynchronisedNnx(axis), IMAGES) for axis in ("batch", None)]
    np.testing.assert_array_equal(graphs[0].edges, graphs[1].edges)


def test_groups_of_an_axis_are_of_devices():
    norm = nn.BatchNorm(use_running_average=False, axis_name="i", axis_index_groups=[[0, 1]])
    with pytest.raises(ValueError, match=r"groups of the axis 'i' .*\(axis_index_groups=None\)"):
        ghn_jax.model_graph(nn.Sequential([nn.Conv(8, (3, 3), 4), norm]), IMAGES)


@pytest.mark.parametrize("axis", ["data-parallel", "my axis", "dp.inner", "a. To", ("a-b", "a b")])
def test_any_text_names_an_axis(axis):
    plain = ghn_jax.model_graph(Synchronised(None), IMAGES)
    for model in (Synchronised(axis), SynchronisedNnx(axis)):
        np.testing.assert_array_equal(ghn_jax.model_graph(model, IMAGES).edges, plain.edges)


@dataclasses.dataclass(frozen=True)
class Returned:
    """A class that JAX does not know."""

    logits: jax.Array
    name: str


@pytest.mark.parametrize(
    "container",
    [
        lambda y: {"logits": y, "name": "a", "none": None, "size": 3},
        lambda y: Returned(y, "a"),
        lambda y: [Returned(y, "a"), {"b": (y, np.ones(2))}],
    ],
)
def test_what_models_with_named_axes_return(container):
    def call(x):
        return container(jax.lax.psum(jax.lax.pmean(x, "my axis"), "other"))

    x = jnp.arange(3.0)
    found = bind_axes(call)(x)
    assert str(found) == str(container(x))


def test_named_axes_and_a_class_that_jax_does_not_know():
    class Opaque:
        def __init__(self, y):
            self.y = y

    with pytest.raises(
        ValueError, match="returns an object of Opaque; allowed.*register_pytree_node_class"
    ):
        bind_axes(lambda x: Opaque(jax.lax.pmean(x, "batch")))(jnp.ones(3))


def test_names_that_are_not_axes_stay_errors(ghn):
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(x) + undefined  # noqa: F821

    with pytest.raises(NameError, match="undefined"):
        ghn_jax.predict_model(*ghn, Wrong(), IMAGES)
