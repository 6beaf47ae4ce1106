"""Damaged files of every format: the right numbers or a clear error, whatever the damage.

Here some 200 damages with fixed seeds; `make test-damage` makes thousands.
"""

import bz2
import dataclasses
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.reader import DeepNets1M, read_architectures
from ghn_jax.deepnets1m.sampling import rules_of
from ghn_jax.deepnets1m.writer import entry_and_graph, write_deepnets1m
from ghn_jax.engine.program_digests import ProgramDigests
from ghn_jax.evaluation.experiments.records import Records, read_records
from ghn_jax.evaluation.experiments.saved_state import SavedState
from ghn_jax.files.tensors import read_tensors, write_tensors
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.joblib_file import read_joblib
from ghn_jax.interop.torch_file import read_torch, write_torch

TIMES = int(os.environ.get("GHN_JAX_DAMAGES", "1"))  # as many damages as usual
GHN_ = GHN(max_shape=(8, 8, 11, 11))
ARCHITECTURES = evaluation_set("test")[:3]
RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.standard_normal((40, 30)).astype(np.float32),
    "a.bias": np.zeros(30, np.float32),
    "count": np.array(7),
}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes as a disk, a copy that was cut off, or an editor leaves them."""
    place = int(rng.integers(len(data)))
    size = int(rng.integers(1, 1 + min(64, len(data) // 2)))
    other = int(rng.integers(len(data)))
    kind = rng.choice(["flipped", "flipped", "cut off", "zeros", "empty", "swapped", "more"])
    match kind:
        case "flipped":
            bit = 1 << int(rng.integers(8))
            return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        case "cut off":
            return data[:place]
        case "zeros":  # a block that was never written
            return data[:place] + bytes(len(data[place : place + 512])) + data[place + 512 :]
        case "empty":
            return b""
        case "more":  # of another file
            return data + data[:size]
        case _:  # two pieces in each other's place
            place, other = sorted((place, other))
            size = min(size, other - place, len(data) - other)
            a, b = data[place : place + size], data[other : other + size]
            return data[:place] + b + data[place + size : other] + a + data[other + size :]


@dataclasses.dataclass(frozen=True)
class Format:
    """Files of a kind.

    Attributes:
      write: makes a folder of them.
      read: what they hold.
      count: damages of them.
      own: with a checksum, so that damage never gives other numbers.
      fallbacks: other right results, in whose place a warning is given.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    count: int
    own: bool = True
    fallbacks: Callable[[Path], list] = lambda folder: []


def write_checkpoints(folder):
    with Checkpoints(folder) as checkpoints:
        checkpoints.write_config(GHN_)
        for step in (1, 2):
            checkpoints.save(step, 10 * step, params={k: x * step for k, x in ARRAYS.items()})


LIKE = jax.eval_shape(lambda: ARRAYS)


def read_checkpoint(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.ghn() == GHN_
    step, position, trees = checkpoints.load(params=LIKE)
    return step, position, trees["params"]


def write_hdf5(folder):
    networks = [entry_and_graph(arch, rules_of("test")) for arch in ARCHITECTURES]
    write_deepnets1m(folder / "nets.hdf5", {"test": networks[:2], "val": networks[2:]})


def read_hdf5(folder):
    """Everything that the two files say."""
    found = []
    for split in ("test", "val"):
        nets = DeepNets1M.open(folder / "nets.hdf5", split)
        for i in range(len(nets)):
            graph = nets.graph(i)
            found.append((nets[i].to_dict(), graph.primitives, graph.names, graph.extended,
                          graph.cells, graph.distances, nets.num_nodes(i)))  # fmt: skip
        nets.close()
    return found


GHNS = {"x": (GHN_, {"params": ARRAYS})}


def write_records(folder):
    records = Records.open(folder, {"seed": 1, "dataset": "digits"}, ghns=GHNS)
    for i in range(5):
        records.add({"name": f"net {i}", "top1": i / 7, "loss": [1.5, 0.25]})


def read_records_(folder):
    return dict(Records.open(folder, {"seed": 1, "dataset": "digits"}, ghns=GHNS))


STATE = {"params": jax.tree.map(jnp.asarray, ARRAYS), "step": 7}


def read_state(folder):
    found = SavedState(folder / "net").load(STATE)
    assert found is not None
    return found


def read_valid(folder):
    """Architectures have no checksum, as people write them: each that is read is one."""
    for arch in read_architectures(folder / "nets.json").values():
        assert Architecture.from_dict(arch.to_dict()) == arch


FORMATS = {
    "checkpoints": Format(
        write_checkpoints, read_checkpoint, 30,
        fallbacks=lambda folder: [(1, 10, ARRAYS)],
    ),
    "DeepNets-1M": Format(write_hdf5, read_hdf5, 50),
    "records": Format(
        write_records, read_records_, 40,
        # A last line that was cut off is computed again.
        fallbacks=lambda folder: [
            {k: v for k, v in read_records(folder).items() if k in some}
            for some in ([f"net {i}" for i in range(n)] for n in range(5))
        ],
    ),
    "saved states": Format(
        lambda folder: SavedState(folder / "net").save(STATE, {"loss": [0.5]}), read_state, 30
    ),
    ".pt": Format(
        lambda folder: write_torch({"state_dict": ARRAYS, "epoch": 3}, folder / "a.pt"),
        lambda folder: read_torch(folder / "a.pt"), 40,
    ),
    ".safetensors": Format(
        lambda folder: write_tensors(folder / "a.safetensors", ARRAYS, {"config": "{}"}),
        lambda folder: read_tensors(folder / "a.safetensors"), 40,
    ),
    "architectures": Format(
        lambda folder: (folder / "nets.json").write_text(
            json.dumps({f"net {i}": arch.to_dict() for i, arch in enumerate(ARCHITECTURES)})
        ),
        read_valid, 20, own=False,
    ),
}  # fmt: skip


def same(a, b) -> bool:
    """Whether two results are equal, to the last bit."""
    a, b = jax.tree.flatten(a), jax.tree.flatten(b)
    return a[1] == b[1] and all(
        np.shape(x) == np.shape(y) and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(a[0], b[0], strict=True)
    )


def check_message(error: BaseException, folder: Path) -> None:
    """Says which file, in a sentence."""
    text = str(error)
    assert str(folder) in text, text
    assert "\n" not in text, text
    assert len(text) < 700, text


# Orbax leaves coroutines behind where it meets damage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_damage_gives_the_right_numbers_or_an_error(name, tmp_path):
    form, rng = FORMATS[name], np.random.default_rng(zlib.crc32(name.encode()))
    whole = tmp_path / "whole"
    whole.mkdir()
    form.write(whole)
    expected = form.read(whole)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    files = [path for path in files if (whole / path).stat().st_size]
    outcomes = {"right": 0, "said": 0, "error": 0}
    folder = tmp_path / "damaged"
    for i in range(form.count * TIMES):
        shutil.copytree(whole, folder)
        path = folder / files[i % len(files)]
        path.write_bytes(damaged(path.read_bytes(), rng))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found = form.read(folder)
            except (ValueError, FileNotFoundError) as error:
                check_message(error, folder)
                outcomes["error"] += 1
            else:
                if form.own and not same(found, expected):
                    where = f"damage {i} of {path.relative_to(folder)}"
                    assert any(same(found, other) for other in form.fallbacks(folder)), where
                    outcomes["said"] += any("damaged" in str(w.message) for w in said)
                else:
                    outcomes["right"] += 1
        shutil.rmtree(folder)
    print(name, outcomes)
    assert outcomes["error"] > 0
    if name == "checkpoints":
        assert outcomes["said"] > 0


def test_files_in_each_others_place_are_found_out(tmp_path):
    """Graphs of another file, records' settings, the state of another network."""
    one, two = tmp_path / "1", tmp_path / "2"
    for folder, architectures in ((one, ARCHITECTURES[:2]), (two, ARCHITECTURES[1:])):
        folder.mkdir()
        networks = [entry_and_graph(arch, rules_of("test")) for arch in architectures]
        write_deepnets1m(folder / "nets.hdf5", {"test": networks})
    shutil.copy(two / "nets.hdf5", one / "nets.hdf5")
    with pytest.raises(ValueError, match=r"graph 0 (is not as it was|has adjacency)"):
        DeepNets1M.open(one / "nets.hdf5").graph(0)
    shutil.copy(two / "nets_meta.json", one / "nets_meta.json")
    with pytest.raises(ValueError, match=r"nets_meta.json is not the meta file .* digest differs"):
        DeepNets1M.open(one / "nets.hdf5")
    # Two graphs of a file, which fit each other's entries but for what they are.
    with h5py.File(two / "nets.hdf5", "a") as file:
        numbers = file["test/0/adj"][()]
        file["test/0/adj"][...] = numbers[::-1]
    with pytest.raises(ValueError, match="graph 0 is not as it was written: its digest differs"):
        DeepNets1M.open(two / "nets.hdf5").graph(0)
    assert len(DeepNets1M.open(two / "nets.hdf5").graph(1)) > 0


def test_files_of_before_and_of_others_have_no_digest_and_are_read(tmp_path):
    (tmp_path / "settings.json").write_text('{"seed": 1}')
    (tmp_path / "records.jsonl").write_text('{"name": "x", "top1": 0.5}\n')
    records = Records.open(tmp_path, {"seed": 1})
    records.add({"name": "y", "top1": 0.25})
    assert read_records(tmp_path) == {
        name: {"name": name, "top1": top1} for name, top1 in (("x", 0.5), ("y", 0.25))
    }
    safetensors.numpy.save_file(ARRAYS, tmp_path / "a.safetensors", {"config": "{}"})
    assert same(read_tensors(tmp_path / "a.safetensors"), (ARRAYS, {"config": "{}"}))


def changed(folder, file, old, new):
    path = folder / file
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_a_changed_digit_is_found_out(tmp_path):
    for name, file, old, new in (
        ("records", "records.jsonl", b"1.5", b"1.6"),
        ("records", "settings.json", b'"seed": 1', b'"seed": 2'),
        ("DeepNets-1M", "nets_meta.json", b'"n_cells": ', b'"n_cells": 1'),
        (".safetensors", "a.safetensors", b'"config":"{}"', b'"config":"[]"'),
        (".safetensors", "a.safetensors", ARRAYS["a.weight"].tobytes()[:4], b"\0\0\0\0"),
        ("saved states", "net.npz", ARRAYS["a.weight"].tobytes()[:4], b"\0\0\0\0"),
        (".pt", "a.pt", ARRAYS["a.weight"].tobytes()[:4], b"\0\0\0\0"),
    ):
        folder = tmp_path / f"{file} {new!r}".replace("/", "")
        folder.mkdir()
        FORMATS[name].write(folder)
        changed(folder, file, old, new)
        with pytest.raises(ValueError) as error:
            FORMATS[name].read(folder)
        check_message(error.value, folder)


# --- Sizes are believed only up to what the file can hold -----------------------------------------


def as_torch(path: Path, data: bytes, compression=zipfile.ZIP_STORED, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        for name, content in files.items():
            archive.writestr(f"a/data/{name}", content)
    return path


BIG = struct.pack("<I", 2**31)
BOMBS = {
    "what it remembers is numbered": b"\x80\x02Nr" + BIG + b".",
    "a number of digits": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**45) + b"1.",
    "a string": b"\x80\x02X" + BIG + b"1.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**45) + b"N.",
    "brackets": b"\x80\x02" + b"(" * 100_000 + b"t" * 99_999 + b".",
    "a device": b"\x80\x02ctorch\ndevice\n(](NetR.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_that_ask_for_much(name, tmp_path, memory):
    for path, read in (
        (as_torch(tmp_path / "a.pt", BOMBS[name]), read_torch),
        (tmp_path / "a.joblib", read_joblib),
    ):
        if read is read_joblib:
            path.write_bytes(BOMBS[name])
        try:
            with memory:
                read(path)
        except ValueError as error:
            check_message(error, tmp_path)
            # Not by the limit of this test: before it is asked for.
            assert name != "what it remembers is numbered" or "remembers a value" in str(error)
        else:
            assert name == "brackets"  # it is read, as data that is no hypernetwork


def test_what_unpacks_to_much(tmp_path, memory):
    zeros = bytes(2**28)
    path = as_torch(tmp_path / "a.pt", b"\x80\x02X" + struct.pack("<I", 2**28) + zeros + b".",
                    zipfile.ZIP_DEFLATED)  # fmt: skip
    del zeros
    assert path.stat().st_size < 2**20
    with memory, pytest.raises(ValueError, match=r"data.pkl is compressed, as PyTorch never"):
        read_torch(path)
    path = tmp_path / "a.joblib"
    path.write_bytes(bz2.compress(b"\x80\x04" + bytes(2**26)))
    assert path.stat().st_size < 1000
    with memory, pytest.raises(ValueError, match="holds more than 100 times its"):
        read_joblib(path)


def test_tensors_of_the_same_elements_take_no_memory(tmp_path, memory):
    write_torch({"x": np.zeros(2**20, np.float32)}, tmp_path / "one.pt")
    with zipfile.ZipFile(tmp_path / "one.pt") as archive:
        data = archive.read("one/data.pkl")
    start = data.index(b"ctorch._utils\n_rebuild_tensor_v2")
    tensor = data[start:-2]  # without the end of the dictionary
    path = as_torch(tmp_path / "a.pt", b"\x80\x02](" + tensor * 2000 + b"e.", **{"0": bytes(2**22)})
    with memory:
        assert len(read_torch(path)) == 2000


def test_a_hdf5_file_that_says_it_is_large(tmp_path, memory):
    write_hdf5(tmp_path)
    meta = json.loads((tmp_path / "nets_meta.json").read_text())
    meta["test"]["nets"][0]["num_nodes"] = 100_000
    (tmp_path / "nets_meta.json").write_text(json.dumps(meta))
    (tmp_path / "nets_digests.json").unlink()
    with h5py.File(tmp_path / "nets.hdf5", "a") as file:
        del file["test/0/adj"], file["test/0/nodes"]
        file.create_dataset("test/0/adj", (100_000, 100_000), np.uint8, compression="gzip")
        file.create_dataset("test/0/nodes", (100_000, 3), np.uint16, chunks=(1000, 3))
    with memory, pytest.raises(ValueError, match="graph 0 cannot be read .*in 0 bytes"):
        DeepNets1M.open(tmp_path / "nets.hdf5", "test").graph(0)


class Memory:
    """Nothing that is done here takes more than 256 MiB."""

    def __enter__(self):
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *error):
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before
        assert taken < 2**18, f"{taken / 1024:.0f} MiB"


@pytest.fixture
def memory():
    return Memory()


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe", b"1" * 5000])
def test_json_that_no_reader_likes(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    for read in (
        lambda: Checkpoints(tmp_path).config(),
        lambda: read_architectures(tmp_path / "config.json"),
        lambda: Records.open(tmp_path, {"seed": 1}),
    ):
        (tmp_path / "settings.json").write_bytes(content)
        with pytest.raises(ValueError) as error:
            read()
        check_message(error.value, tmp_path)


# --- Compiled programs ----------------------------------------------------------------------------

PROGRAM = """
import sys, warnings, jax
from ghn_jax.engine.compilation import keep_programs
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    keep_programs(sys.argv[1])
    print(float(jax.jit(lambda x: x * 3 + 1)(2.0)), float(jax.jit(lambda x: x * 5 - 1)(2.0)))
print(*(str(w.message) for w in said), sep="\\n")
"""


def run_program(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_compiled_programs_are_those_that_were_written(tmp_path):
    folder = tmp_path / "cache"
    assert run_program(folder)[0] == "7.0 9.0"
    programs = sorted(folder.glob("*-cache"))
    lambdas = [p for p in programs if "lambda" in p.name]
    assert len(lambdas) == 2
    listed = (folder / "SHA256SUMS").read_text()
    assert all(path.name in listed for path in programs)
    # One in the other's place: each is a program, and not what it is taken for.
    one, two = (path.read_bytes() for path in lambdas)
    lambdas[0].write_bytes(two)
    lambdas[1].write_bytes(one)
    theirs = folder / "theirs-cache"
    theirs.write_text("a file of the user's")
    numbers, *said = run_program(folder)
    assert numbers == "7.0 9.0"
    assert "2 compiled programs in" in said[0]
    assert "compiled again" in said[0]
    assert theirs.read_text() == "a file of the user's"
    assert lambdas[0].read_bytes() != two  # written again
    assert run_program(folder) == ["7.0 9.0", ""]


def test_damaged_programs_are_found_out(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"jit_f-{i:064}-cache" for i in range(3)]
    content = {name: zlib.compress(rng.bytes(2000)) for name in names}
    for i in range(20 * TIMES):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
        ProgramDigests(folder).list_new()
        name = names[i % 3]
        path = folder / ("SHA256SUMS" if i % 4 == 3 else name)
        before = path.read_bytes()
        path.write_bytes(damaged(before, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ProgramDigests(folder).remove_damaged()
        left = {p.name: p.read_bytes() for p in folder.glob("*-cache")}
        assert all(content[name] == data for name, data in left.items())
        if path.name != "SHA256SUMS" and path.exists():
            assert path.read_bytes() == before


def test_programs_that_were_cut_off_are_compiled_again(tmp_path, capsys):
    """By a full disk, or a process that was killed as it wrote; others' files stay."""
    program = zlib.compress(bytes(1000))
    names = [f"jit_f-{i:064}-cache" for i in range(6)]
    for name in names:
        (tmp_path / name).write_bytes(program if name == names[0] else program[:-3])
    digests = ProgramDigests(tmp_path)
    for _ in range(2):
        digests.list_new()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "are not kept in" in said
    listed = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in listed] == names[:1]
    theirs = tmp_path / "notes-cache"
    theirs.write_text("")
    with pytest.warns(UserWarning, match="5 compiled programs in .* were damaged"):
        ProgramDigests(tmp_path).remove_damaged()
    assert {p.name for p in tmp_path.iterdir()} == {names[0], theirs.name, "SHA256SUMS"}
