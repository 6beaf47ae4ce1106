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
import train_ghn
from jax.sharding import PartitionSpec as P

from ghn_jax import kernels
from ghn_jax.checkpoint import load_ghn
from ghn_jax.mesh import join_processes, make_mesh, parse_mesh
from ghn_jax.metabatch import MAX_NODES, Stream, divide, make_meta_batch
from ghn_jax.metastep import MetaStep, _dropout
from ghn_jax.presets import preset
from ghn_jax.sampling import sample_architecture

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


def sizes(text, processes=1, each=8):
    return dict(make_mesh(text, devices(processes, each)).shape)


def test_all_devices_are_rows_unless_asked_otherwise():
    assert sizes(None) == {"arch": 8, "data": 1}
    assert sizes("arch=4,data=2") == {"arch": 4, "data": 2}
    assert sizes("data=4, arch=2") == {"arch": 2, "data": 4}
    assert sizes("data=4") == {"arch": 2, "data": 4}
    assert sizes("arch=2", processes=2) == {"arch": 2, "data": 8}


def test_a_row_lies_within_a_process():
    mesh = make_mesh("data=2", devices(2, 4))
    assert [[d.id for d in row] for row in mesh.devices] == [[0, 1], [2, 3], [100, 101], [102, 103]]
    with pytest.raises(ValueError, match=r"row 0 .* processes 0, 1; .* 'data' is 4, allowed: .* 2"):
        make_mesh("data=4", devices(4, 2))


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
        make_mesh(text, devices(1, 8))


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
        (["--mesh", "data=2", "--batch-size", "7"], "--batch-size is 7; allowed: multiples of 2"),
        (["--meta-batch", "1"], "--meta-batch is 1; allowed: 2 or more"),
        (["--mesh", "arch=4"], "is for 4 devices, but there are 2"),
        (["--process-id", "1"], "give --coordinator"),
    ],
)
def test_a_run_that_cannot_be_divided_ends_at_once(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_ghn.main(["--preset", "demo", "--out", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


# --- Division of a meta-batch ---------------------------------------------------------------------


def test_architectures_are_divided_by_cost():
    assert divide([9.0, 1, 1, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert divide([3.0, 3, 2, 2], 2) == [[0, 2], [1, 3]]
    # One at least, twice the share at most.
    assert divide([8.0, 0, 0, 0], 4) == [[0], [1], [2], [3]]
    assert sorted(map(len, divide([100.0] + [1.0] * 11, 4))) == [1, 3, 4, 4]
    assert max(map(len, divide([100.0, 99.0, 98.0] + [0.1] * 13, 4))) == 8


ARCHITECTURES = [
    sample_architecture("train", 3, i, rules=preset("demo").rules(32)) for i in range(16)
]


def test_processes_prepare_their_parts_of_one_division():
    ghn = preset("demo").ghn(10, 16)

    def prepare(local):
        return make_meta_batch(ghn, ARCHITECTURES, image_size=16, n_groups=4, local=local)

    whole, parts = prepare(None), [prepare(range(0, 2)), prepare(range(2, 4))]
    assert sorted(i for g in whole.groups for i in g.members) == list(range(16))
    assert [len(part.groups) for part in parts] == [2, 2]
    for part in parts:
        assert (part.nodes, part.architectures) == (whole.nodes, whole.architectures)
    for group, same in zip(whole.groups, parts[0].groups + parts[1].groups, strict=True):
        assert group.members == same.members
        jax.tree.map(np.testing.assert_array_equal, group[1:3], same[1:3])
        tables = [[program.table for program in g.programs] for g in (group, same)]
        jax.tree.map(np.testing.assert_array_equal, *tables)


def test_groups_of_different_sizes_have_arrays_of_one():
    ghn = preset("demo").ghn(10, 16)
    batch = make_meta_batch(ghn, ARCHITECTURES, image_size=16, n_groups=3, graph_nodes=128)
    assert len({len(group.members) for group in batch.groups}) > 1
    for part in ("nodes", "edges", "n_node", "n_edge"):
        shapes = [jax.tree.map(np.shape, getattr(g.graph, part)) for g in batch.groups]
        assert all(s == shapes[0] for s in shapes)
    rows = [jax.tree.map(np.shape, group.rows) for group in batch.groups]
    assert all(r == rows[0] for r in rows)


def test_the_limit_of_nodes_grows_with_the_meta_batch():
    ghn = preset("demo").ghn(10, 16)
    nodes = make_meta_batch(ghn, ARCHITECTURES, image_size=16).nodes
    stream = Stream(ghn, lambda i: ARCHITECTURES[i % 16], 16, 16, max_nodes=-(-nodes // 2))
    assert next(stream.batches(0)).position == 16
    assert MAX_NODES == 2200


def test_fewer_architectures_than_groups():
    with pytest.raises(ValueError, match="2 architectures cannot be divided between 3 groups"):
        make_meta_batch(preset("demo").ghn(10, 16), ARCHITECTURES[:2], image_size=16, n_groups=3)


# --- What devices of a row exchange ---------------------------------------------------------------


def on_two_devices(function, inputs, outputs):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs,
                                 check_vma=False))  # fmt: skip


@pytest.mark.parametrize("on", [True, False])
def test_batch_norm_sees_all_images_of_the_row(on):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(6, 4, 4, 5)) * 3 + np.arange(6)[:, None, None, None]
    z, g = z.astype(np.float32), rng.normal(size=(6, 4, 4, 5)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 5)).astype(np.float32)

    def gradient(z, scale, bias, g, axis=None):
        y, vjp = jax.vjp(
            lambda *a: kernels.batch_norm(*a, jnp.array(on), axis), z, scale, bias
        )  # fmt: skip
        return y, *vjp(g)

    def part(*arrays):
        y, dz, dscale, dbias = gradient(*arrays, "data")
        return y, dz, dscale[None], dbias[None]

    each = P("data")
    actual = on_two_devices(part, (each, P(), P(), each), each)(z, scale, bias, g)
    expected = jax.jit(gradient)(z, scale, bias, g)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(actual[2:], expected[2:], strict=True):
        np.testing.assert_allclose(a.sum(0), b, rtol=1e-4, atol=1e-5)
    if not on:
        np.testing.assert_array_equal(actual[0], z)


def test_dropout_of_an_image_does_not_depend_on_its_device():
    key = jax.random.key(0)
    whole = _dropout(key, 6, None)
    parts = on_two_devices(lambda key: _dropout(key, 3, "data"), P(), P("data"))(key)
    np.testing.assert_array_equal(whole, parts)
    assert set(np.unique(whole)) == {0, 2}


def test_one_all_reduce_for_each_update():
    ghn = preset("demo").ghn(10, 16)
    mesh = make_mesh()
    step = MetaStep(ghn, optax.sgd(1.0), mesh=mesh)
    state = jax.eval_shape(lambda: step.init(0))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.replicated), state
    )
    size = sum(x.size for x in jax.tree.leaves(state.params))
    vector = jax.ShapeDtypeStruct(
        (mesh.size * (2 + size),), jnp.float32,
        sharding=jax.sharding.NamedSharding(mesh, P(("arch", "data"))),
    )  # fmt: skip
    text = step._apply.lower(state, [vector]).compile().as_text()
    exchanges = [line for line in text.splitlines()
                 if any(f" {name}(" in line or f" {name}-start(" in line
                        for name in ("all-reduce", "all-gather", "all-to-all", "reduce-scatter",
                                     "collective-permute"))]  # fmt: skip
    assert len(exchanges) == 1
    assert "all-reduce" in exchanges[0]
    assert f"f32[{2 + size}]" in exchanges[0] or f"f32[1,{2 + size}]" in exchanges[0]


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


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    path = tmp_path_factory.mktemp("updates") / "one.npz"
    finish(start("update", "one", path))
    return np.load(path)


@pytest.mark.mesh
@pytest.mark.parametrize("mesh", ["arch=8", "arch=4,data=2", "arch=2,data=4"])
def test_eight_devices_make_the_update_of_one(mesh, one_device, tmp_path):
    """Its gradient, that is: Adam divides by it, and where it is 0 but for rounding, that shows."""
    finish(start("update", mesh, tmp_path / "eight.npz"))
    eight = np.load(tmp_path / "eight.npz")
    np.testing.assert_allclose(eight["loss"], one_device["loss"], rtol=1e-5)
    assert eight["top1"] == one_device["top1"]
    arrays = [name for name in one_device if name.startswith("arr_")]
    for name in arrays:
        worst = np.abs(one_device[name]).max()
        np.testing.assert_allclose(eight[name], one_device[name], rtol=1e-4, atol=1e-4 * worst)
    assert any(one_device[name].any() for name in arrays)
    # Tiles, an architecture, the gradient: rows load what one of them has compiled.
    rows = int(mesh[5])
    assert eight["programs"] >= 3 * rows
    assert eight["compiled"] <= one_device["compiled"] + 2


OPTIONS = ("--preset", "demo", "--batch-size", "8", "--save-every", "5")


def train_alone(out, *options):
    finish(start("train", 2, *OPTIONS, "--out", out, *options))


def train_as_two(out, *options):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = (*OPTIONS, "--out", out, "--coordinator", f"localhost:{port}", "--num-processes", 2)
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
    """Runs of the same updates.

    Two processes add up in programs of their own, so the last bit may differ. An update moves a
    parameter by the learning rate, 1e-3, whatever its gradient; tolerated is a hundredth of one.
    """
    found, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, other)
    )
    for a, b in zip(found, expected, strict=True):
        for key in ("step", "top1", "nodes", "architectures"):
            assert a[key] == b[key], key
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        load_ghn(run)[1],
        load_ghn(other)[1],
    )


@pytest.mark.mesh
@pytest.mark.parametrize(("before", "after"), [("half", "two"), ("half", "one"), ("whole", "two")])
def test_a_run_goes_on_with_other_processes(before, after, whole, half, tmp_path):
    run = tmp_path / "run"
    shutil.copytree({"half": half, "whole": whole}[before], run)
    shutil.rmtree(run / "checkpoints" / "10", ignore_errors=True)
    resume = ("--steps", 10, "--resume", "--cache-dir", whole.parent / "cache")
    (train_alone if after == "one" else train_as_two)(run, *resume)
    check_same(run, whole)


def test_mesh_text_is_read():
    assert parse_mesh(" arch = 4,data=2") == {"arch": 4, "data": 2}
