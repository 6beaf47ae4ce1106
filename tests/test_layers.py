"""The fast forms of array operations and their gradients by hand against the definitions."""

import functools
import inspect

import jax
import numpy as np
import pytest

from ghn_jax.deepnets1m import layers
from ghn_jax.engine import cpu_layers, gpu_layers

FORMS = (cpu_layers, gpu_layers)
CHANNELS, FEATURES = 6, 5
SIZES = (2, 7, 8)  # smaller than layers, odd, even


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def images(size: int) -> np.ndarray:
    return random(3, size, size + 3, CHANNELS)  # not square


def assert_same(name, args, *options):
    """Equal values and equal gradients with respect to every array."""

    def call(function, *args):
        return function(*args, *options)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *args):
        y, vjp = jax.vjp(f, *args)
        return y, *vjp(random(*y.shape, seed=1))

    wanted, *results = (
        jax.tree.leaves(run(functools.partial(call, getattr(module, name)), *args))
        for module in (layers, *FORMS)
    )
    for result in results:
        for actual, expected in zip(result, wanted, strict=True):
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
    assert_same("conv", (images(size), w), strides)


@pytest.mark.parametrize("stride", [1, 4])
def test_conv_of_images(stride):
    """From three channels to 32, which runs with four."""
    assert_same("conv", (random(2, 9, 8, 3), random(5, 5, 3, 32, seed=2)), (stride, stride))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("zeros", [(), (0,), (1,), (0, 2)])
def test_pointwise(stride, zeros):
    """Of parts, some of which are zeros."""
    parts = [None if i in zeros else random(3, 7, 10, CHANNELS, seed=i) for i in range(3)]
    w = random(1, 1, 3 * CHANNELS, FEATURES, seed=5)
    assert_same("pointwise", (parts, w), stride)


def test_pointwise_of_one_part():
    assert_same("pointwise", ([images(7)], random(1, 1, CHANNELS, FEATURES, seed=2)), 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_depthwise(size, k, stride, dilation):
    assert_same("depthwise", (images(size), random(k, k, 1, CHANNELS, seed=2)), stride, dilation)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
def test_avg_pool(size, stride):
    assert_same("avg_pool", (images(size),), stride)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_max_pool(size, stride, ties):
    x = images(size)
    # After a ReLU, many values are equal.
    assert_same("max_pool", (np.maximum(x, 0) if ties else x,), stride)


def test_attend():
    # Images, positions, heads, features.
    assert_same("attend", [random(2, 5, 3, 4, seed=i) for i in range(3)])


def test_attention_by_hand():
    """One head, two positions: what the definition is."""
    q, k, v = (random(1, 2, 1, 4, seed=i) for i in range(3))
    weights = np.exp(q[0, :, 0] @ k[0, :, 0].T / 2)  # the root of the features
    expected = weights / weights.sum(1, keepdims=True) @ v[0, :, 0]
    np.testing.assert_allclose(layers.attend(q, k, v)[0, :, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["conv", "depthwise"])
def test_convolutions_are_padded_as_in_pytorch(name):
    """The middle of the kernel stands on the pixel, whatever the stride and the dilation."""
    x, w = np.zeros((1, 9, 9, 1), np.float32), random(3, 3, 1, 1)
    x[0, 4, 4] = 1
    options = ((2, 2),) if name == "conv" else (2, 2)
    reach = 1 if name == "conv" else 2
    for module in (layers, *FORMS):
        y = np.asarray(getattr(module, name)(x, w, *options))[0, :, :, 0]
        assert y.shape == (5, 5)
        # The output pixel (i, j) stands on (2 i, 2 j).
        expected = np.zeros((5, 5))
        for i in range(5):
            for j in range(5):
                row, column = (4 - 2 * i) / (reach), (4 - 2 * j) / (reach)
                if abs(row) <= 1 and abs(column) <= 1 and row % 1 == column % 1 == 0:
                    expected[i, j] = w[int(row) + 1, int(column) + 1, 0, 0]
        np.testing.assert_allclose(y, expected, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_by_hand(stride):
    x = random(1, 5, 4, 1)
    for module in (layers, *FORMS):
        largest, mean = (f(x, stride)[0, ..., 0] for f in (module.max_pool, module.avg_pool))
        for i, j in np.ndindex(largest.shape):
            a, b = i * stride, j * stride
            window = x[0, max(a - 1, 0) : a + 2, max(b - 1, 0) : b + 2]
            assert largest[i, j] == window.max()
            assert mean[i, j] == pytest.approx(window.mean(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in dir(layers) if n[0] != "_"])
def test_forms_have_the_same_signature(name):
    functions = [getattr(module, name, None) for module in (layers, *FORMS)]
    if name in ("concatenate", "lax", "jax", "jnp", "nn", "Sequence", "annotations"):
        return
    first, *others = (list(inspect.signature(f).parameters) for f in functions)
    assert all(other == first for other in others)
