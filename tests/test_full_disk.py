"""Writing where it cannot be: what was there stays, and it is said in a sentence."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from ghn_jax.cli import convert, deepnets1m, evaluate, paper, predict, train
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.sampling import rules_of
from ghn_jax.deepnets1m.writer import entry_and_graph, write_deepnets1m
from ghn_jax.evaluation.experiments import trained_networks
from ghn_jax.evaluation.experiments.records import Records, read_records
from ghn_jax.evaluation.experiments.saved_state import SavedState
from ghn_jax.files import replace
from ghn_jax.files.replace import write_beside
from ghn_jax.files.tensors import write_tensors
from ghn_jax.hypernet.checkpoint import Checkpoints, save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.torch_file import write_torch
from ghn_jax.plot.figure import canvas, save

GHN_ = GHN(max_shape=(8, 8, 11, 11), virtual_includes_real=True)
ARRAYS = {"a": np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)}


@contextlib.contextmanager
def full_disk(size: int = 1000):
    """No file grows beyond some bytes; Linux says so where a disk that is full does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_networks(path: Path):
    networks = (entry_and_graph(arch, rules_of("test")) for arch in evaluation_set("test")[:2])
    write_deepnets1m(path, {"test": networks})


def write_figure(path: Path):
    figure = canvas(3, 2)
    figure.subplots().plot(np.sin(np.arange(1000)))
    save(figure, path)


# What the package writes -> how; all but DeepNets-1M's take the place of a file that is there.
WRITERS = {
    "a.pt": lambda path: write_torch(ARRAYS, path),
    "a.safetensors": lambda path: write_tensors(path, ARRAYS),
    "nets.hdf5": write_networks,
    "state.npz": lambda path: SavedState(path.with_suffix("")).save(ARRAYS, {}),
    "config.json": lambda path: Checkpoints(path.parent).write_config(GHN_, more="x" * 1000),
    "a.png": write_figure,
    "a.pdf": write_figure,
    "table.md": lambda path: write_beside(path, "x" * 2000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_there_stays(name, tmp_path):
    path = tmp_path / name
    new = name == "nets.hdf5"
    if not new:
        path.write_text("before")
    before = files(tmp_path)
    with full_disk(), pytest.raises(OSError) as error:
        WRITERS[name](path)
    assert files(tmp_path) == before
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert ("nothing is left of it" if new else "what was there is as it was") in text
    WRITERS[name](path)
    assert files(tmp_path) != before
    assert not list(tmp_path.glob(".*"))


def test_the_checkpoint_before_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, 1, params=ARRAYS)
    with full_disk(), pytest.raises(OSError, match="checkpoint 2 could not be written") as error:
        checkpoints.save(2, 2, params=ARRAYS)
    assert "\n" not in str(error.value)
    step, _, trees = Checkpoints(tmp_path).load(params=ARRAYS)
    assert step == 1
    np.testing.assert_array_equal(trees["params"]["a"], ARRAYS["a"])
    Checkpoints(tmp_path).save(2, 2, params=ARRAYS)
    assert Checkpoints(tmp_path).load(params=ARRAYS)[0] == 2


def test_records_before_stay(tmp_path):
    records = Records.open(tmp_path, {})
    records.add({"name": "x"})
    before = files(tmp_path)
    with full_disk(200), pytest.raises(OSError, match=r"records.jsonl could not be written"):
        records.add({"name": "y", "loss": [0.5] * 100})
    assert files(tmp_path) == before
    records.add({"name": "z"})
    assert list(read_records(tmp_path)) == ["x", "z"]


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")
    code = (
        "import os, runpy, sys\n"
        "with runpy.run_path(sys.argv[1])['written_beside'](sys.argv[2]) as beside:\n"
        "    beside.write_text('half'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, replace.__file__, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "before"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows")
def test_a_folder_that_cannot_be_written_to():
    with tempfile.TemporaryDirectory() as folder:  # those of pytest are its user's alone
        path = Path(folder) / "a.json"
        path.write_text("before")
        path.parent.chmod(0o555)
        root = os.geteuid() == 0  # who may write anywhere
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(OSError, match="Permission denied.*what was there is as it was"):
                write_beside(path, "after")
        finally:
            if root:
                os.seteuid(0)
            path.parent.chmod(0o755)
        assert path.read_text() == "before"


def test_a_link_stays_one_and_a_device_is_no_file(tmp_path):
    target, link = tmp_path / "results", tmp_path / "link.json"
    target.write_text("before")
    link.symlink_to(target)
    write_beside(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    with pytest.raises(OSError, match="no file, but a folder or a device; give another name"):
        write_beside("/dev/full", "after")
    assert Path("/dev/full").is_char_device()


# --- The commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ghn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ghn")
    save_ghn(folder / "ghn", GHN_, GHN_.init_variables(0))
    edges = [["conv_1x1", 0], ["skip_connect", 1]]
    genotype = {"normal": edges, "normal_concat": [2], "reduce": edges, "reduce_concat": [2]}
    arch = {"genotype": genotype, "n_cells": 1, "C": 8, "fc_layers": 1}
    (folder / "arch.json").write_text(json.dumps(arch))
    return folder


def evaluated(*args, report, **options):
    """Stands for an evaluation, which takes a while."""
    for i in range(40):
        report({"name": f"net {i}", "top1": 0.5, "parameters": 10})


def trained(config):
    Records.open(config.out, {"options": "x" * 2000})


COMMANDS = {
    "ghn-convert": (convert.run, ["ghn", "{ghn}/ghn", "{out}/a.pt"]),
    "ghn-predict": (
        predict.run, ["--ckpt", "{ghn}/ghn", "--net", "{ghn}/arch.json", "--out", "{out}/a.pt"]
    ),
    "ghn-deepnets1m": (
        deepnets1m.run, ["export", "--kind", "eval", "--num", "1", "--out", "{out}"]
    ),
    "ghn-eval": (
        evaluate.run,
        ["--ckpt", "{ghn}/ghn", "--dataset", "digits", "--out", "{out}/results.json",
         "--cache-dir", "{out}/cache"],
    ),
    "ghn-paper": (paper.run, ["trained-networks", "--quick", "--out", "{out}"]),
    "ghn-train": (train.run, ["--preset", "demo", "--out", "{out}", "--cache-dir", "{out}/cache"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache entry")
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_it_in_a_sentence(name, ghn, tmp_path, monkeypatch):
    run, arguments = COMMANDS[name]
    monkeypatch.setattr(sys, "argv", [name, *(a.format(ghn=ghn, out=tmp_path) for a in arguments)])
    monkeypatch.setattr(evaluate, "evaluate_ghn", evaluated)
    monkeypatch.setattr(trained_networks, "run", trained)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    # The first that training writes is whose folder it is; what follows is compiled.
    size = 10 if name == "ghn-train" else 1000
    with full_disk(size), pytest.raises(SystemExit) as stopped:
        run()
    text = stopped.value.code
    assert text.startswith(f"{name}: {tmp_path}")
    assert "could not be written (File too large)" in text
    assert "\n" not in text
