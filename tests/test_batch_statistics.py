"""Batch norm on the statistics of a batch, of any model."""

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
