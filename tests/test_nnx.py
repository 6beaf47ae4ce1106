"""NNX models: predicted as Linen models are, and given to PyTorch layer by layer."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ghn_jax

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


@pytest.fixture(scope="module")
def ghn():
    model = ghn_jax.GHN()
    return model, model.init_variables(0)


def rows(report):
    return {p.path: p for p in report.parameters}


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


class Dropped(nnx.Module):
    """Takes random numbers in its call, for dropout, as the argument that holds them."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.head = nnx.Linear(3, 10, rngs=rngs)

    def __call__(self, x, rngs=None, context=None):
        rngs = context["rngs"][0] if context else rngs
        return self.head(self.dropout(self.norm(x).mean((1, 2)), rngs=rngs))


def test_objects_given_twice_stay_one():
    class Pair(nnx.Module):
        def __init__(self):
            self.head = nnx.Linear(3, 10, rngs=nnx.Rngs(0))

        def __call__(self, x, one=None, two=None, more=None):
            assert one is two
            assert more["holder"].rngs is one
            return self.head(x.mean((1, 2)))

    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

    rngs = nnx.Rngs(0)
    call = {"one": rngs, "two": rngs, "more": {"holder": Holder(rngs)}}
    assert len(ghn_jax.model_graph(Pair(), IMAGES, **call)) == 4


@pytest.mark.parametrize("form", ["rngs", "stream", "within", "key"])
def test_random_numbers_given_to_the_call(form):
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))

    def arguments():
        rngs = nnx.Rngs(dropout=1)
        return {
            "rngs": {"rngs": rngs},
            "stream": {"rngs": rngs.dropout},
            "within": {"context": {"rngs": [rngs], "other": None}},
            "key": {"rngs": rngs.dropout()},
        }[form]

    model = Dropped()
    given = arguments()
    logits = ghn_jax.apply_on_batch(model, None, images, **given)
    averaged = ghn_jax.average_statistics(model, None, [images, 2 * images], **given)
    layers = ghn_jax.activation_statistics(model, None, images, **given)
    assert [layer.layer for layer in layers] == ["norm", "head"]
    mean = 1.5 * images.mean((0, 1, 2))
    np.testing.assert_allclose(averaged.norm.mean[...], mean, rtol=1e-4, atol=1e-6)
    # Those given are not used up, and are what the model would have used.
    np.testing.assert_allclose(logits, Dropped()(images, **given), rtol=1e-5, atol=1e-6)


STACKED = {
    "kernel is (3, 8, 4), but 2-dimensional": lambda rngs: nnx.Linear(8, 4, rngs=rngs),
    "kernel is (3, 8, 2), but 2-dimensional": lambda rngs: nnx.Linear(
        8, 2, use_bias=False, rngs=rngs
    ),
    "kernel is (3, 5, 1, 2), but 3-dimensional": lambda rngs: nnx.Conv(1, 2, (5,), rngs=rngs),
    "embedding is (3, 5, 2), but 2-dimensional": lambda rngs: nnx.Embed(5, 2, rngs=rngs),
    "scale is (3, 8), but 1-dimensional": lambda rngs: nnx.LayerNorm(8, rngs=rngs),
    "mean is (3, 8), but 1-dimensional": lambda rngs: nnx.BatchNorm(
        8, use_scale=False, use_bias=False, rngs=rngs
    ),
    "query.kernel is (3, 4, 2, 2), but 3-dimensional": lambda rngs: nnx.MultiHeadAttention(
        2, 4, rngs=rngs
    ),
}


@pytest.mark.parametrize("message", STACKED)
def test_stacked_layers_are_given_one_by_one(message):
    """Their axis is none of a convolution; of each alone the tensors are those of one layer."""

    @nnx.vmap
    def stack(key):
        return STACKED[message](nnx.Rngs(key))

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([stack(jax.random.split(jax.random.key(0), 3))])

    net = Net()
    with pytest.raises(ValueError, match=rf"blocks.0 is .* stacked .*{re.escape(message)} in a"):
        ghn_jax.to_torch(net)
    graphdef, state = nnx.split(net.blocks[0])
    shapes = {name: x.shape for name, x in ghn_jax.to_torch(STACKED[message](nnx.Rngs(0))).items()}
    for i in range(3):
        one = ghn_jax.to_torch(nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], state)))
        assert {name: x.shape for name, x in one.items()} == shapes
