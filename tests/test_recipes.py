"""Presets of training: the paper's recipe, and that of GHN-3."""

import dataclasses
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghn_jax.cli import train
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.sampling import RULES, sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.hypernet import presets
from ghn_jax.hypernet.ghn import count_parameters
from ghn_jax.hypernet.tiling import weight_scale
from ghn_jax.training import loop
from ghn_jax.training.config import TrainConfig, preset
from ghn_jax.training.run_folder import check_same
from ghn_jax.training.update import MetaStep


def test_options_change_the_preset():
    given = train.parse(["--preset", "ghn1", "--learning-rate", "0.5", "--widths", "16", "32"])
    assert (given.space.meta_batch, given.model.virtual_edges) == (1, 1)
    assert (given.optimiser.learning_rate, given.space.widths) == (0.5, (16, 32))


def test_the_papers_hyperparameters():
    for name, meta in (("ghn2", 8), ("ghn1", 1), ("mlp", 1)):
        c = preset(name)
        o = c.optimiser
        assert (o.learning_rate, o.weight_decay, o.clip) == (1e-3, 1e-5, 5.0)
        assert (o.decay_epochs, o.decay) == ((200, 250), 0.1)
        assert (c.data.batch_size, c.data.epochs, c.space.meta_batch) == (64, 300, meta)
        assert c.space.max_nodes == 2200
        assert c.space.rules(32).n_cells == RULES["train"].n_cells
    assert preset("ghn1").ghn(Task()).normalise is False
    assert preset("mlp").ghn(Task()).encoder == "mlp"


def test_the_learning_rate_falls_tenfold_at_epochs_200_and_250():
    optimizer = preset("ghn2").optimiser.make(steps_per_epoch=1, total=300)
    params = jnp.zeros(())
    state, sizes = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(300):
        step, state = update(jnp.ones(()), state, params)
        sizes.append(-float(step))
    np.testing.assert_allclose(np.array(sizes)[[0, 199, 200, 249, 250, 299]],
                               [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-3)  # fmt: skip


def test_the_recipe_of_ghn3():
    sizes = {"ghn3-t": (64, 3, 8), "ghn3-xl": (384, 24, 16), "logah-small": (128, 5, 16)}
    for name, size in sizes.items():
        c = train.parse(["--preset", name])
        o, ghn = c.optimiser, c.ghn(Task())
        assert (ghn.features, ghn.layers, ghn.heads) == size
        assert ghn == presets.preset(name, num_classes=10, max_shape=ghn.max_shape)
        rate, norms = (4e-4, 8) if name.startswith("ghn3") else (3e-4, 1)
        assert (o.optimiser, o.learning_rate, o.weight_decay) == ("adamw", rate, 1e-2)
        assert (o.norm_penalty, o.clip, c.space.meta_batch) == (3e-5, 5.0, norms)
    assert count_parameters(preset("ghn3-t").ghn(Task())) == 4_531_500


def test_the_learning_rate_of_a_cosine():
    optimiser = preset("ghn3-t").optimiser
    rates = [float(optimiser.rate(10, 3000)(i)) for i in (0, 25, 50, 1525, 2999, 3000)]
    middle = (1e-5 + 4e-4) / 2
    np.testing.assert_allclose(rates[:4], [1e-5, middle, 4e-4, 2e-4], rtol=1e-3)
    assert 0 == rates[5] < rates[4] < 1e-9
    with pytest.raises(ValueError, match="50 updates, but the run ends after 50"):
        optimiser.rate(10, 50)


def test_a_learning_rate_that_rises_and_falls_in_steps():
    """The falls are where they are without a warm-up."""
    optimiser = preset("ghn2").replace(decay_epochs=(20, 30), warmup_epochs=2).optimiser
    rate = optimiser.rate(10, 3000)
    rates = [float(rate(i)) for i in (0, 10, 20, 199, 201, 299, 301)]
    expected = [1e-5, (1e-5 + 1e-3) / 2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5]
    np.testing.assert_allclose(rates, expected, rtol=1e-3)
    without = dataclasses.replace(optimiser, warmup_epochs=0).rate(10, 3000)
    assert all(float(without(i)) == pytest.approx(float(rate(i))) for i in range(20, 400))
    with pytest.raises(ValueError, match="200 updates, but the learning rate falls after 200"):
        dataclasses.replace(optimiser, warmup_epochs=20).rate(10, 3000)


def test_muon_moves_matrices_in_all_directions_alike():
    rng = np.random.default_rng(0)
    gradient = {"matrix": rng.standard_normal((24, 64)) @ np.diag(np.logspace(0, -2, 64)),
                "bias": rng.standard_normal(64)}  # fmt: skip
    gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
    params = jax.tree.map(jnp.zeros_like, gradient)
    config = preset("ghn2").replace(optimiser="muon", clip=1e9, learning_rate=1e-2)
    muon, others = config.optimiser.make(1, 1), optax.nadamw(1e-2, weight_decay=1e-5)
    step, _ = muon.update(gradient, muon.init(params), params)
    expected, _ = others.update(gradient, others.init(params), params)
    np.testing.assert_allclose(step["bias"], expected["bias"], rtol=1e-5)
    sizes = np.linalg.svd(step["matrix"], compute_uv=False)
    assert sizes.max() < 2 * sizes.min()  # of the gradient: 100 times
    assert np.vdot(step["matrix"], gradient["matrix"]) < 0
    # As large as a fifth of Adam's step, which moves every number by the learning rate.
    np.testing.assert_allclose(np.std(step["matrix"]), 0.2 * 1e-2, rtol=0.2)


def test_kernels_begin_near_the_identity_where_that_is_asked_for(tmp_path):
    """On the diagonals of tiles, which wider kernels repeat, and nowhere else."""
    config = preset("demo")
    ghn = config.ghn(Task(10, 16))
    graph = ghn.graph(sample_architecture("train", 0, 1, rules=config.space.rules(16)),
                      image_size=16)  # fmt: skip
    predicted = []
    for amount in (0.0, 0.5):
        with closing(MetaStep(ghn, optax.identity(), identity=amount)) as step:
            params = step.init(3).params
        predicted.append(ghn.tensors({"params": params}, graph))
    dense, classifier = 0, {index % len(graph) for index in graph.classifier}
    for node, tensors in predicted[0].items():
        for leaf, before in tensors.items():
            change = predicted[1][node][leaf] - before
            shape = graph.param_shapes[node]
            if leaf == "kernel" and shape[1] > 1 and node not in classifier:
                eye = np.tile(np.eye(16), (-(-shape[1] // 16), -(-shape[0] // 16)))
                expected = 0.5 * weight_scale(shape) * eye[: shape[1], : shape[0]]
                np.testing.assert_allclose(
                    change, np.broadcast_to(expected, before.shape), atol=1e-6
                )
                dense += 1
            elif leaf != "kernel":
                np.testing.assert_array_equal(change, 0)
    assert dense > 5
    images, biases = load_images("digits", "train"), []
    for name in ("digits", "demo"):  # the latter begins there
        run = loop.new_run(preset(name).replace(out=tmp_path), images)
        with closing(run.step):
            biases.append(np.array(run.state.params["decoder"]["conv_1"]["bias"]))
    np.testing.assert_allclose(biases[1] - biases[0], 2 * np.eye(16).ravel(), atol=1e-6)
    with pytest.raises(ValueError, match="'lowrank' cannot begin near the identity; allowed: 0"):
        loop.check(preset("logah-tiny").replace(identity=1.0))


def test_tiles_for_larger_images_than_those_that_a_run_begins_with():
    config = preset("demo")
    assert config.ghn(Task(10, 16)).max_shape == (16, 16, 7, 7)
    assert config.replace(tile_size=11).ghn(Task(10, 16)) == config.ghn(Task(10, 32))
    with pytest.raises(ValueError, match="--tile-size is 0; allowed: 1 or more"):
        loop.check(config.replace(tile_size=0))


def test_weight_decay_of_adamw_is_not_in_the_gradient():
    params = jnp.full((), 2.0)
    for name, expected in (("adamw", 4e-3 * 1e-2 * 2), ("muon", 4e-3 * 1e-2 * 2), ("adam", 4e-3)):
        config = preset("ghn2").replace(optimiser=name, weight_decay=1e-2, learning_rate=4e-3)
        optimizer = config.optimiser.make(1, 1)
        step, _ = optimizer.update(jnp.zeros(()), optimizer.init(params), params)
        np.testing.assert_allclose(-float(step), expected, rtol=1e-3)


def test_options_that_a_schedule_needs(tmp_path):
    config = preset("ghn2").replace(out=tmp_path / "run", warmup_epochs=2.0)
    loop.check(config)
    cosine = config.replace(schedule="cosine", steps=300)
    loop.check(cosine)
    # A run that is made longer would have had other learning rates.
    with pytest.raises(ValueError, match=r"--steps 300 \(now 400\)"):
        check_same(cosine.replace(steps=400), cosine)
    check_same(config.replace(steps=400), config)


def test_a_run_of_before_has_neutral_values_of_options_that_came_later():
    """Not those of its preset, which has them by now."""
    described = preset("demo").describe()
    for name in ("identity", "tile_size", "average"):
        del described[name]
    found = TrainConfig.read({**described, "optimiser": "adam"})
    expected = preset("demo").replace(identity=0.0, tile_size=None, average=0.0, optimiser="adam")
    assert found == expected
    assert preset("demo").model.identity == 2
