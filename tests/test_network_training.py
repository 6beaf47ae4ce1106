"""A network trained through the engine is what its Flax module is, trained by optax as a whole."""

import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ghn_jax.deepnets1m import units
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.operations import network_pieces
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.auxiliary_head import AuxiliaryHead, _averages
from ghn_jax.evaluation.module_training import ModuleTraining
from ghn_jax.evaluation.network_training import NetworkTraining
from ghn_jax.training.meta_loss import cross_entropy

BATCH, SIZE = 8, 16
# A state is the sum of two batch norms, of one and an identity, and of a pooling.
CELL = Genotype(
    normal=(("sep_conv_3x3", 0), ("conv_1x1", 1), ("skip_connect", 0), ("conv_3x3", 2)),
    normal_concat=(2, 3),
    reduce=(("max_pool_3x3", 0), ("dil_conv_3x3", 1), ("avg_pool_3x3", 2), ("skip_connect", 0)),
    reduce_concat=(2, 3),
)
ARCH = Architecture(CELL, n_cells=3, C=8, fc_layers=1)


@pytest.fixture(scope="module")
def engine():
    return Engine()


@functools.cache
def batch(step: int):
    rng = np.random.default_rng(step)
    images = rng.standard_normal((BATCH, SIZE, SIZE, 3), np.float32)
    return images, rng.integers(0, 10, BATCH).astype(np.int32)


def make(engine, optimizer, arch=ARCH, **options):
    return NetworkTraining(engine, arch, optimizer, batch_size=BATCH, image_size=SIZE, **options)


def start(arch=ARCH):
    return random_parameters(build_network(arch, 10, SIZE), SIZE, seed=0)


def with_statistics(network, params, images, counts: dict):
    """Logits, and the statistics that each batch norm of the module took, by its official name.

    `counts` gets how many numbers of a channel each of them saw.
    """
    found, numbers, here = [], [], threading.get_ident()

    def record(x):
        if threading.get_ident() != here:  # the engine compiles ahead
            return batch_statistics(x)
        found.append(batch_statistics(x))
        numbers.append(x.size // x.shape[-1])
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        batch_statistics = units.batch_statistics
        patch.setattr(units, "batch_statistics", record)
        logits = network.apply({"params": params}, images)
    names = [p.norm for some in network_pieces(network.wiring()) for p in some if p.norm]
    counts.update(zip(names, numbers, strict=True))
    return logits, dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_ten_updates_are_those_of_the_module(engine, name):
    """Parameters, losses and running averages, with weight decay, clipping and label smoothing."""
    optimizer = {
        "sgd": optax.chain(optax.add_decayed_weights(3e-2), optax.sgd(0.05, momentum=0.9)),
        "adam": optax.chain(optax.add_decayed_weights(3e-2), optax.adam(1e-3, eps=1e-4)),
    }[name]
    clip = 1.0
    training = make(engine, optimizer, clip=clip, smoothing=0.1, momentum=0.8)
    state = training.init(start())
    network, params = build_network(ARCH, 10, SIZE), start()
    whole = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    opt_state = whole.init(params)
    averages, counts = {}, {}

    @jax.jit
    def update(params, opt_state, images, labels):
        def loss(params):
            logits, statistics = with_statistics(network, params, images, counts)
            return cross_entropy(logits, labels, 0.1), statistics

        (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        changes, opt_state = whole.update(gradient, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, value, statistics

    losses = []
    for i in range(10):
        params, opt_state, expected, statistics = update(params, opt_state, *batch(i))
        state, loss, _ = training.step(state, *batch(i))
        losses.append((float(loss), float(expected)))
        for norm, (mean, variance) in statistics.items():
            old = averages.get(norm, np.stack([np.zeros_like(mean), np.ones_like(mean)]))
            unbiased = variance * counts[norm] / (counts[norm] - 1)
            averages[norm] = 0.8 * old + 0.2 * np.stack([mean, unbiased])
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)
    ours, theirs = (ravel_pytree(tree)[0] for tree in (training.params(state), params))
    moved = jnp.linalg.norm(theirs - ravel_pytree(start())[0])
    assert moved > 0.1
    assert jnp.linalg.norm(ours - theirs) < 1e-4 * jnp.linalg.norm(theirs)
    assert set(state.statistics) == set(averages)
    for norm, expected in averages.items():
        np.testing.assert_allclose(state.statistics[norm], expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_for_another_network(engine):
    """A network whose steps were all met, in another order, brings no program."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    for n_cells in (6, 7):
        arch = ARCH.replace(n_cells=n_cells)
        state = make(engine, optimizer, arch, clip=5.0).init(start(arch))
        engine.programs.wait()  # for those of the network before
        counter = CompilationCounter()
        make(engine, optimizer, arch, clip=5.0).step(state, *batch(0))
        made = counter.count
    assert made == 0


def test_running_averages_are_what_logits_are_on(engine):
    """After many updates that change nothing else, logits on averages are those on the batch."""
    training = make(engine, optax.sgd(0.0), momentum=0.0)
    state = training.init(start())
    before = training.logits(state, batch(0)[0])
    state, *_ = training.step(state, *batch(0))
    after = training.logits(state, batch(0)[0])
    expected = build_network(ARCH, 10, SIZE).apply({"params": start()}, batch(0)[0])
    # Running variances are unbiased: at 4x4 pixels by 1 in 127.
    np.testing.assert_allclose(after, expected, atol=0.03 * jnp.abs(expected).max())
    assert jnp.abs(before - expected).max() > 0.1 * jnp.abs(expected).max()


# --- Any module -----------------------------------------------------------------------------------


class Small(nn.Module):
    """Batch norm and dropout, as models of the zoo call them."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(10)(x)


def test_a_module_is_trained_by_optax():
    """Updates by hand, statistics and dropout included."""
    optimizer, module = optax.adam(1e-2), Small()
    training = ModuleTraining(module, optimizer, image_size=SIZE, clip=0.5, smoothing=0.1, seed=3)
    state = training.init()
    whole = optax.chain(optax.clip_by_global_norm(0.5), optimizer)
    variables = jax.tree.map(jnp.array, dict(state.variables))
    opt_state = whole.init(variables["params"])
    for i in range(4):
        images, labels = batch(i)
        key = jax.random.fold_in(jax.random.key(3), i)

        def loss(params, variables=variables, images=images, labels=labels, key=key):
            logits, updated = module.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"],
                rngs={"dropout": key},
            )  # fmt: skip
            return cross_entropy(logits, labels, 0.1), updated

        (expected, updated), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        changes, opt_state = whole.update(gradient, opt_state, variables["params"])
        variables = {"params": optax.apply_updates(variables["params"], changes), **updated}
        state, value, _ = training.step(state, images, labels)
        assert float(value) == pytest.approx(float(expected), rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), dict(state.variables),
                 variables)  # fmt: skip
    expected = module.apply(variables, batch(0)[0])
    np.testing.assert_allclose(training.logits(state, batch(0)[0]), expected, atol=1e-4)
    again = training.init(training.params(state))
    jax.tree.map(np.testing.assert_array_equal, training.params(again), training.params(state))
    with pytest.raises(ValueError, match="drop path"):
        training.step(state, *batch(0), drop_path=0.1)


# --- Drop path and the auxiliary head (C.2.3) -----------------------------------------------------


def test_drop_path_of_probability_0_changes_nothing(engine):
    losses = []
    for drop_path in (False, True):
        training = make(engine, optax.sgd(0.05), drop_path=drop_path)
        state = training.init(start())
        for i in range(3):
            state, loss, _ = training.step(state, *batch(i))
        losses.append((float(loss), ravel_pytree(training.params(state))[0]))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    np.testing.assert_allclose(losses[0][1], losses[1][1], atol=1e-5)


def test_drop_path_drops_operations_of_cells(engine):
    """Of the share that is asked for, image by image; never an identity, and the mean stays 1."""
    training = make(engine, optax.sgd(0.05), drop_path=True)
    plan = training.plan
    assert len(plan.droppable) == 2 * ARCH.n_cells
    identities = sum(not d for some in plan.droppable.values() for d in some)
    skips = sum(kind == "skip_connect" for kind, _ in CELL.normal)
    assert identities == skips  # a strided skip is no identity, and here are two normal cells
    scales = [training._drop(step, 500, 0.25) for step in range(4)]
    for i, droppable in plan.droppable.items():
        for term, may in enumerate(droppable):
            factors = np.concatenate([s[i][term] for s in scales])
            if may:
                assert set(np.unique(factors)) == {0.0, np.float32(4 / 3)}
                assert factors.mean() == pytest.approx(1, abs=0.05)
            else:
                assert (factors == 1).all()
    again = make(engine, optax.sgd(0.05), drop_path=True)._drop(2, 500, 0.25)
    assert all((again[i] == scales[2][i]).all() for i in again)


def test_terms_are_scaled_one_by_one():
    """Normed terms come first, each with its own factors of the images."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 2, 2, 5), np.float32)
    params = tuple(rng.uniform(0.5, 1.5, (4, 5)).astype(np.float32))
    scales = rng.uniform(0, 2, (3, 4)).astype(np.float32)
    state, _ = units.NormSum(5, 2, dropped=3).with_statistics(params, tuple(x), scales)
    expected = 0
    for i, term in enumerate(x):
        if i < 2:
            mean, variance = term.mean((0, 1, 2)), term.var((0, 1, 2))
            term = (term - mean) / np.sqrt(variance + 1e-5) * params[2 * i] + params[2 * i + 1]
        expected = expected + term * scales[i][:, None, None, None]
    np.testing.assert_allclose(state, expected, atol=1e-5)


def test_gradient_under_drop_path_and_auxiliary_head(engine):
    """The change of the loss along a direction is the gradient's."""
    training = make(engine, optax.sgd(1.0), drop_path=True, auxiliary=4.0, smoothing=0.1)
    images, labels = batch(0)

    def loss(weights):
        state = training.init(start())._replace(weights=weights)
        drop = training._drop(0, BATCH, 0.3)
        logits, trace = engine.forward(training.network, weights, images, keep=True, drop=drop)
        head = jax.tree.unflatten(training._tree, weights["auxiliary_head"])
        parts = jnp.concatenate([trace.values[v] for v in training._parts], -1)
        second = AuxiliaryHead(10).apply({"params": head}, parts)
        del state
        return float(cross_entropy(logits, labels, 0.1) + 4 * cross_entropy(second, labels, 0.1))

    before = training.init(start()).weights
    kept = jax.tree.map(np.asarray, before)
    after, _, _ = training.step(training.init(start()), images, labels, drop_path=0.3)
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), kept, after.weights)
    norm = float(optax.global_norm(gradient))
    for names in (list(kept), ["auxiliary_head"], [n for n in kept if n.startswith("stem")]):
        direction = {n: gradient[n] for n in names}
        length = float(optax.global_norm(direction))
        assert length > 1e-3 * norm
        step = 1e-2 / length

        def moved(sign, direction=direction, step=step):
            return {n: tuple(w + sign * step * d for w, d in zip(arrays, direction[n], strict=True))
                    if n in direction else arrays for n, arrays in kept.items()}  # fmt: skip

        slope = (loss(moved(1)) - loss(moved(-1))) / (2 * step)
        assert slope == pytest.approx(length**2, rel=0.03), names


def test_auxiliary_head_trains_the_network_but_is_no_part_of_it(engine):
    training = make(engine, optax.sgd(0.05), auxiliary=0.4)
    state, loss, _ = training.step(training.init(start()), *batch(0))
    alone = make(engine, optax.sgd(0.05))
    other, loss_alone, _ = alone.step(alone.init(start()), *batch(0))
    assert float(loss) == pytest.approx(float(loss_alone))  # the loss of the logits is reported
    a, b = training.params(state), alone.params(other)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jnp.abs(ravel_pytree(a)[0] - ravel_pytree(b)[0]).max() > 1e-4
    # What comes after the head's cell is not touched by it.
    np.testing.assert_allclose(a["classifier_0"]["kernel"], b["classifier_0"]["kernel"], atol=1e-6)


def test_adaptive_pooling():
    """Against the definition, for sizes above, at and below 8."""
    for size in (4, 8, 11, 16):
        x = np.arange(size, dtype=np.float32) ** 2
        expected = [x[int(np.floor(i * size / 8)) : int(np.ceil((i + 1) * size / 8))].mean()
                    for i in range(8)]  # fmt: skip
        np.testing.assert_allclose(_averages(size) @ x, expected, rtol=1e-6)
