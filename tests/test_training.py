"""Updates of the hypernetwork, the training program, and what it leaves on disk."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from definition import unit_by_unit
from jax.flatten_util import ravel_pytree

from ghn_jax.cli import train
from ghn_jax.data.images import load_images, train_batches
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.network import Network
from ghn_jax.deepnets1m.reader import read_architectures
from ghn_jax.deepnets1m.sampling import RULES, sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.plan import make_plan
from ghn_jax.engine.programs import Programs
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn, save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training import loop
from ghn_jax.training.config import preset
from ghn_jax.training.mesh import make_mesh
from ghn_jax.training.meta_batch import make_meta_batch
from ghn_jax.training.meta_loss import meta_loss
from ghn_jax.training.run_folder import lock
from ghn_jax.training.stopping import NOTHING, SAVE, STOP, Stopped
from ghn_jax.training.update import MetaStep

GHN_ = GHN(max_shape=(16, 16, 11, 11), virtual_includes_real=True)
SIZE, BATCH = 16, 8
RULES_ = dataclasses.replace(
    RULES["train"], widths=(8,), fc_dims=(16,), n_cells=(3, 4), nodes=(1, 1), deep_nodes=1
)


def small_architectures(count: int, pool: int = 60) -> list[Architecture]:
    """With attention and without; after the first of each, those that need the fewest programs."""
    # Dropout has a stream of random numbers of its own.
    found = [
        sample_architecture("train", 7, i, rules=RULES_).replace(fc_layers=1) for i in range(pool)
    ]
    chosen, units = [], set()

    def needed(arch):
        plan = make_plan(wire(arch, Task(image_size=SIZE)))
        return {(s.unit, plan.values[s.output], None in s.inputs) for s in plan.steps}

    while len(chosen) < count:
        # One with attention, one without, in turn.
        some = [a for a in found if a.has_attention == (len(chosen) % 2 == 0)]
        best = min(some, key=lambda arch: len(needed(arch) - units))
        found.remove(best)
        chosen.append(best)
        units |= needed(best)
    return chosen


ARCHITECTURES = small_architectures(8)


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "train", image_size=SIZE)


@pytest.fixture(scope="module")
def batch(digits):
    images, labels = next(train_batches(digits, BATCH, seed=0, start_step=0))
    return jnp.asarray(images), jnp.asarray(labels)


@pytest.fixture(scope="module")
def sgd():
    """A step whose update is the gradient itself."""
    step = MetaStep(GHN_, optax.sgd(1.0))
    yield step
    step.close()


def meta_batch(architectures, **options):
    return make_meta_batch(GHN_, architectures, image_size=SIZE, **options)


def update(step, architectures, images, labels, state=None):
    """An update of a state, the first one if not given."""
    prepared = step.prepare(meta_batch(architectures), len(images))
    return step(state or step.init(0), prepared, images, labels)


def assert_same_update(step, one, other):
    """States after an update by the gradient itself."""
    start = step.init(0).params
    for before, a, b in zip(*map(jax.tree.leaves, (start, one, other)), strict=True):
        a, b, before = map(np.asarray, (a, b, before))
        worst = np.abs(before - a).max()
        np.testing.assert_allclose(before - b, before - a, rtol=1e-3, atol=1e-4 * worst)


@pytest.fixture(scope="module")
def expected(sgd, batch):
    """Loss and gradient of the definition, with dropout in one of two networks."""
    architectures = [ARCHITECTURES[0], ARCHITECTURES[1].replace(fc_layers=2)]
    # The engine's key is of the run, the update and the network.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)
    with unit_by_unit(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "make_rng", lambda self, name: key)
        result = jax.value_and_grad(
            lambda p: meta_loss(GHN_, p, architectures, *batch, dropout=[key, key])
        )(sgd.init(0).params)
    return architectures, *result


@pytest.fixture(scope="module")
def two_devices():
    programs = Programs()
    yield {"mesh": make_mesh(), "programs": programs}
    programs.close()


@pytest.mark.parametrize(("devices", "shard"), [(1, False), (2, False), (2, True)])
def test_an_update_is_the_gradient_of_the_mean_loss_of_the_modules(
    devices, shard, sgd, batch, expected, two_devices
):
    architectures, loss, grads = expected
    step = sgd
    if devices == 2:
        step = MetaStep(GHN_, optax.sgd(1.0, momentum=0.9), shard=shard, **two_devices)
    first = step.init(0)
    before = jax.tree.map(np.asarray, first.params)
    parts = sum(not x.is_fully_replicated for x in jax.tree.leaves(first))
    assert parts == 2 * 2 * shard  # the decoder's two large kernels, and the optimizer's
    after, metrics = update(step, architectures, *batch)
    assert sum(not x.is_fully_replicated for x in jax.tree.leaves(after)) == parts
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics.grad_norm) == pytest.approx(float(optax.global_norm(grads)), rel=1e-3)
    assert metrics.applied
    assert int(after.step) == 1
    assert len(after.step.sharding.device_set) == devices
    worst = float(max(jnp.abs(g).max() for g in jax.tree.leaves(grads)))
    for old, new, grad in zip(*map(jax.tree.leaves, (before, after.params, grads)), strict=True):
        np.testing.assert_allclose(old - new, grad, rtol=1e-3, atol=1e-4 * worst)
    if devices == 2:
        _, alone = update(sgd, architectures, *batch)
        assert float(metrics.top1) == float(alone.top1)
        step.close()


def test_workers_run_networks_at_once_and_the_result_is_the_same(sgd, batch, monkeypatch):
    one, alone = update(sgd, ARCHITECTURES[:4], *batch)
    step = MetaStep(GHN_, optax.sgd(1.0), workers=2)
    step.engine.programs.close()
    step.engine = step._tiles.engine = sgd.engine  # whose programs there are already
    threads, forward = set(), sgd.engine.forward

    def noted(*args, **options):
        threads.add(threading.current_thread())
        return forward(*args, **options)

    monkeypatch.setattr(sgd.engine, "forward", noted)
    two, shared = update(step, ARCHITECTURES[:4], *batch)
    assert len(threads) == 2
    assert float(alone.loss) == pytest.approx(float(shared.loss), rel=1e-6)
    assert float(alone.top1) == float(shared.top1)
    assert_same_update(sgd, one.params, two.params)


def test_dropout_is_of_the_update_and_the_network(sgd, batch):
    architectures = [ARCHITECTURES[1].replace(fc_layers=2)] * 2
    prepared = sgd.prepare(meta_batch(architectures), BATCH)
    params = sgd.init(0).params

    def losses(step):
        totals, _ = sgd.gradient(params, prepared, *batch, np.int32(step))
        return [float(total[0]) for total in totals]

    first, again, second = losses(1), losses(1), losses(2)
    assert first == again
    assert len({*first, *second}) == 4


def test_images_that_devices_cannot_share():
    step = MetaStep(GHN_, optax.sgd(1.0), mesh=make_mesh())
    with pytest.raises(ValueError, match="7 images cannot be divided between 2 devices"):
        step.prepare(meta_batch(ARCHITECTURES[:2]), 7)


def test_what_is_not_finite_changes_nothing(sgd, batch):
    images, labels = batch
    state = sgd.init(0)
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = update(sgd, ARCHITECTURES[:2], images * jnp.nan, labels, state)
    assert not metrics.applied
    assert not np.isfinite(metrics.loss)
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, after.params)
    # And the next update is as if nothing had been.
    _, metrics = update(sgd, ARCHITECTURES[:2], images, labels, after)
    assert metrics.applied


def test_parameters_that_would_not_be_finite_are_not_taken(sgd, batch):
    """Whatever makes them so: here neither the loss nor the gradient."""
    step = MetaStep(GHN_, optax.sgd(np.inf), programs=sgd.engine.programs)
    with closing(step):
        before = jax.tree.map(np.asarray, step.init(0).params)
        after, metrics = update(step, ARCHITECTURES[:2], *batch)
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.grad_norm)
    assert not metrics.applied
    jax.tree.map(np.testing.assert_array_equal, before, after.params)


def test_the_average_of_parameters(sgd):
    """The mean of all parameters after updates, until a decay is reached; bad ones do not count."""
    step = MetaStep(GHN_, optax.sgd(1.0), average=0.6)
    state, size = step.init(0), sum(x.size for x in jax.tree.leaves(step.init(0).params))
    start = ravel_pytree(state.params)[0]
    found = []
    for gradient in (-1.0, -1.0, np.nan, -1.0, -4.0):
        state, _ = step._apply(
            state, jnp.ones((1, 2)), jnp.full((1, size), gradient), jnp.zeros((1, 2))
        )
        found.append(float((ravel_pytree(state.trained)[0] - start).mean()))
    step.close()
    # Parameters are 1, 2, 2, 3, 7 above the start.
    expected = [1, 1.5, 0.6 * 1.5 + 0.8, 0.6 * 1.7 + 1.2, 0.6 * 2.22 + 2.8]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_what_a_process_asks_for_comes_out_of_the_update(sgd, batch):
    prepared, state = sgd.prepare(meta_batch(ARCHITECTURES[:2]), BATCH), sgd.init(0)
    for request in (STOP, SAVE, NOTHING):
        state, metrics = sgd(state, prepared, *batch, request)
        assert int(metrics.request) == request


def swapped(arch: Architecture) -> Architecture:
    """The same operations, another network to everything that looks at its edges."""
    genotype = arch.genotype
    edges = [tuple(g[i ^ 1] for i in range(len(g))) for g in (genotype.normal, genotype.reduce)]
    return arch.replace(
        genotype=Genotype(edges[0], genotype.normal_concat, edges[1], genotype.reduce_concat)
    )


def test_no_program_is_compiled_for_other_architectures_of_the_same_units(sgd, batch):
    for i in (0, 2):
        update(sgd, ARCHITECTURES[i : i + 2], *batch)
    counter = CompilationCounter()
    others = [swapped(arch) for arch in ARCHITECTURES[:4]]
    assert not set(others) & set(ARCHITECTURES)
    losses = set()
    for i in (0, 2):
        for architectures in (others[i : i + 2], others[i : i + 2][::-1]):
            _, metrics = update(sgd, architectures, *batch)
            assert metrics.applied
            losses.add(float(metrics.loss))
    assert counter.count == 0
    assert len(losses) >= 2


def test_what_is_prepared_ahead_is_all_that_an_update_needs(sgd, batch):
    update(sgd, ARCHITECTURES[:2], *batch)
    made = sgd.engine.programs.made
    new = [arch.replace(C=16) for arch in ARCHITECTURES[:2]]
    prepared = sgd.prepare(meta_batch(new), BATCH)
    deadline = time.monotonic() + 120
    programs = sgd.engine.programs
    while not all(program.ready for program in programs._programs.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert programs.made > made
    counter = CompilationCounter()
    _, metrics = sgd(sgd.init(0), prepared, *batch)
    assert metrics.applied
    assert counter.count == 0


class Listed(Programs):
    """Programs that are told and not compiled."""

    def get(self, key, make):
        return self._programs.setdefault(key, None)


def test_hardly_any_program_is_new_after_a_few_hundred_architectures():
    """Of the paper's, of which none repeats."""
    rules, programs = preset("ghn2").space.rules(32), Listed()
    engine, counts, asked = Engine(programs=programs), [], 0
    architectures = [sample_architecture("train", 0, i, rules=rules) for i in range(240)]
    assert len(set(architectures)) == len(architectures)
    for arch in architectures:
        plan = make_plan(wire(arch))
        engine.prepare(plan, 64, gradient=True)
        counts.append(len(programs))
        asked += 2 * len(plan.steps)
    per_architecture = asked / len(architectures)
    assert counts[-1] - counts[159] < 0.04 * 80 * per_architecture


# --- The program ----------------------------------------------------------------------------------


def config(out, tmp_path, **changes):
    options = {"batch_size": BATCH, "meta_batch": 2, "save_every": 2, "average": 0.5, **changes}
    return preset("demo").replace(out=out, cache_dir=tmp_path / "cache", **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """A run of four updates, and one that a signal stops on its way and that is resumed."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "architecture_source", lambda *_: lambda i: ARCHITECTURES[i % 4])
    loop.train(config(folder / "whole", folder, steps=4), digits)
    with patch.context() as signalled:
        signalled.setattr(loop, "Log", LogWithASignal)
        with pytest.raises(Stopped) as stopped:
            loop.train(config(folder / "parts", folder, steps=4, save_every=100), digits)
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    done = Checkpoints(folder / "parts").latest()
    assert done == len(records(folder / "parts")) < 4
    # Of an update that was interrupted before its checkpoint.
    with (folder / "parts" / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {done + 1}, "loss": 99.0, "top1": 0.0}}\n{{"step": {done + 2}, "lo')
    loop.train(config(folder / "parts", folder, steps=4, resume=True), digits)
    patch.undo()
    return folder


class LogWithASignal(loop.Log):
    """The machine is taken away while the second update is made."""

    def update(self, step, *args):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().update(step, *args)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_one_record_for_each_update(runs):
    found = records(runs / "whole")
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    keys = ["step", "loss", "top1", "grad_norm", "seconds", "waited", "nodes", "architectures",
            "compilations"]  # fmt: skip
    assert all(list(r) == keys for r in found)
    # An update is read while the next one waits, so that single ones may wait for longer.
    assert all(r["waited"] >= 0 for r in found)
    assert sum(r["waited"] for r in found) < sum(r["seconds"] for r in found)
    assert all(0 < r["grad_norm"] < 1000 for r in found)
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
    found = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {path: found[path] for path in found if path.name not in ("run.lock", "train.log")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "ghn3"], "preset is 'ghn3'; allowed: ghn2, ghn1, mlp, "),
        (["--steps", "0"], "--steps is 0; allowed: 1 or more"),
        (["--meta-batch", "0"], "--meta-batch is 0; allowed: 1 or more"),
        (["--features", "0"], "--features is 0; allowed: 1 or more"),
        (["--features", "30"], "features is 30; allowed: multiples of 4"),
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
        train.main([*arguments, *options])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_trained_hypernetwork_is_fine_tuned_on_chosen_architectures(digits, tmp_path):
    """It starts from the other one's parameters and takes the architectures in turn."""
    variables = GHN_.init_variables(5)
    save_ghn(tmp_path / "trained", GHN_, variables)
    nets = tmp_path / "nets.json"
    nets.write_text(json.dumps({"a": ARCHITECTURES[0].to_dict(), "b": ARCHITECTURES[2].to_dict()}))
    config = preset("demo").replace(
        init=tmp_path / "trained", nets=nets, out=tmp_path / "run", meta_batch=1, steps=3
    )
    run = loop.setup(config, digits)
    with closing(run.step):
        assert run.checkpoints.ghn() == GHN_
        jax.tree.map(np.testing.assert_array_equal, run.state.params, variables["params"])
        batches = itertools.islice(run.stream.batches(0), 3)
        assert [batch.architectures[0] for batch in batches] == [
            ARCHITECTURES[0], ARCHITECTURES[2], ARCHITECTURES[0],
        ]  # fmt: skip
    with pytest.raises(ValueError, match="for 10 classes, but digits has 7"):
        loop.setup(config, dataclasses.replace(digits, num_classes=7))
    nets.write_text("{}")
    with pytest.raises(ValueError, match="has no architectures"):
        loop.setup(config, digits)


def test_a_run_is_not_overwritten(runs):
    before = files(runs / "whole")
    with pytest.raises(ValueError, match="holds a run of 4 updates already; add --resume"):
        train.main(["--preset", "demo", "--out", str(runs / "whole")])
    assert files(runs / "whole") == before


def test_the_average_is_what_predicts_and_the_parameters_are_what_goes_on(runs):
    ghn, predicts = load_ghn(runs / "whole")
    with closing(MetaStep(ghn, preset("demo").optimiser.make(1, 4), average=0.5)) as step:
        like = jax.eval_shape(step.init, 0)
        _, _, trees = Checkpoints(runs / "whole").load(**loop._trees(like))
    average, (*_, parameters) = trees["params"], trees["training"]
    jax.tree.map(np.testing.assert_array_equal, average, predicts["params"])
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), average, parameters)
    assert max(jax.tree.leaves(apart)) > 1e-5


def test_a_run_of_another_hypernetwork_is_not_resumed(runs, digits):
    before = files(runs / "whole")
    other = config(runs / "whole", runs, steps=6, resume=True, virtual_edges=5, seed=3)
    message = r"started with --virtual-edges 50 \(now 5\), --seed 0 \(now 3\); leave .* --override"
    with pytest.raises(ValueError, match=message):
        loop.check(other)
    other = other.replace(override=True, tile_channels=8)
    loop.check(other)
    with pytest.raises(ValueError, match="does not fit the module"):
        loop.train(other, digits)
    assert files(runs / "whole") == before


def test_a_run_goes_on_with_the_options_that_it_was_started_with(
    runs, digits, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(runs / "whole", run)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    given = train.parse(["--resume", "--out", str(run), "--steps", "6"])
    before = config(runs / "whole", runs, steps=6, resume=True)
    assert given == before.replace(out=run)
    loop.check(given)
    # It is as long from now on.
    with closing(loop.setup(given, digits).step):
        assert train.parse(["--resume", "--out", str(run)]) == given
    # But where programs are kept is a matter of the machine.
    for words, kept in (([], "here"), (["--cache-dir", "there"], "there")):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "here")
        assert train.parse(["--resume", "--out", str(run), *words]).run.cache_dir == Path(kept)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert train.parse(["--resume", "auto", "--out", str(run)]).run.resume
    fresh = train.parse(["--out", str(tmp_path / "new"), "--preset", "demo", "--resume", "auto"])
    assert fresh == preset("demo").replace(out=tmp_path / "new")
    changed = given.replace(override=True, learning_rate=0.5)
    with closing(loop.setup(changed, digits).step):
        kept = Checkpoints(run).config()
    assert kept["changes"] == [{"updates": 4, "options": {"learning_rate": [2e-3, 0.5]}}]
    assert kept["training"]["learning_rate"] == 0.5
    loop.check(train.parse(["--resume", "--out", str(run)]))


def test_updates_that_stay_not_finite_end_the_run(digits, tmp_path, monkeypatch):
    """It goes back to the good checkpoint once, and keeps it."""
    monkeypatch.setattr(loop, "architecture_source", lambda *_: lambda i: ARCHITECTURES[i % 2])
    monkeypatch.setattr(loop, "BAD_IN_A_ROW", 2)
    went_back, go_back = [], loop._go_back
    monkeypatch.setattr(
        loop, "_go_back", lambda run, error: went_back.append(error.position) or go_back(run, error)
    )
    out = tmp_path / "run"
    # The first update is finite, and its parameters are beyond all that a network can have.
    bad = config(out, tmp_path, steps=8, learning_rate=1e30, save_every=1)
    with pytest.raises(
        FloatingPointError, match="2 in a row, were not finite.* of update 1 is kept"
    ) as error:
        loop.train(bad, digits)
    assert "\n" not in str(error.value)
    assert Checkpoints(out).latest() == 1
    assert went_back == [6]
    found = [json.loads(line) for line in (out / loop.BAD_UPDATES).read_text().splitlines()]
    assert [r["step"] for r in found] == [2, 3, 2, 3]
    assert len(read_architectures(_nets(tmp_path, found[0]["architectures"]))) == 2
    assert [r["loss"] is None for r in records(out)] == [False, True, True]


def _nets(folder, architectures):
    path = folder / "bad.json"
    path.write_text(json.dumps(architectures))
    return path


def test_a_folder_belongs_to_one_process(tmp_path):
    source = (
        "import sys, time; from pathlib import Path; from ghn_jax.training.run_folder import lock\n"
        "with lock(Path(sys.argv[1])): print('mine', flush=True); time.sleep(100)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", source, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        who = rf"in use by process {other.pid} on .*; wait until it has ended, or"
        with pytest.raises(ValueError, match=who), lock(tmp_path):
            pass
        other.kill()
        other.wait()
        with lock(tmp_path):  # of a process that is gone
            assert str(os.getpid()) in (tmp_path / "run.lock.owner").read_text()


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("learning_rate", (0, -1, np.nan, np.inf), "allowed: numbers above 0"),
        ("clip", (0, np.nan), "allowed: numbers above 0"),
        ("decay", (0, np.inf), "allowed: numbers above 0"),
        ("save_minutes", (0, np.nan), "allowed: numbers above 0"),
        ("weight_decay", (-1e-9, np.nan, np.inf), "allowed: 0 or more"),
        ("norm_penalty", (-1, np.nan), "allowed: 0 or more"),
        ("label_smoothing", (-0.1, 1.0, np.nan), "allowed: 0 to below 1"),
        ("average", (-0.1, 1.0, np.nan), "allowed: 0 to below 1"),
    ],
)
def test_numbers_that_no_training_works_with(option, values, message, tmp_path):
    for value in values:
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} is {value}; {message}"):
            loop.check(config(tmp_path, tmp_path, **{option: value}))
