"""The ablations of Tables 5 and 8: options of hypernetworks and of training, and their names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definition import unit_by_unit

from ghn_jax.cli import train
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.engine.plan import make_plan
from ghn_jax.hypernet.gatedgnn import GatedGNN
from ghn_jax.hypernet.ghn import GHN, count_parameters
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.hypernet.tiling import weight_scale
from ghn_jax.training import loop
from ghn_jax.training.ablations import ABLATIONS, ablate
from ghn_jax.training.config import preset
from ghn_jax.training.decoding import Tiles
from ghn_jax.training.meta_batch import Stream, make_meta_batch
from ghn_jax.training.meta_loss import meta_loss
from ghn_jax.training.update import MetaStep

SMALL = {"max_shape": (8, 8, 3, 3), "features": 8}
EDGES = (("conv_1x1", 0), ("skip_connect", 1))
ARCH = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), 2, C=8)
SIZE, BATCH = 16, 4
IMAGES = np.random.default_rng(0).standard_normal((BATCH, SIZE, SIZE, 3), np.float32)


# --- The hypernetwork -----------------------------------------------------------------------------


def as_printed(count: int) -> str:
    """1.6M, 32M or 4.1B, as Table 8 rounds."""
    unit, scale = ("B", 1e9) if count >= 1e9 else ("M", 1e6)
    return f"{count / scale:.{int(count / scale < 10)}f}{unit}"


@pytest.mark.parametrize("name", ABLATIONS)
def test_parameters_are_as_many_as_table_8_says(name):
    ghn = ablate(name, preset("ghn2")).ghn(Task())
    assert as_printed(count_parameters(ghn)) == ABLATIONS[name].parameters


def test_exact_numbers_of_parameters():
    counts = {"ghn2": 1_620_796, "bm1-stacked": 1_629_276, "bm1-no-shape-encoding": 1_617_588,
              "bm1-mlp-decoder": 32_282_098, "bm1-no-tiling": 135_449_020,
              "bm1-no-tiling-mlp-decoder": 4_124_350_578}  # fmt: skip
    for name, count in counts.items():
        assert count_parameters(ablate(name, preset("ghn2")).ghn(Task())) == count


ALL = {"decoder": "mlp", "shape_encoding": False, "stack": 2, "rounds": 3, "forward_only": True,
       "fan": "out"}  # fmt: skip


def test_an_update_is_the_gradient_of_the_definition():
    """With all options at once: each is a part of its own, and none is read where it is not."""
    ghn = GHN(**SMALL, **ALL)
    labels = np.arange(BATCH, dtype=np.int32)
    step = MetaStep(ghn, optax.sgd(1.0))
    before = jax.tree.map(np.asarray, step.init(1).params)
    with unit_by_unit():
        loss, grads = jax.value_and_grad(
            lambda p: meta_loss(ghn, p, [ARCH], jnp.asarray(IMAGES), labels)
        )(before)
    update = step.prepare(make_meta_batch(ghn, [ARCH], image_size=SIZE), BATCH)
    after, metrics = step(step.init(1), update, IMAGES, labels)
    step.close()
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    worst = float(max(jnp.abs(g).max() for g in jax.tree.leaves(grads)))
    for old, new, grad in zip(*map(jax.tree.leaves, (before, after.params, grads)), strict=True):
        assert jnp.abs(grad).max() > 0
        np.testing.assert_allclose(old - new, grad, rtol=1e-3, atol=1e-4 * worst)


GRAPH = GHN(**SMALL).graph(ARCH, image_size=SIZE)
PADDED = pad_graphs([GRAPH])


@jax.jit
def one_round(params, x):
    return GatedGNN(8).apply({"params": params}, x, PADDED)


def test_five_rounds_are_one_round_five_times():
    x = np.random.default_rng(1).standard_normal((len(PADDED.nodes["primitive"]), 8), np.float32)
    params = GHN(**SMALL).init_variables(0)["params"]["gnn"]
    expected = x
    for _ in range(5):
        expected = one_round(params, expected)
    five = jax.jit(lambda x: GatedGNN(8, rounds=5).apply({"params": params}, x, PADDED))(x)
    np.testing.assert_allclose(five, expected, rtol=1e-5, atol=1e-6)
    assert jnp.abs(five - one_round(params, x)).max() > 0.01


def test_stacked_encoders_on_states_without_shapes():
    """The second goes on from the first; without shape encoding, nodes start as their primitive."""
    ghn = GHN(stack=2, shape_encoding=False, layer_norm=False, **SMALL)
    variables = ghn.init_variables(0)
    params = variables["params"]
    assert "shape_encoder" not in params
    start = params["op_embedding"][PADDED.nodes["primitive"]]
    expected = one_round(params["stacked_0"], one_round(params["gnn"], start))
    found = ghn.embed(variables, GRAPH)
    np.testing.assert_allclose(found, expected[: len(GRAPH)], rtol=1e-5, atol=1e-6)
    wide = ghn.graph(ARCH.replace(C=16), image_size=SIZE)
    np.testing.assert_array_equal(ghn.embed(variables, wide), found)


def test_forwards_only_nobody_hears_of_what_comes_later():
    ghn = GHN(forward_only=True, **SMALL)
    variables, middle = ghn.init_variables(0), len(GRAPH) // 2
    shapes = list(GRAPH.param_shapes)
    shapes[middle] = (40, 40, 3, 3)
    states, other = (ghn.embed(variables, graph) for graph in
                     (GRAPH, dataclasses.replace(GRAPH, param_shapes=shapes)))  # fmt: skip
    changed = (jnp.abs(other - states).max(1) > 0).tolist()
    assert changed[:middle] == [False] * middle
    assert changed[middle]
    assert changed[-1]


def test_fan_out_counts_output_channels():
    assert weight_scale((6, 4, 3, 5)) == pytest.approx(math.sqrt(1 / 60))
    assert weight_scale((6, 4, 3, 5), "out") == pytest.approx(math.sqrt(1 / 90))
    assert weight_scale((6, 4), "out") == pytest.approx(math.sqrt(2 / 6))
    plan = make_plan(wire(ARCH.replace(C=16), Task(10, SIZE)))
    unit = next(s.unit for s in plan.steps if s.unit.parameters and s.unit.parameters[0][1] == (
        32, 16, 1, 1))  # fmt: skip
    by_fan = {}
    for fan in ("in", "out"):
        tiles = Tiles(GHN(fan=fan, **SMALL))
        params = [jnp.ones(shape) for some in tiles.shapes(unit) for shape in some]
        by_fan[fan] = tiles.tensors(unit, params)[0]
    np.testing.assert_allclose(by_fan["in"], by_fan["out"] * math.sqrt(2), rtol=1e-6)
    assert Tiles(GHN(fan="out", **SMALL)) != Tiles(GHN(**SMALL)) == Tiles(GHN(stack=2, **SMALL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fan": "up"}, "fan is 'up'; allowed: 'in', 'out'"),
        ({"rounds": 0}, "rounds is 0; allowed: 1 or more"),
        ({"stack": 0}, "stack is 0; allowed: 1 or more"),
        ({"encoder": "mlp", "rounds": 5}, "'mlp' does not sweep"),
        ({"fan": "out", "normalise": False}, "normalise is False"),
    ],
)
def test_choices_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: GHN(**options).init_variables(0))


# --- Training -------------------------------------------------------------------------------------


def test_a_finite_set_of_training_architectures():
    """The first of the endless stream; every pass has all of them, in another order."""
    config = preset("demo").replace(training_architectures=5)
    source = loop.architecture_source(config, SIZE)
    passes = [[source(5 * epoch + i) for i in range(5)] for epoch in range(3)]
    rules = config.space.rules(SIZE)
    first = {sample_architecture("train", 0, i, rules=rules) for i in range(5)}
    assert all(set(one) == first and len(one) == 5 for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    # What is resumed goes on where it stopped.
    again = loop.architecture_source(config, SIZE)
    assert [again(position) for position in range(7, 12)] == (passes[1] + passes[2])[2:7]
    stream = Stream(GHN(**SMALL | {"max_shape": (8, 8, 7, 7)}), again, size=2, image_size=SIZE)
    assert next(stream.batches(8)).architectures == (passes[1][3], passes[1][4])


def test_rows_change_what_they_say():
    before = preset("demo")
    for name, ablation in ABLATIONS.items():
        after = ablate(name, before)
        changed = {k for k, v in after.options().items() if before.options()[k] != v}
        assert changed <= {"ablation", *ablation.changes, "tile_channels", "tile_inputs", "steps",
                           "epochs", "decay_epochs"}  # fmt: skip
    longer = ablate("bm1-longer", preset("ghn2"))
    assert (longer.data.epochs, longer.data.steps) == (2400, None)
    assert longer.optimiser.decay_epochs == (1600, 2000)
    assert ablate("bm1-longer", before).data.steps == 8 * before.data.steps
    assert ablate("bm1-no-tiling", preset("ghn2")).ghn(Task()).max_shape == (512, 1024, 11, 11)
    assert ablate("ghn1", preset("ghn2")).ghn(Task()) == preset("ghn1").ghn(Task())
    assert ablate("no-gatedgnn", preset("ghn2")).ghn(Task()) == preset("mlp").ghn(Task())


def test_help_lists_the_rows(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    assert "bm1-no-tiling-mlp-decoder," in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ablation", "no-graph"], "ablation is 'no-graph'; allowed: ghn2, 1000-archs"),
        (["--ablation", "bm1", "--meta-batch", "8"],
         "--ablation bm1 is meta-batch = 1, but --meta-batch says 8"),
        (["--ablation", "no-layer-norm", "--layer-norm"],
         "no-layer-norm is layer-norm = False, but --layer-norm says True"),
    ],
)  # fmt: skip
def test_what_contradicts_a_row(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.parse(arguments)


def test_options_beside_a_row():
    config = train.parse(["--preset", "demo", "--ablation", "bm1-longer", "--steps", "30",
                          "--meta-batch", "1"])  # fmt: skip
    assert (config.data.steps, config.space.meta_batch, config.ablation) == (30, 1, "bm1-longer")
    assert config.data.epochs == 8 * preset("demo").data.epochs


def test_what_cannot_be_trained_is_refused(tmp_path):
    digits = load_images("digits", "train")
    out = tmp_path / "run"
    config = ablate("bm1-no-tiling-mlp-decoder", preset("ghn2").replace(out=out))
    with pytest.raises(ValueError, match=r"has 1,670,682,738 parameters, which take 33 GB"):
        loop.setup(config, digits)
    assert not out.exists()
    with pytest.raises(ValueError, match="all of --nets few.json are trained on; leave one out"):
        loop.check(config.replace(nets="few.json", training_architectures=5))
    with pytest.raises(ValueError, match="--training-architectures is 0; allowed: 1 or more"):
        loop.check(config.replace(training_architectures=0))
