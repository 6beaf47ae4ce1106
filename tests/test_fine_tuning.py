"""What is done to predicted parameters: batch norm's statistics, noise, orthogonality, bfloat16."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import ghn_jax
from ghn_jax.evaluation.reinitialise import _correlation_deviation, tiled_kernels


class Net(nn.Module):
    """Two convolutions with batch norm; the second one's kernel is larger than a tile."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(72, (3, 3), 4, use_bias=False, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm1")(x))
        x = nn.Conv(80, (3, 3), 2, use_bias=False, name="second")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm2")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10, name="head")(nn.relu(x).mean((1, 2)))


@pytest.fixture(scope="module")
def predicted():
    ghn = ghn_jax.GHN()
    return ghn_jax.predict_model(ghn, ghn.init_variables(0), Net(), jnp.zeros((1, 32, 32, 3)))


def batches(count):
    return [
        jax.random.normal(jax.random.key(i), (4, 32, 32, 3)) * (1 + i) + i for i in range(count)
    ]


def normalise(x, params):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def by_hand(params, x):
    def convolve(x, w, stride):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=numbers)

    first = convolve(x, params["first"]["kernel"], 4)
    second = convolve(jax.nn.relu(normalise(first, params["norm1"])), params["second"]["kernel"], 2)
    x = jax.nn.relu(normalise(second, params["norm2"])).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"], first, second


def test_the_batchs_statistics(predicted):
    variables, _ = predicted
    (images,) = batches(1)
    logits, *_ = jax.jit(by_hand)(variables["params"], images)
    run = jax.jit(lambda variables, x: ghn_jax.apply_on_batch(Net(), variables, x))
    ours = run(variables, images)  # without dropout
    np.testing.assert_allclose(ours, logits, rtol=2e-4, atol=1e-5)
    assert not np.allclose(Net().apply(variables, images), logits, atol=1e-3)


def test_averaged_statistics(predicted):
    variables, _ = predicted
    images = batches(3)
    averaged = ghn_jax.average_statistics(Net(), variables, iter(images))
    inside = [by_hand(variables["params"], x)[1:] for x in images]
    for norm, outputs in zip(("norm1", "norm2"), zip(*inside, strict=True), strict=True):
        mean = np.mean([x.mean((0, 1, 2)) for x in outputs], 0)
        var = np.mean([x.var((0, 1, 2)) for x in outputs], 0)
        statistics = averaged["batch_stats"][norm]
        np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(statistics["var"], var, rtol=1e-3, atol=1e-4)
    assert float(variables["batch_stats"]["norm1"]["mean"].max()) == 0
    jax.tree.map(np.testing.assert_array_equal, averaged["params"], variables["params"])
    # They are what the model then runs on.
    assert jnp.isfinite(Net().apply(averaged, images[0])).all()


def test_averages_turned_on_by_position():
    class Positional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm()(x, True)

    x = jnp.arange(8.0).reshape(4, 2)
    variables = Positional().init(jax.random.key(0), x)
    y = ghn_jax.apply_on_batch(Positional(), variables, x)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)


def test_bad_statistics(predicted):
    variables, _ = predicted
    with pytest.raises(ValueError, match="no batch was given"):
        ghn_jax.average_statistics(Net(), variables, [])
    with pytest.raises(ValueError, match="have no 'batch_stats'"):
        ghn_jax.average_statistics(Net(), {"params": variables["params"]}, batches(1))


def test_tiled_kernels(predicted):
    # The classifier is tiled too, but has a decoder of its own and is left as it is.
    assert tiled_kernels(predicted[1]) == ["first/kernel", "second/kernel"]


def test_orthogonal_kernels(predicted):
    variables, report = predicted
    changed = ghn_jax.orthogonalise(variables, report)
    before, after = variables["params"], changed["params"]
    for name in ("first", "second"):
        kernel = np.asarray(after[name]["kernel"], np.float64)
        assert kernel.shape == before[name]["kernel"].shape
        matrix = kernel.reshape(-1, kernel.shape[-1])
        matrix = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(matrix.shape[1]), atol=1e-5)
    for name in ("norm1", "norm2", "head"):
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])


def test_orthogonal_kernels_are_the_authors(predicted):
    """QR of (out, in * height * width), transposed where it is wide, signs of R's diagonal."""
    torch = pytest.importorskip("torch")
    variables, report = predicted
    rng = np.random.default_rng(0)  # of full rank, or the decomposition is not unique
    for shape in ((3, 3, 3, 72), (3, 3, 72, 80)):
        kernel = rng.standard_normal(shape, np.float32)
        name = "first" if shape[2] == 3 else "second"
        given = {**variables["params"], name: {"kernel": jnp.asarray(kernel)}}
        ours = ghn_jax.orthogonalise({"params": given}, report)["params"][name]["kernel"]
        weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).reshape(shape[3], -1)
        wide = weight.shape[0] < weight.shape[1]
        q, r = torch.linalg.qr(weight.T if wide else weight)
        q = q * torch.sign(torch.diag(r))
        q = (q.T if wide else q).reshape(shape[3], shape[2], *shape[:2])
        np.testing.assert_allclose(ours.transpose(3, 2, 0, 1), q.numpy(), atol=1e-5)


def test_noise(predicted):
    variables, report = predicted
    beta = 0.1
    noisy = ghn_jax.add_noise(variables, report, ["second/kernel"], beta=beta, seed=3)
    kernel = np.asarray(variables["params"]["second"]["kernel"])
    noise = np.asarray(noisy["params"]["second"]["kernel"]) - kernel
    matrix = kernel.transpose(2, 0, 1, 3).reshape(-1, 80)
    assert noise.std() == pytest.approx(beta * np.corrcoef(matrix).std(), rel=0.02)
    same = ghn_jax.add_noise(variables, report, ["second/kernel"], beta=beta, seed=3)
    jax.tree.map(np.testing.assert_array_equal, noisy, same)
    first = variables["params"]["first"]["kernel"]
    np.testing.assert_array_equal(noisy["params"]["first"]["kernel"], first)


def test_correlations():
    matrix = np.random.default_rng(0).standard_normal((40, 7)) + np.arange(40)[:, None] % 3
    assert _correlation_deviation(matrix) == pytest.approx(np.corrcoef(matrix).std())


def test_a_path_that_is_no_kernel(predicted):
    with pytest.raises(ValueError, match="'norm1/scale' is no predicted kernel"):
        ghn_jax.orthogonalise(*predicted, ["norm1/scale"])


def test_half_precision(predicted):
    variables, _ = predicted
    half = ghn_jax.to_bfloat16(variables)
    assert {x.dtype for x in jax.tree.leaves(half["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(half["batch_stats"])} == {jnp.dtype(jnp.float32)}
    module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    cast = ghn_jax.to_bfloat16(module)
    assert cast.kernel[...].dtype == jnp.bfloat16
    assert module.kernel[...].dtype == jnp.float32


@pytest.mark.parametrize("form", ["frozen", "nested", "dicts"])
def test_trees_are_given_back_as_they_came(predicted, form):
    variables, report = predicted
    given = {
        "frozen": freeze(variables),
        "nested": {name: freeze(tree) for name, tree in variables.items()},
        "dicts": variables,
    }[form]
    for change in (
        ghn_jax.to_bfloat16,
        lambda variables: ghn_jax.add_noise(variables, report),
        lambda variables: ghn_jax.orthogonalise(variables, report),
    ):
        changed = change(given)
        assert jax.tree.structure(changed) == jax.tree.structure(given)
        expected = jax.tree.leaves(change(variables))
        for ours, theirs in zip(jax.tree.leaves(changed), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_what_is_no_variables(predicted):
    variables, report = predicted
    for change in (
        ghn_jax.to_bfloat16,
        lambda variables: ghn_jax.add_noise(variables, report),
        lambda variables: ghn_jax.orthogonalise(variables, report),
    ):
        for given, error, message in (
            (variables["params"], ValueError, "have no 'params' but 'first', 'head', 'norm1'; a t"),
            (predicted, TypeError, "are a tuple; .* give the first"),
            (nnx.Linear, TypeError, "are the class Linear; allowed"),
            (None, TypeError, "are None; allowed"),
            (nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0))), ValueError, "is abstract"),
        ):
            with pytest.raises(error, match=message):
                change(given)


def test_reports_of_other_models(predicted):
    variables, report = predicted

    def named(change):
        rows = [dataclasses.replace(p, path=change(p.path)) for p in report.parameters]
        return dataclasses.replace(report, parameters=tuple(rows))

    other = named(lambda path: f"other/{path}")
    small = [dataclasses.replace(p, how="decoded") for p in other.parameters]
    none_tiled = dataclasses.replace(report, parameters=tuple(small))
    swapped = {"first": "second", "second": "first"}
    parts = named(lambda path: "/".join(swapped.get(part, part) for part in path.split("/")))
    for change in (ghn_jax.add_noise, ghn_jax.orthogonalise):
        for wrong, error, message in (
            (other, ValueError, "the variables have no other/first/kernel, other/second/kernel, w"),
            (none_tiled, ValueError, "the variables have no other/first/kernel"),
            (parts, ValueError, r"first/kernel has shape \(3, 3, 3, 72\) in the variables and"),
            (None, TypeError, "the report is None; give"),
        ):
            with pytest.raises(error, match=message):
                change(variables, wrong)
