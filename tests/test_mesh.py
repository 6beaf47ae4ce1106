"""Many devices and many processes: the same updates as on one device.

What takes minutes is marked `mesh`: `make test-mesh`.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ghn_jax.cli import train
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import NormSum
from ghn_jax.engine.engine import Engine
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn
from ghn_jax.training import launch, loop
from ghn_jax.training.config import preset
from ghn_jax.training.mesh import join_processes, make_mesh, mesh_shape, parse_mesh
from ghn_jax.training.meta_batch import MAX_BATCH_NODES, Stream, cost, divide, make_meta_batch
from ghn_jax.training.update import MetaStep

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for a device."""

    process_index: int
    id: int


def devices(processes: int, each: int):
    """Devices, not in order."""
    found = [Device(p, 100 * p + i) for p in range(processes) for i in range(each)]
    return found[::-1]


def test_a_row_is_a_process():
    mesh = make_mesh(devices(3, 2))
    assert mesh.axis_names == ("arch", "data")
    assert [[d.id for d in row] for row in mesh.devices] == [[0, 1], [100, 101], [200, 201]]
    assert dict(make_mesh().shape) == {"arch": 1, "data": 2}
    with pytest.raises(ValueError, match=r"processes have \[1, 2\] devices"):
        make_mesh([*devices(2, 2), Device(2, 200)])


def test_all_devices_are_rows_unless_asked_otherwise():
    assert mesh_shape(None, 8) == (8, 1)
    assert mesh_shape("arch=4,data=2", 8) == (4, 2)
    assert mesh_shape("data=4, arch=2", 8) == (2, 4)
    assert mesh_shape("data=4", 8) == (2, 4)
    assert mesh_shape("arch=2", 16) == (2, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=2", "'rows', no axis of the mesh; give arch=ROWS,data=COLUMNS"),
        ("arch=2,arch=4", "'arch', twice"),
        ("arch=0", "gives arch the size '0'; allowed: 1 or more"),
        ("arch=-2", "'-2'"),
        ("arch", "''"),
        ("arch=4,data=4", "is for 16 devices, but there are 8"),
        ("arch=3", "is for 3 devices, but there are 8"),
    ],
)
def test_a_mesh_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        mesh_shape(text, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 1, None), "for runs started by hand; give --coordinator HOST:PORT"),
        (("auto", None, 2), "for runs started by hand"),
        (("host:1", None, 2), "needs --process-id and --num-processes"),
        (("host", 0, 2), "is 'host'; allowed: HOST:PORT, or auto"),
        (("host:1", 2, 2), "is 2 of --num-processes 2; allowed: 0 to 1"),
    ],
)
def test_processes_that_cannot_be_joined(arguments, message):
    with pytest.raises(ValueError, match=message):
        join_processes(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "7"], "--batch-size is 7; allowed: multiples of 2"),
        (["--mesh", "arch=4"], "is for 4 devices, but there are"),
        (["--mesh", "rows=4"], "no axis of the mesh"),
        (["--process-id", "1"], "give --coordinator"),
    ],
)
def test_a_run_that_cannot_be_divided_ends_at_once(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(["--preset", "demo", "--out", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


def test_there_is_an_architecture_for_each_row_at_least(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda: make_mesh(devices(3, 1)))
    config = preset("demo").replace(out=tmp_path, meta_batch=2)
    with pytest.raises(ValueError, match="--meta-batch is 2; allowed: 3 or more"):
        loop.check(config)


# --- Processes of a machine -----------------------------------------------------------------------


@pytest.fixture
def eight(monkeypatch):
    """A machine with eight devices, on which nothing was started."""
    monkeypatch.delenv(launch._STARTED, raising=False)
    monkeypatch.setattr(launch, "_accelerators", lambda: 8)
    return monkeypatch


def test_rows_of_a_machine(eight):
    assert launch.rows_here(None, None, None) == (8, 1)
    assert launch.rows_here("arch=4,data=2", None, None) == (4, 2)
    assert launch.rows_here("data=4", None, None) == (2, 4)
    assert launch.rows_here("data=8", None, None) == (1, None)
    # Of two machines, half of the rows each.
    assert launch.rows_here(None, "host:1", 2) == (8, 1)
    assert launch.rows_here("data=4", "host:1", 2) == (2, 4)
    assert launch.rows_here("arch=2,data=8", "host:1", 2) == (1, None)
    with pytest.raises(ValueError, match="has 1 rows for 2 machines"):
        launch.rows_here("data=16", "host:1", 2)
    # On others, rows are started by something else; and those started here start none.
    assert launch.rows_here("arch=4,data=2", "auto", None) == (1, None)
    eight.setenv(launch._STARTED, "1")
    assert launch.rows_here("arch=4,data=2", "host:1", 8) == (1, None)


def test_a_cpu_is_as_many_devices_as_are_asked_for(monkeypatch):
    monkeypatch.delenv(launch._STARTED, raising=False)
    monkeypatch.setattr(launch, "_accelerators", lambda: 0)
    assert launch.rows_here(None, None, None) == (1, None)
    assert launch.rows_here("arch=2,data=1", None, None) == (2, 1)
    assert launch.rows_here("arch=3,data=2", None, None) == (3, 2)
    # JAX was told that it is two.
    assert launch.rows_here("arch=2", None, None) == (2, 1)
    assert launch.rows_here("data=2", None, None) == (1, None)
    with pytest.raises(ValueError, match="is for 3 devices, but there are 2"):
        launch.rows_here("arch=3", None, None)


class Process:
    """A stand-in for a process that is started."""

    started: list["Process"] = []
    codes: list[list] = []

    def __init__(self, command, env, start_new_session):
        assert start_new_session  # signals of the terminal come from here
        self.command, self.env, self.ended = command, env, []
        self.results = list(Process.codes[len(Process.started)])
        Process.started.append(self)

    def poll(self):
        return self.results.pop(0) if len(self.results) > 1 else self.results[0]

    def terminate(self):
        self.ended.append("terminate")

    def wait(self):
        self.ended.append("wait")


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "not given"])
    for name in (*launch._VISIBLE, launch._STARTED):
        monkeypatch.delenv(name, raising=False)
    Process.started, Process.codes = [], [[None, 0], [None, None, 0]]
    return monkeypatch


def test_each_row_has_its_own_devices(processes):
    assert launch.start_rows(["--steps", "3"], 2, 2) == 0
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in Process.started] == ["0,1", "2,3"]
    assert [p.env["ROCR_VISIBLE_DEVICES"] for p in Process.started] == ["0,1", "2,3"]
    assert all(p.env["JAX_NUM_CPU_DEVICES"] == "2" for p in Process.started)
    assert all(launch._STARTED in p.env for p in Process.started)
    first, second = (p.command for p in Process.started)
    assert first[:4] == [sys.executable, "train.py", "--steps", "3"]
    assert first[4] == "--coordinator"
    assert first[5].startswith("127.0.0.1:")
    assert first[5] == second[5]
    assert first[6:] == ["--process-id", "0", "--num-processes", "2"]
    assert second[6:] == ["--process-id", "1", "--num-processes", "2"]


def test_rows_of_the_second_machine(processes):
    processes.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert launch.start_rows([], 2, 2, "host:1", 1, 3) == 0
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in Process.started] == ["4,5", "6,7"]
    first, second = (p.command[2:] for p in Process.started)
    assert first == ["--coordinator", "host:1", "--process-id", "2", "--num-processes", "6"]
    assert second == ["--coordinator", "host:1", "--process-id", "3", "--num-processes", "6"]


@pytest.mark.parametrize(("code", "result"), [(3, 3), (-9, 9)])
def test_where_one_fails_the_others_are_ended(code, result, processes):
    Process.codes = [[None], [None, None, code]]
    assert launch.start_rows([], 2, 1) == result
    assert [p.ended for p in Process.started] == [["terminate", "wait"]] * 2


# --- Division of a meta-batch ---------------------------------------------------------------------


def test_architectures_are_divided_by_cost():
    assert divide([9.0, 1, 1, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert divide([3.0, 3, 2, 2], 2) == [[0, 2], [1, 3]]
    # One at least.
    assert divide([8.0, 0, 0, 0], 4) == [[0], [1], [2], [3]]
    assert sorted(map(len, divide([100.0] + [1.0] * 11, 4))) == [1, 3, 4, 4]


ARCHITECTURES = [
    sample_architecture("train", 3, i, rules=preset("demo").space.rules(32)) for i in range(16)
]


def test_processes_prepare_their_parts_of_one_division():
    ghn = preset("demo").ghn(Task(10, 16))

    def prepare(*share):
        return make_meta_batch(ghn, ARCHITECTURES, image_size=16, share=share)

    whole, parts = prepare(0, 1), [prepare(i, 3) for i in range(3)]
    assert whole.members == tuple(range(16))
    assert sorted(i for part in parts for i in part.members) == list(range(16))
    for part in parts:
        assert (part.nodes, part.architectures) == (whole.nodes, whole.architectures)
        assert part.members == tuple(sorted(part.members))
        for i, plan in zip(part.members, part.plans, strict=True):
            assert plan.wiring.arch == ARCHITECTURES[i]
        owners = {member for chunk in part.chunks for member, _ in chunk.owners}
        assert owners == set(range(len(part.members)))
        sizes = [len(ghn.graph(ARCHITECTURES[i], image_size=16)) for i in part.members]
        assert part.graph.n_node[:-1].tolist() == sizes
    costs = [sum(map(cost, part.plans)) for part in parts]
    assert max(costs) < 1.5 * min(costs)


def test_parts_of_different_sizes_have_arrays_of_one():
    ghn = preset("demo").ghn(Task(10, 16))
    parts = [make_meta_batch(ghn, ARCHITECTURES, image_size=16, share=(i, 3), graph_nodes=128)
             for i in range(3)]  # fmt: skip
    assert len({len(part.members) for part in parts}) > 1
    for name in ("nodes", "edges"):
        shapes = [jax.tree.map(np.shape, getattr(part.graph, name)) for part in parts]
        assert all(s == shapes[0] for s in shapes)


def test_the_limit_of_nodes_grows_with_the_meta_batch():
    ghn = preset("demo").ghn(Task(10, 16))
    nodes = make_meta_batch(ghn, ARCHITECTURES, image_size=16).nodes
    stream = Stream(ghn, lambda i: ARCHITECTURES[i % 16], 16, 16, max_nodes=-(-nodes // 2))
    assert next(stream.batches(0)).position == 16
    assert MAX_BATCH_NODES == 2200


def test_fewer_architectures_than_rows():
    with pytest.raises(ValueError, match="2 architectures cannot be divided between 3 rows"):
        make_meta_batch(
            preset("demo").ghn(Task(10, 16)), ARCHITECTURES[:2], image_size=16, share=(0, 3)
        )


# --- What devices exchange ------------------------------------------------------------------------


def test_batch_norm_sees_all_images_of_the_row():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 4, 4, 5)) * 3 + np.arange(6)[:, None, None, None]
    z, g = z.astype(np.float32), rng.normal(size=(6, 4, 4, 5)).astype(np.float32)
    params, unit = tuple(rng.normal(size=(2, 5)).astype(np.float32)), NormSum(5, 1)

    def gradient(params, z, g):
        y, statistics = unit.with_statistics(params, (z,))
        return y, statistics, *unit.gradient(params, (z,), statistics, g)

    engine = Engine(jax.devices()[:2])
    split = jax.jit(gradient)(params, *jax.device_put((z, g), engine.split))
    assert len(split[0].sharding.device_set) == 2
    assert not np.allclose(z[:3].mean((0, 1, 2)), z[3:].mean((0, 1, 2)), atol=1)
    for a, b in zip(*map(jax.tree.leaves, (split, gradient(params, z, g))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


EXCHANGES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def test_one_all_reduce_for_each_update():
    """What crosses processes: loss, accuracy and gradient, once."""
    ghn = preset("demo").ghn(Task(10, 16))
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("arch", "data"))
    step = MetaStep(ghn, optax.sgd(1.0), mesh=mesh)
    state = jax.eval_shape(lambda: step.init(0))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.replicated), state
    )
    size = sum(x.size for x in jax.tree.leaves(state.params))
    rows = [
        jax.ShapeDtypeStruct((2, n), jnp.float32, sharding=NamedSharding(mesh, P("arch")))
        for n in (2, size, 2)
    ]
    text = step._apply.lower(state, *rows).compile().as_text()
    exchanges = [
        line
        for line in text.splitlines()
        if any(f" {name}(" in line or f" {name}-start(" in line for name in EXCHANGES)
    ]
    assert len(exchanges) == 1
    assert "all-reduce" in exchanges[0]
    assert f"f32[{size}]" in exchanges[0] or f"f32[1,{size}]" in exchanges[0]


# --- Whole runs -----------------------------------------------------------------------------------


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "mesh_process.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def finish(*processes):
    for process in processes:
        output = process.communicate()[0]
        assert process.returncode == 0, output[-3000:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    path = tmp_path_factory.mktemp("updates") / "one.npz"
    finish(start("update", 1, path))
    return np.load(path)


@pytest.mark.mesh
@pytest.mark.parametrize(("processes", "each"), [(1, 8), (2, 4)])
def test_eight_devices_make_the_update_of_one(processes, each, one_device, tmp_path):
    """Its gradient, that is: Adam divides by it, and where it is 0 but for rounding, that shows."""
    path, port = tmp_path / "eight.npz", free_port()
    launch = [
        (f"localhost:{port}", i, processes) if processes > 1 else () for i in range(processes)
    ]
    finish(*[start("update", each, path, *options) for options in launch])
    eight = np.load(path)
    assert eight["mesh"].tolist() == [processes, each]
    np.testing.assert_allclose(eight["loss"], one_device["loss"], rtol=1e-5)
    assert eight["top1"] == one_device["top1"]
    arrays = [name for name in one_device if name.startswith("arr_")]
    for name in arrays:
        worst = np.abs(one_device[name]).max()
        np.testing.assert_allclose(eight[name], one_device[name], rtol=1e-4, atol=1e-4 * worst)
    assert any(one_device[name].any() for name in arrays)


OPTIONS = ("--preset", "demo", "--batch-size", "8", "--save-every", "5")


def train_alone(out, *options):
    finish(start("train", 2, *OPTIONS, "--out", out, *options))


def train_as_two(out, *options):
    address = f"localhost:{free_port()}"
    common = (*OPTIONS, "--out", out, "--coordinator", address, "--num-processes", 2)
    finish(*[start("train", 1, *common, "--process-id", i, *options) for i in range(2)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten updates of one process with two devices, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train_alone(folder / "run", "--steps", 10, "--cache-dir", folder / "cache")
    return folder / "run"


@pytest.fixture(scope="module")
def half(tmp_path_factory, whole):
    """The first five updates of two processes with a device each."""
    folder = tmp_path_factory.mktemp("half") / "run"
    train_as_two(folder, "--steps", 5, "--cache-dir", whole.parent / "cache")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5
    return folder


def check_same(run, other):
    """Runs of the same updates, the last of them the second five.

    Two processes add up in another order, so the last bit may differ; what has a gradient of 0 but
    for rounding is moved as far as all else. So a tensor may be off by a hundredth of the way that
    it went in five updates.
    """
    found, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, other)
    )
    for a, b in zip(found, expected, strict=True):
        for key in ("step", "top1", "nodes", "architectures"):
            assert a[key] == b[key], key
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    params = load_ghn(run)[1]["params"]
    _, _, begun = Checkpoints(other).load(upto=5, params=jax.eval_shape(lambda: params))
    ended = load_ghn(other)[1]["params"]
    norm = np.linalg.norm

    def compare(path, a, b, before):
        assert norm(a - b) < 0.01 * norm(b - before), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, params, ended, begun["params"])


@pytest.mark.mesh
@pytest.mark.parametrize(("before", "after"), [("half", "two"), ("half", "one"), ("whole", "two")])
def test_a_run_goes_on_with_other_processes(before, after, whole, half, tmp_path):
    run = tmp_path / "run"
    shutil.copytree({"half": half, "whole": whole}[before], run)
    shutil.rmtree(run / "checkpoints" / "10", ignore_errors=True)
    resume = ("--steps", 10, "--resume", "--cache-dir", whole.parent / "cache")
    (train_alone if after == "one" else train_as_two)(run, *resume)
    check_same(run, whole)


def stream(run) -> dict[int, list]:
    """Architectures and images of each update; what was made again is the same."""
    found: dict[int, list] = {}
    for line in (run / "stream.jsonl").read_text().splitlines():
        step, *of = json.loads(line)
        assert found.setdefault(step, of) == of
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory, whole):
    """Ten updates of two processes with a device each, uninterrupted."""
    folder = tmp_path_factory.mktemp("two") / "run"
    train_as_two(folder, "--steps", 10, "--cache-dir", whole.parent / "cache")
    return folder


@pytest.mark.mesh
def test_a_signal_to_any_process_stops_all_of_them_after_one_update(whole, two, tmp_path):
    """Signals come to the second process alone, to both in different updates, and to none."""
    run = tmp_path / "run"
    for stops, code in ((("", ":2"), 75), ((":7", ":6"), 75), (("", ""), 0)):
        address = f"localhost:{free_port()}"
        options = (
            *(*OPTIONS, "--save-every", 100, "--out", run, "--steps", 10, "--resume", "auto"),
            *("--cache-dir", whole.parent / "cache"),
            *("--coordinator", address, "--num-processes", 2),
        )
        processes = [
            start("train", f"1{stop}", *options, "--process-id", i) for i, stop in enumerate(stops)
        ]
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [code, code], said[0][-3000:]
        done = Checkpoints(run).latest()
        lines = (run / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(1, done + 1))
        if code:
            assert f"update {done} is saved" in said[0]
            assert done < 10
    jax.tree.map(np.testing.assert_array_equal, load_ghn(run)[1], load_ghn(two)[1])
    assert stream(run) == stream(two)


@pytest.mark.mesh
def test_other_processes_see_the_same_architectures_and_images(whole, two, half, tmp_path):
    assert stream(whole) == stream(two)
    assert set(stream(whole)) == set(range(1, 11))
    # Half by two processes, half by one; and the reverse.
    run = tmp_path / "run"
    shutil.copytree(half, run)
    resume = ("--resume", "--cache-dir", whole.parent / "cache")
    train_alone(run, "--steps", 10, *resume)
    assert stream(run) == stream(whole)
    shutil.copytree(whole, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "10")
    train_as_two(tmp_path / "other", "--steps", 10, *resume)
    assert stream(tmp_path / "other") == stream(whole)


@pytest.mark.mesh
def test_one_command_starts_the_rows_of_a_machine(tmp_path):
    """The training program itself, on two processes of a CPU."""
    options = (
        *("--preset", "demo", "--mesh", "arch=2,data=1", "--steps", "2", "--batch-size", "8"),
        *("--n-cells", "3", "3", "--widths", "8", "--cache-dir", tmp_path / "cache"),
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(launch._STARTED, None)

    def train(*more):
        command = [sys.executable, ROOT / "train" / "train_ghn.py", *options, *more]
        return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)

    run = train("--meta-batch", 3, "--out", tmp_path / "run")
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["architectures"] for line in lines] == [3, 6]
    assert load_ghn(tmp_path / "run")
    # What one cannot do, none does.
    run = train("--meta-batch", 1, "--out", tmp_path / "other")
    assert run.returncode == 1
    assert "--meta-batch is 1; allowed: 2 or more" in run.stderr


def test_mesh_text_is_read():
    assert parse_mesh(" arch = 4,data=2") == {"arch": 4, "data": 2}
