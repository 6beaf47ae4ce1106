"""Convolutions by Fourier coefficients against Lax's, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ghn_jax.engine import cpu_layers, fourier

KERNELS = ((3, 3), (5, 5), (7, 7), (3, 5), (1, 7), (7, 1))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def reference(x, w, strides=(1, 1)):
    pads = [(k // 2,) * 2 for k in w.shape[:2]]
    return lax.conv_general_dilated(x, w, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=3e-6)


# Smaller than layers, of an even and an odd size with each of them, not square.
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (9, 6), (11, 16)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_convolve_and_its_gradients(size, kernel):
    x, w, g = random(3, *size, 6), random(*kernel, 6, 5, seed=1), random(3, *size, 5, seed=2)
    y, vjp = jax.vjp(reference, x, w)
    assert_close(fourier.convolve(x, w), y)
    for actual, expected in zip(fourier.gradients(x, w, g), vjp(g), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_multiplications_are_those_of_the_program(kernel):
    x, w = random(4, 8, 6, 16), random(*kernel, 16, 24)

    def products(jaxpr) -> int:
        """Multiplications of all matrix products; a loop's as often as it runs."""
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                inner = [eqn.invars[0].aval.shape[axis] for axis in contracted]
                total += int(np.prod(eqn.outvars[0].aval.shape) * np.prod(inner))
            for value in eqn.params.values():
                if hasattr(value, "jaxpr"):
                    total += eqn.params.get("length", 1) * products(value.jaxpr)
        return total

    expected = products(jax.make_jaxpr(fourier.convolve)(x, w).jaxpr)
    assert fourier.multiplications(x.shape, w.shape) == expected


@pytest.mark.parametrize(
    "channels, features, size, kernel, strides, expected",
    [
        (64, 64, 8, (7, 7), (1, 1), (True, True)),
        (32, 32, 16, (3, 3), (1, 1), (False, True)),  # forward it would take longer
        (3, 32, 32, (7, 7), (1, 1), (False, True)),
        (16, 16, 16, (3, 3), (1, 1), (False, False)),
        (64, 64, 16, (7, 7), (2, 2), (False, False)),
        (64, 64, 16, (1, 1), (1, 1), (False, False)),
    ],
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="used on CPUs only")
def test_where_it_is_used(channels, features, size, kernel, strides, expected, monkeypatch):
    called = {"convolve": False, "gradients": False}
    for name in called:
        function = getattr(fourier, name)

        def call(*args, name=name, function=function):
            called[name] = True
            return function(*args)

        monkeypatch.setattr(fourier, name, call)
    x, w = jnp.asarray(random(64, size, size, channels)), random(*kernel, channels, features)
    y, vjp = jax.vjp(lambda x, w: cpu_layers.conv(x, w, strides), x, w)
    gradients = vjp(y)
    assert tuple(called.values()) == expected
    y, vjp = jax.vjp(lambda x, w: reference(x, w, strides), x, w)
    for actual, wanted in zip(gradients, vjp(y), strict=True):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(actual / scale, wanted / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types_stay_what_they_are(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(random(64, 8, 8, 64), dtype)
        w = jnp.asarray(random(7, 7, 64, 64), dtype)
        y, vjp = jax.vjp(lambda x, w: cpu_layers.conv(x, w, (1, 1)), x, w)
        assert {a.dtype for a in (y, *vjp(y))} == {jnp.dtype(dtype)}
        if dtype == "float64":
            np.testing.assert_allclose(y, reference(x, w), rtol=0, atol=1e-10)
