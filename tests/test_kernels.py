"""The executor's array operations and their hand-written gradients against Lax's and Flax's."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ghn_jax import kernels

CHANNELS, FEATURES = 6, 5
SIZES = (2, 7, 8)  # smaller than kernels, odd, even


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def images(size: int) -> np.ndarray:
    return random(3, size, size + 3, CHANNELS)  # not square


def reference_conv(x, w, strides, dilation=1, groups=1):
    pads = [(dilation * (k - 1) // 2,) * 2 for k in w.shape[:2]]
    return lax.conv_general_dilated(
        x, w, strides, pads, rhs_dilation=(dilation,) * 2, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def assert_same(function, reference, *args):
    """Equal values and equal gradients with respect to every argument."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *args):
        y, vjp = jax.vjp(f, *args)
        return y, *vjp(random(*y.shape, seed=1))

    results = run(function, *args), run(reference, *args)
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kernel, strides",
    [((k, k), (s, s)) for k in (1, 3, 5, 7) for s in (1, 2)]
    # The halves of a factorised convolution, the stride of large images' stems, its own padding.
    + [((1, 7), (1, 1)), ((1, 7), (1, 2)), ((7, 1), (1, 1)), ((7, 1), (2, 1)), ((3, 3), (4, 4))],
)
def test_conv(size, kernel, strides):
    w = random(*kernel, CHANNELS, FEATURES, seed=2)
    assert_same(
        lambda x, w: kernels.conv(x, w, strides),
        lambda x, w: reference_conv(x, w, strides),
        images(size), w,
    )  # fmt: skip


@pytest.mark.parametrize("stride", [1, 4])
def test_conv_of_images(stride):
    """From three channels to 32, which runs with four."""
    x, w = random(2, 9, 8, 3), random(5, 5, 3, 32, seed=2)
    assert_same(
        lambda x, w: kernels.conv(x, w, (stride,) * 2),
        lambda x, w: reference_conv(x, w, (stride,) * 2),
        x, w,
    )  # fmt: skip


def test_pointwise():
    w = random(CHANNELS, FEATURES, seed=2)
    assert_same(
        kernels.pointwise, lambda x, w: reference_conv(x, w[None, None], (1, 1)), images(7), w
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise(size, k, stride, dilation):
    assert_same(
        lambda x, w: kernels.depthwise(x, w, stride, dilation),
        lambda x, w: reference_conv(x, w[:, :, None], (stride,) * 2, dilation, CHANNELS),
        images(size), random(k, k, CHANNELS, seed=2),
    )  # fmt: skip


POOLING = ((3, 3), ((1, 1), (1, 1)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
def test_avg_pool(size, stride):
    window, padding = POOLING
    assert_same(
        lambda x: kernels.avg_pool(x, stride),
        lambda x: nn.avg_pool(x, window, (stride,) * 2, padding, count_include_pad=False),
        images(size),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(size, stride, ties):
    window, padding = POOLING
    x = images(size)
    assert_same(
        lambda x: kernels.max_pool(x, stride),
        lambda x: nn.max_pool(x, window, (stride,) * 2, padding),
        np.maximum(x, 0) if ties else x,  # after a ReLU, many values are equal
    )


def batch_norm(z, scale, bias):
    mean, variance = z.mean((0, 1, 2)), z.var((0, 1, 2))
    return (z - mean) * (scale * lax.rsqrt(variance + 1e-5)) + bias


def test_batch_norm():
    # Off-centre and of small variance: the mean and the epsilon matter.
    z = 0.01 * images(7) + 0.1
    vectors = random(CHANNELS, seed=2), random(CHANNELS, seed=3)
    assert_same(
        lambda z, a, b: kernels.batch_norm(z, a, b, jnp.array(True)), batch_norm, z, *vectors
    )


def test_batch_norm_is_flax_on_batch_statistics():
    z, scale, bias = images(8), random(CHANNELS, seed=2), random(CHANNELS, seed=3)
    module = nn.BatchNorm(use_running_average=False, epsilon=1e-5)
    statistics = {"mean": np.zeros(CHANNELS), "var": np.ones(CHANNELS)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
    expected, _ = module.apply(variables, z, mutable=["batch_stats"])
    actual = kernels.batch_norm(z, scale, bias, jnp.array(True))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_batch_norm_off_is_the_identity():
    vectors = random(CHANNELS, seed=2), random(CHANNELS, seed=3)
    assert_same(
        lambda z, a, b: kernels.batch_norm(z, a, b, jnp.array(False)),
        lambda z, a, b: z + 0 * a + 0 * b,
        images(7), *vectors,
    )  # fmt: skip


def test_one_program_switches_batch_norm():
    """Whether there is batch norm is data: architectures with and without share a program."""
    traces = []

    @jax.jit
    def run(z, scale, bias, on):
        traces.append(0)
        return kernels.batch_norm(z, scale, bias, on)

    z, scale, bias = images(7), random(CHANNELS, seed=2), random(CHANNELS, seed=3)
    assert not np.allclose(run(z, scale, bias, True), run(z, scale, bias, False))
    assert len(traces) == 1


def test_attend():
    q, k, v = (random(2, 3, 5, 4, seed=i) for i in range(3))  # images, heads, positions, features

    def attend(q, k, v):
        logits = jnp.einsum("bhid,bhjd->bhij", q, k) / 2  # the root of the features
        return jnp.einsum("bhij,bhjd->bhid", nn.softmax(logits), v)

    assert_same(kernels.attend, attend, q, k, v)
