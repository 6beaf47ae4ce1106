"""Units: their sizes, costs, nodes and parameters follow from what they compute."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_counts import flops_of

from ghn_jax.deepnets1m.architecture import OPERATIONS
from ghn_jax.deepnets1m.operations import Piece, piece_nodes, pieces
from ghn_jax.deepnets1m.units import EPSILON, Classifier, NormSum, PatchEmbedding

CHANNELS = 16
KINDS = {
    **{f"{op} {s}": pieces(op, CHANNELS, CHANNELS, s)
       for op in OPERATIONS if op not in ("none", "msa") for s in (1, 2)
       if (op, s) != ("skip_connect", 2)},
    "msa": pieces("msa", CHANNELS, CHANNELS),
    "factorized_reduce": pieces("factorized_reduce", CHANNELS, 24, 2),
    "preprocess": pieces("preprocess", CHANNELS, 24),
    "subsample": pieces("subsample", CHANNELS, CHANNELS, 2),
    "stem_pool": pieces("stem_pool", CHANNELS, CHANNELS, 2),
    "stem_conv": pieces("stem_conv", 3, CHANNELS, 1, 5),
    "stem_conv, large": pieces("stem_conv", 3, CHANNELS, 4, 7),
    "stem_imagenet": pieces("stem_imagenet", 3, CHANNELS, 1, 5),
    "stem_imagenet, large": pieces("stem_imagenet", 3, CHANNELS, 4, 5),
    "stem_reduce": pieces("stem_reduce", CHANNELS, CHANNELS, 2),
    "stem_vit": pieces("stem_vit", 3, CHANNELS, 3, 3, 3),
    "stem_vit, large": pieces("stem_vit", 3, CHANNELS, 16, 16, 1),
    "classifier": (Piece(Classifier(True, (CHANNELS, 12, 10)), ("a", "b", "c", "d")),),
}  # fmt: skip
# Of images: the ViT's patches give as many positions as it encodes.
# Factorised reductions are of even sizes.
SIZES = {"factorized_reduce": (6, 8), "stem_vit": (7, 8, 9), "stem_vit, large": (16, 17, 31)}


def arrays(unit) -> tuple:
    """Shapes of its parameters' arrays."""
    leaves = (shape for p in unit.parameters for shape in p.leaves.values())
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in leaves)


def images(size: int, channels: int, batch: int = 2):
    return jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_units_say_what_they_compute(kind):
    """Size, channels and multiply-adds are those of `apply`."""
    for size in SIZES.get(kind, (7, 8)):
        height, channels = size, 3 if kind.startswith("stem_") else CHANNELS
        if kind in ("stem_reduce", "stem_pool"):
            channels = CHANNELS
        for unit, _, norm in KINDS[kind]:
            x = images(height, channels, 1)
            out = jax.eval_shape(unit.apply, arrays(unit), (x,))
            jaxpr = jax.make_jaxpr(unit.apply)(arrays(unit), (x,))
            assert flops_of(jaxpr.jaxpr) == 2 * unit.multiply_adds(height)
            height = unit.size(height)
            if isinstance(unit, Classifier):
                assert (out.shape, height) == ((1, 10), 1)
                continue
            assert out.shape[:3] == (1, height, height)
            channels = out.shape[3]
            assert unit.normed == bool(norm)
            if unit.normed:
                assert channels == unit.features


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [True, False])
def test_nodes_are_those_of_the_parameters(kind, norm):
    """Each parameter is a node of its name, primitive and shape, which reads a node before it."""
    nodes = piece_nodes(KINDS[kind], norm)
    named = {node.name: (node.primitive, node.shape) for node in nodes if node.name}
    wanted = [pair for piece in KINDS[kind] for pair in piece.parameters(norm)]
    assert list(named.items()) == [(name, tuple(p)) for name, p in wanted]
    assert len(named) == sum(bool(node.name) for node in nodes)
    for i, node in enumerate(nodes):
        assert all(-1 <= source < i for source in node.sources)
    # What follows reads the last one: nothing else is left over.
    read = set(itertools.chain(*(node.sources for node in nodes)))
    assert set(range(len(nodes) - 1)) <= read
    pools = [node.shape for node in nodes if node.primitive in ("max_pool", "avg_pool")]
    assert all(shape == (1, 1, 3, 3) for shape in pools)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_changes_the_result(kind):
    rng = np.random.default_rng(0)
    size = SIZES.get(kind, (8,))[0]
    channels = 3 if kind.startswith("stem_") and kind[5:] not in ("reduce", "pool") else CHANNELS
    for unit, *_ in KINDS[kind]:
        x = rng.standard_normal((2, size, size, channels), np.float32)
        params = tuple(rng.standard_normal(p.shape, np.float32) for p in arrays(unit))

        def loss(params, unit=unit, x=x):
            return jnp.square(unit.apply(params, (x,))).sum()

        for gradient in jax.jit(jax.grad(loss))(params):
            assert np.isfinite(gradient).all() and np.any(gradient)
        out = jax.eval_shape(unit.apply, arrays(unit), (images(size, channels),))
        size, channels = (out.shape[1], out.shape[3]) if len(out.shape) == 4 else (1, 1)


def test_parameters_of_patches():
    kernel, encoding = PatchEmbedding(8, 16, 14).parameters
    assert kernel.leaves == {"kernel": (16, 16, 3, 8)}
    assert encoding.leaves == {"embedding": (14, 14, 8)}


@pytest.mark.parametrize("kind", ["conv_1x1 2", "preprocess", "factorized_reduce"])
def test_parts_are_their_concatenation_and_none_is_zeros(kind):
    """What reads several states mixes them in a 1x1 convolution."""
    unit = KINDS[kind][0].unit
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 6, CHANNELS), np.float32)
    params = tuple(rng.standard_normal(p.shape, np.float32) for p in arrays(unit))
    half = CHANNELS // 2
    for parts, whole in (
        ((x[..., :half], x[..., half:]), x),
        ((None, x[..., half:]), np.concatenate([0 * x[..., half:], x[..., half:]], -1)),
        ((x[..., :half], None), np.concatenate([x[..., :half], 0 * x[..., half:]], -1)),
    ):
        expected = unit.apply(params, (whole,))
        np.testing.assert_allclose(unit.apply(params, parts), expected, rtol=1e-4, atol=1e-5)


# --- Batch norm and sums --------------------------------------------------------------------------


def norm_case(n_inputs: int, normed: int, scale: float = 1.0, offset: float = 0.0):
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape, np.float32)

    inputs = tuple(scale * random(3, 7, 6, 5) + np.float32(offset) for _ in range(n_inputs))
    params = tuple(random(5) for _ in range(2 * normed))
    return NormSum(5, normed), params, inputs, random(3, 7, 6, 5)


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize(
    ("inputs", "normed", "scale", "offset"),
    [
        *((n, normed, 1.0, 0.0) for n, normed in ((1, 1), (2, 1), (2, 2), (2, 0))),
        (1, 1, 0.01, 0.1),  # off-centre and of small variance: the mean and the epsilon matter
    ],
)
def test_the_gradient_of_batch_norm_is_that_of_its_definition(inputs, normed, scale, offset):
    unit, params, inputs, g = norm_case(inputs, normed, scale, offset)
    y, statistics = unit.with_statistics(params, inputs)
    expected, vjp = jax.vjp(lambda p, x: unit.apply(p, x), params, inputs)
    assert_close(y, expected)
    dparams, dinputs = unit.gradient(params, inputs[:normed], statistics, g)
    assert len(dinputs) == normed
    # Of the others it is `g` itself.
    assert_close((dparams, (*dinputs, *[g] * (len(inputs) - normed))), vjp(g), 1e-4)


def test_batch_norm_is_flax_on_batch_statistics():
    unit, (scale, bias), (z,), _ = norm_case(1, 1, 0.01, 0.1)
    module = nn.BatchNorm(use_running_average=False, epsilon=EPSILON)
    statistics = {"mean": np.zeros(5), "var": np.ones(5)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}
    expected, _ = module.apply(variables, z, mutable=["batch_stats"])
    np.testing.assert_allclose(unit.apply((scale, bias), (z,)), expected, rtol=0, atol=1e-4)


def test_batch_norm_on_running_averages_is_flax():
    unit, params, inputs, _ = norm_case(2, 2)
    rng = np.random.default_rng(1)
    statistics = [np.abs(rng.standard_normal((2, 5), np.float32)) for _ in range(2)]
    module, expected = nn.BatchNorm(use_running_average=True, epsilon=EPSILON), 0.0
    for i, x in enumerate(inputs):
        variables = {
            "params": {"scale": params[2 * i], "bias": params[2 * i + 1]},
            "batch_stats": {"mean": statistics[i][0], "var": statistics[i][1]},
        }
        expected = expected + module.apply(variables, x)
    actual = NormSum(5, 2, running=True).apply((*params, *statistics), inputs)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_a_sum_without_batch_norm_is_a_sum():
    unit, params, inputs, _ = norm_case(2, 0)
    assert params == unit.parameters == ()
    np.testing.assert_array_equal(unit.apply((), inputs), inputs[0] + inputs[1])


def test_statistics_are_of_float32():
    unit, params, inputs, g = norm_case(1, 1)
    half = tuple(x.astype(jnp.bfloat16) for x in inputs)
    y, statistics = unit.with_statistics(params, half)
    _, dinputs = unit.gradient(params, half, statistics, jnp.asarray(g, jnp.bfloat16))
    assert y.dtype == dinputs[0].dtype == jnp.bfloat16
    assert statistics[0].dtype == jnp.float32
    expected = np.asarray(half[0], np.float64)
    np.testing.assert_allclose(statistics[0][0], expected.mean((0, 1, 2)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(statistics[0][1], expected.var((0, 1, 2)), rtol=1e-5)


# --- Classifier -----------------------------------------------------------------------------------


def test_a_weight_that_repeats_need_not_be_as_long_as_its_input():
    """Fewer rows than inputs, an uneven part of them: the same as repeating the weight (B.1)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 3, 5), np.float32)
    short, bias, hidden, last = (rng.standard_normal(s, np.float32)
                                 for s in ((7, 12), (12,), (12, 4), (4,)))  # fmt: skip
    unit = Classifier(False, (45, 12, 4))
    whole = np.tile(short, (7, 1))[:45]
    expected = unit.apply((whole, bias, hidden, last), (x,))
    actual = unit.apply((short, bias, hidden, last), (x,))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    # Of hidden units as well.
    expected = unit.apply((whole, bias, np.tile(hidden[:5], (3, 1))[:12], last), (x,))
    actual = unit.apply((short, bias, hidden[:5], last), (x,))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_between_layers_and_doubles_what_it_keeps():
    unit = Classifier(True, (4, 400, 300, 10))
    # All hidden units are 1.
    layers = (np.full((4, 400), 0.25), np.eye(400, 300), np.eye(300, 10))
    params = tuple(a.astype(np.float32) for w in layers for a in (w, np.zeros(w.shape[1])))
    ones, key = np.ones((1, 2, 2, 4), np.float32), jax.random.key(0)
    kept = np.stack([
        unit.apply(params, (ones,), key=jax.random.fold_in(key, i))[0] for i in range(40)
    ])  # fmt: skip
    # Through two layers of dropout: 2 x 2 or nothing, a quarter of the time.
    assert set(np.unique(kept)) == {0, 4}
    assert np.mean(kept > 0) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 400))
    again = unit.apply(params, (ones,), key=jax.random.fold_in(key, 0))
    np.testing.assert_array_equal(again[0], kept[0])
    np.testing.assert_allclose(unit.apply(params, (ones,)), 1)
