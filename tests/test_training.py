"""Updates of the hypernetwork, the training program, and what it leaves on disk."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_ghn

from ghn_jax.architecture import Architecture
from ghn_jax.checkpoint import load_ghn
from ghn_jax.compilation import CompilationCounter
from ghn_jax.executor.bucket import Bucket
from ghn_jax.executor.program import make_plan
from ghn_jax.ghn import GHN
from ghn_jax.images import load_images
from ghn_jax.mesh import make_mesh
from ghn_jax.metabatch import Stream, common_capacity, make_meta_batch
from ghn_jax.metastep import MetaStep
from ghn_jax.network import build_network
from ghn_jax.presets import PRESETS, preset
from ghn_jax.sampling import RULES, sample_architecture
from ghn_jax.wiring import wire

GHN_ = GHN(max_shape=(16, 16, 11, 11), virtual_includes_real=True)
SIZE, BATCH = 16, 8
RULES_ = dataclasses.replace(
    RULES["train"], widths=(8,), fc_dims=(16,), n_cells=(3, 4), nodes=(1, 1), deep_nodes=1
)


def attention_networks(count: int) -> list[Architecture]:
    """Architectures of one bucket, the one that compiles fastest."""
    found, index = [], 0
    while len(found) < count:
        arch = sample_architecture("train", 7, index, rules=RULES_)
        index += 1
        if Bucket.of(wire(arch, image_size=SIZE)) == Bucket(8, 1, SIZE, "vit"):
            # Dropout has a stream of random numbers of its own.
            found.append(arch.replace(fc_layers=1))
    return found


ARCHITECTURES = attention_networks(8)
ROOM = common_capacity(make_plan(wire(arch, image_size=SIZE)).needed for arch in ARCHITECTURES)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "train", image_size=SIZE)


@pytest.fixture(scope="module")
def batch(digits):
    images, labels = next(train_ghn.train_batches(digits, BATCH, seed=0, start_step=0))
    return jnp.asarray(images), jnp.asarray(labels)


@pytest.fixture(scope="module")
def sgd():
    """A step whose update is the gradient itself."""
    return MetaStep(GHN_, optax.sgd(1.0))


def meta_batch(architectures, capacity=ROOM, **options):
    options |= {"image_size": SIZE, "capacity": capacity}
    return make_meta_batch(GHN_, architectures, **options)


def test_an_update_is_the_gradient_of_the_mean_loss_of_the_modules(sgd, batch):
    images, labels = batch
    state = sgd.init(0)

    def mean_loss(params):
        losses = []
        for arch in ARCHITECTURES[:2]:
            predicted = GHN_.predict({"params": params}, arch, image_size=SIZE)
            logits = build_network(arch, image_size=SIZE).apply({"params": predicted}, images)
            losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())
        return sum(losses) / 2

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    before = jax.tree.map(np.asarray, state.params)
    # Each with arenas of its own size.
    networks = meta_batch(ARCHITECTURES[:2], capacity=None)
    after, metrics = sgd(state, networks, images, labels)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.global_norm(grads)), rel=1e-3)
    assert metrics.applied
    assert int(after.step) == 1
    worst = float(max(jnp.abs(g).max() for g in jax.tree.leaves(grads)))
    for old, new, grad in zip(*map(jax.tree.leaves, (before, after.params, grads)), strict=True):
        np.testing.assert_allclose(old - new, grad, rtol=1e-3, atol=1e-4 * worst)


def test_workers_share_the_architectures_and_the_result_is_the_same(sgd, batch):
    one, alone = sgd(sgd.init(0), meta_batch(ARCHITECTURES[:4]), *batch)
    two, shared = sgd(sgd.init(0), meta_batch(ARCHITECTURES[:4], n_groups=2), *batch)
    assert float(alone.loss) == pytest.approx(float(shared.loss), rel=1e-5)
    assert float(alone.top1) == float(shared.top1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
                 one.params, two.params)  # fmt: skip


@pytest.mark.parametrize(("mesh", "n_groups"), [("arch=2", 2), ("data=2", 1)])
def test_two_devices_make_the_update_of_one(mesh, n_groups, sgd, batch):
    # With dropout; as many architectures a group as in the tests above.
    architectures = [a.replace(fc_layers=2) for a in ARCHITECTURES[: 2 * n_groups]]
    one, alone = sgd(sgd.init(0), meta_batch(architectures, n_groups=n_groups), *batch)
    step = MetaStep(GHN_, optax.sgd(1.0), mesh=make_mesh(mesh))
    two, shared = step(step.init(0), meta_batch(architectures, n_groups=n_groups), *batch)
    assert float(alone.loss) == pytest.approx(float(shared.loss), rel=1e-5)
    assert float(alone.top1) == float(shared.top1)
    assert float(alone.grad_norm) == pytest.approx(float(shared.grad_norm), rel=1e-4)
    start = sgd.init(0).params
    for before, a, b in zip(*map(jax.tree.leaves, (start, one.params, two.params)), strict=True):
        a, b, before = map(np.asarray, (a, b, before))
        worst = np.abs(before - a).max()
        np.testing.assert_allclose(before - b, before - a, rtol=1e-4, atol=1e-4 * worst)
    assert len(two.step.sharding.device_set) == 2


def test_groups_that_do_not_fit_the_rows(batch):
    step = MetaStep(GHN_, optax.sgd(1.0), mesh=make_mesh("data=2"))
    message = "2 groups for 1 rows of 2 devices; allowed: as many"
    with pytest.raises(ValueError, match=message):
        step(step.init(0), meta_batch(ARCHITECTURES[:2], n_groups=2), *batch)
    with pytest.raises(ValueError, match="7 images cannot be divided between 2 devices"):
        step(step.init(0), meta_batch(ARCHITECTURES[:2]), batch[0][:7], batch[1][:7])


def test_what_is_not_finite_changes_nothing(sgd, batch):
    images, labels = batch
    state = sgd.init(0)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = sgd(state, meta_batch(ARCHITECTURES[:2]), images * jnp.nan, labels)
    assert not metrics.applied
    assert not np.isfinite(metrics.loss)
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, after.params)
    # And the next update is as if nothing had been.
    _, metrics = sgd(after, meta_batch(ARCHITECTURES[:2]), images, labels)
    assert metrics.applied


def test_no_program_is_compiled_for_another_architecture_of_a_bucket(sgd, batch):
    # Of graphs that the encoder sweeps in 32 steps and in 64.
    for i in (0, 2):
        sgd(sgd.init(0), meta_batch(ARCHITECTURES[i : i + 2]), *batch)
    counter = CompilationCounter()
    for i in (1, 3, 4, 5, 6):
        _, metrics = sgd(sgd.init(0), meta_batch(ARCHITECTURES[i : i + 2]), *batch)
        assert metrics.applied
    assert counter.count == 0


def test_there_is_one_program_for_each_bucket_of_the_papers_architectures():
    """What programs depend on, over 320 training architectures of which none repeats."""
    c = preset("ghn2")
    ghn, rules = c.ghn(10, 32), c.rules(32)
    seen: dict[Bucket, set] = {}
    rows = set()
    architectures = [sample_architecture("train", 0, i, rules=rules) for i in range(400)]
    assert len({json.dumps(a.to_dict()) for a in architectures}) == 400
    stream = Stream(ghn, architectures.__getitem__, 8, 32, n_groups=2)
    for batch in itertools.islice(stream.batches(0), 40):
        for group in batch.groups:
            rows.add(tuple((kind, len(nodes)) for kind, nodes in sorted(group.rows.nodes.items())))
            for program in group.programs:
                seen.setdefault(program.bucket, set()).add(program.capacity)
                # Beyond it, everything is an array, always of the same shape.
                assert len(program.table.kind) == program.capacity.instructions
    assert len(rows) == 1
    assert {len(capacities) for capacities in seen.values()} == {1}
    assert len(seen) <= 40


def test_padded_graphs_have_the_room_that_was_asked_for():
    """Static sizes do not depend on the architectures, up to that room."""
    few, many = ARCHITECTURES[:2], ARCHITECTURES[3:5]

    def size(architectures, graph_nodes):
        batch = meta_batch(architectures, graph_nodes=graph_nodes)
        return len(batch.groups[0].graph.nodes["primitive"])

    assert [size(a, 128) for a in (few, many)] == [256, 256]
    nodes = meta_batch(ARCHITECTURES[:2]).nodes
    assert nodes < size(few, 8) < 4 * nodes


def test_a_stream_goes_on_where_it_stopped():
    def architecture(position):
        return ARCHITECTURES[position % 8]

    stream = Stream(GHN_, architecture, size=3, image_size=SIZE, max_nodes=10_000)
    batches = stream.batches(0)
    first, second = next(batches), next(batches)
    assert first.architectures == tuple(ARCHITECTURES[:3])
    assert (first.position, second.position) == (3, 6)
    again = next(stream.batches(first.position))
    assert again.architectures == second.architectures
    jax.tree.map(np.testing.assert_array_equal, again.groups[0].graph, second.groups[0].graph)


def test_large_meta_batches_are_passed_over():
    sizes = [len(GHN_.graph(arch, image_size=SIZE)) for arch in ARCHITECTURES]
    limit = sorted(sizes)[4]
    stream = Stream(GHN_, lambda i: ARCHITECTURES[i % 8], size=1, image_size=SIZE, max_nodes=limit)
    batches = stream.batches(0)
    found = [next(batches) for _ in range(5)]
    assert [b.nodes for b in found] == [n for n in [*sizes, *sizes] if n <= limit][:5]


# --- The program ----------------------------------------------------------------------------------


def config(out, tmp_path, **changes):
    return dataclasses.replace(
        preset("demo"), out=out, batch_size=BATCH, meta_batch=2, save_every=2,
        cache_dir=tmp_path / "cache", **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """A run of four updates, and one that stops after two and is resumed."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr(train_ghn, "architecture_source", lambda *_: lambda i: ARCHITECTURES[i % 8])
    train_ghn.train(config(folder / "whole", folder, steps=4), digits)
    train_ghn.train(config(folder / "parts", folder, steps=2), digits)
    # Of an update that was interrupted before its checkpoint.
    with (folder / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 99.0, "top1": 0.0}\n{"step": 4, "lo')
    train_ghn.train(config(folder / "parts", folder, steps=4, resume=True), digits)
    patch.undo()
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_one_record_for_each_update(runs):
    found = records(runs / "whole")
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    keys = ["step", "loss", "top1", "seconds", "waited", "nodes", "architectures", "compilations"]
    assert all(list(r) == keys for r in found)
    assert all(0 < r["waited"] < r["seconds"] for r in found)
    assert [r["architectures"] for r in found] == [2, 4, 6, 8]
    assert found[0]["nodes"] == sum(len(GHN().graph(a, image_size=SIZE)) for a in ARCHITECTURES[:2])
    assert found[0]["compilations"] > 0
    assert found[1]["compilations"] == found[3]["compilations"]


def test_resumed_is_uninterrupted(runs):
    for whole, parts in zip(records(runs / "whole"), records(runs / "parts"), strict=True):
        for key in ("step", "loss", "top1", "nodes", "architectures"):
            assert whole[key] == parts[key], key
    (ghn, whole), (_, parts) = load_ghn(runs / "whole"), load_ghn(runs / "parts")
    assert ghn.num_classes == 10
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    start = ghn.init_variables(0)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (start, whole)), strict=True))


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "ghn3"], "preset is 'ghn3'; allowed: ghn2, ghn1, mlp, demo"),
        (["--steps", "0"], "--steps is 0; allowed: 1 or more"),
        (["--meta-batch", "0"], "--meta-batch is 0; allowed: 1 or more"),
        (["--dataset", "mnist"], "mnist.*cifar10"),
        (["--dataset", "cifar10", "--data-dir", "/nowhere"], "'/nowhere', which does not exist"),
        (["--nets", "/nowhere/nets.hdf5"], "nets.hdf5"),
        (["--resume"], "holds no checkpoint; leave it out"),
    ],
)
def test_what_cannot_work_ends_at_once_in_a_sentence(arguments, message, tmp_path):
    if "--preset" not in arguments:
        arguments = ["--preset", "demo", *arguments]
    options = ["--out", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    with pytest.raises((ValueError, OSError), match=message) as error:
        train_ghn.main([*arguments, *options])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(runs):
    before = files(runs / "whole")
    with pytest.raises(ValueError, match="holds a run of 4 updates already; add --resume"):
        train_ghn.main(["--preset", "demo", "--out", str(runs / "whole")])
    assert files(runs / "whole") == before


def test_a_run_of_another_hypernetwork_is_not_resumed(runs, digits):
    before = files(runs / "whole")
    other = config(runs / "whole", runs, steps=6, resume=True, virtual_edges=1)
    with pytest.raises(ValueError, match="does not fit the module"):
        train_ghn.train(other, digits)
    assert files(runs / "whole") == before


def test_options_change_the_preset():
    given = train_ghn.parse(["--preset", "ghn1", "--learning-rate", "0.5", "--widths", "16", "32"])
    assert (given.meta_batch, given.virtual_edges) == (1, 1)
    assert (given.learning_rate, given.widths) == (0.5, (16, 32))


def test_the_papers_hyperparameters():
    for name, meta in (("ghn2", 8), ("ghn1", 1), ("mlp", 1)):
        c = PRESETS[name]
        assert (c.learning_rate, c.weight_decay, c.clip, c.batch_size) == (1e-3, 1e-5, 5.0, 64)
        assert (c.epochs, c.decay_epochs, c.decay, c.meta_batch) == (300, (200, 250), 0.1, meta)
        assert c.max_nodes == 2200
        assert c.rules(32).n_cells == RULES["train"].n_cells
    assert PRESETS["ghn1"].ghn(10, 32).normalise is False
    assert PRESETS["mlp"].ghn(10, 32).hypernet == "mlp"


def test_the_learning_rate_falls_tenfold_at_epochs_200_and_250():
    optimizer = preset("ghn2").optimizer(steps_per_epoch=1)
    params = jnp.zeros(())
    state, sizes = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(300):
        step, state = update(jnp.ones(()), state, params)
        sizes.append(-float(step))
    np.testing.assert_allclose(np.array(sizes)[[0, 199, 200, 249, 250, 299]],
                               [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-3)  # fmt: skip
