"""The reader of the official DeepNets-1M files, on a sample of 60 + 36 networks."""

import concurrent.futures
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.sampling import RULES, choose_width

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GHN_JAX_SHARED", ROOT.parent / "shared"))
SAMPLE = SHARED / "golden" / "deepnets1m"
TRAIN, EVAL = SAMPLE / "deepnets1m_train.hdf5", SAMPLE / "deepnets1m_eval.hdf5"
EVALUATION = ("val", "test", "wide", "deep", "dense", "bnfree")

needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason=f"no sample files at {SAMPLE}; set GHN_JAX_SHARED"
)

NET = {
    "genotype": {
        "normal": [["conv_3x3", 0], ["skip_connect", 1]],
        "normal_concat": [2],
        "reduce": [["max_pool_3x3", 0], ["skip_connect", 1]],
        "reduce_concat": [2],
    },
    "n_cells": 4,
    "num_nodes": 3,
    "num_params": {"cifar10": 1000, "imagenet": 900_000},
    "C": 64,
}


def write(folder: Path, nets=(NET, NET), splits=("test",), **tables) -> Path:
    """A pair of small files in the official format; three nodes in a chain for each network."""
    path = folder / "small.hdf5"
    path.unlink(missing_ok=True)  # it may be open
    tables = {
        "primitives_ext": {"0": "input", "1": "conv_1x1", "2": "fc-b"},
        "unique_op_names": {"0": "", "1": "_ops.0.1.weight", "2": "_ops.2.to_out.0."},
        **tables,
    }
    with h5py.File(path, "w") as file:
        for split in splits:
            for i in range(len(nets)):
                file[f"{split}/{i}/adj"] = np.array([[0, 1, 2], [0, 0, 1], [0, 0, 0]], np.uint8)
                file[f"{split}/{i}/nodes"] = np.array([[0, 0, 0], [1, 1, 1], [2, 3, 2]], np.uint16)
    meta = {split: {"nets": list(nets), "meta": tables} for split in splits}
    path.with_name("small_meta.json").write_text(json.dumps(meta))
    return path


def without(*fields):
    return {k: v for k, v in NET.items() if k not in fields}


# --- Genotypes as they are published --------------------------------------------------------------


class Published(NamedTuple):
    """As every `genotypes.py` has it."""

    normal: list
    normal_concat: range
    reduce: list
    reduce_concat: range


def test_published_genotypes_are_read():
    cell = [("sep_conv_3x3", 0), ("skip_connect", 1), ("conv_1x1", 0), ("max_pool_3x3", 2)]
    flat = Published(cell, range(2, 4), cell, range(2, 4))
    grouped = Published([cell[:2], cell[2:]], [2, 3], [tuple(cell[:2]), cell[2:]], [2, 3])
    expected = Genotype(cell, (2, 3), cell, (2, 3))
    assert expected.normal == tuple(cell)
    for given in (flat, grouped, flat._asdict(), grouped._asdict(), expected):
        assert Genotype.of(given) == expected
        assert Architecture(given, 3) == Architecture(expected, 3)
        assert Architecture.from_dict({"genotype": given, "n_cells": 3}).genotype == expected
    for wrong, message in (
        ("DARTS", "'genotype' is 'DARTS'; allowed: a mapping or a namedtuple with normal"),
        ({"normal": cell}, "'genotype.normal_concat' is missing"),
        (Published([cell, [("conv_1x1",)]], [2], cell, [2]), "genotype.normal"),
        (Published([[], []], [2], cell, [2]), r"genotype.normal' has groups of \[0, 0\] edges"),
        (Published([cell[:1], cell[1:]], [2], cell, [2]), r"groups of \[1, 3\] edges"),
    ):
        with pytest.raises(ValueError, match=message):
            Architecture.from_dict({"genotype": wrong, "n_cells": 3})


# --- The sample files -----------------------------------------------------------------------------


@needs_sample
@pytest.mark.parametrize("split", [None, *EVALUATION])
def test_entries_are_architectures(split):
    path = EVAL if split else TRAIN
    nets = DeepNets1M.open(path, split)
    assert len(nets) == (6 if split else 60)
    assert nets.split == (split or "train")
    meta = json.loads(path.with_name(path.stem + "_meta.json").read_text())[nets.split]["nets"]
    for i, arch in enumerate(nets):
        expected = Architecture.from_dict(meta[i])
        if split is None:
            assert arch == expected.replace(C=arch.C, fc_dim=arch.fc_dim)
            assert arch.C in RULES["train"].widths and arch.fc_dim in RULES["train"].fc_dims
        else:
            assert arch == expected.replace(C=expected.C * (4 if split == "wide" else 1))
        reference = arch.replace(C=32, fc_dim=256)
        assert count_parameters(reference) == meta[i]["num_params"]["cifar10"]


@needs_sample
@pytest.mark.parametrize("split", [None, *EVALUATION])
def test_stored_graphs_are_the_ones_we_build(split):
    nets = DeepNets1M.open(EVAL if split else TRAIN, split)
    for i in range(0, len(nets), 10 if split is None else 2):
        stored, built = nets.graph(i), build_graph(nets[i], 250)
        n = len(stored)
        assert n == nets.num_nodes(i) == len(built) == len(stored.names) == len(stored.cells)
        assert stored.distances.shape == (n, n) and stored.distances.dtype == np.uint8
        rows = zip(stored.names, stored.primitives, stored.cells.tolist(), strict=True)
        names = [PRIMITIVES[p] for p in built.primitives]
        assert Counter(rows) == Counter(zip(built.names, names, built.cells.tolist(), strict=True))
        # Between nodes with a name of their own, [source, target] is the same distance.
        distances = np.zeros((n, n), int)
        distances[built.edges[:, 0], built.edges[:, 1]] = built.edges[:, 2]
        named = [name for name in stored.names if "." in name]
        ours = [built.names.index(name) for name in named]
        theirs = [stored.names.index(name) for name in named]
        np.testing.assert_array_equal(
            stored.distances[np.ix_(theirs, theirs)], distances[np.ix_(ours, ours)]
        )


@needs_sample
def test_wide_is_wider_by_two_on_large_images():
    small = DeepNets1M.open(EVAL, "wide")
    large = DeepNets1M.open(EVAL, "wide", image_size=224)
    assert [a.C for a in small] == [2 * a.C for a in large]


@needs_sample
def test_train_widths_depend_on_seed_and_index_only():
    first, again = DeepNets1M.open(TRAIN), DeepNets1M.open(TRAIN)
    widths = [(a.C, a.fc_dim) for a in first]
    assert [(a.C, a.fc_dim) for a in map(again.architecture, reversed(range(60)))] == widths[::-1]
    other = [(a.C, a.fc_dim) for a in DeepNets1M.open(TRAIN, seed=1)]
    assert other != widths
    assert [(a.C, a.fc_dim) for a in (first.architecture(i, seed=1) for i in range(60))] == other
    code = (
        "from ghn_jax.deepnets1m import DeepNets1M; import sys\n"
        "print([(a.C, a.fc_dim) for a in DeepNets1M.open(sys.argv[1])])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(TRAIN)],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == str(widths)


@needs_sample
def test_several_readers():
    nets = DeepNets1M.open(TRAIN)
    alone = [nets.graph(i) for i in range(20)]
    nets.close()
    copy = pickle.loads(pickle.dumps(nets))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for reader in (nets, copy):
            for a, b in zip(alone, pool.map(reader.graph, range(20)), strict=True):
                assert a.names == b.names
                np.testing.assert_array_equal(a.distances, b.distances)


@needs_sample
@pytest.mark.parametrize("part", [0.5, 0.999, 0.00001])
def test_truncated_file(tmp_path, part):
    data = TRAIN.read_bytes()
    path = tmp_path / TRAIN.name
    path.write_bytes(data[: int(part * len(data))])
    path.with_name("deepnets1m_train_meta.json").write_bytes(
        TRAIN.with_name("deepnets1m_train_meta.json").read_bytes()
    )
    with pytest.raises(ValueError, match=r"deepnets1m_train.hdf5 is truncated or not HDF5"):
        DeepNets1M.open(path)


# --- Small files ----------------------------------------------------------------------------------


def test_graph_of_earlier_files(tmp_path):
    """Names are completed to the ones that parameters have (the authors' loader does the same)."""
    graph = DeepNets1M.open(write(tmp_path), "test").graph(1)
    assert graph.primitives == ["input", "conv", "bias"]
    assert graph.names == ["input", "cells.1._ops.0.op.1.weight", "cells.3._ops.2.to_out.0.weight"]
    assert graph.cells.tolist() == [0, 1, 3]
    assert graph.distances.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]


def test_graphs_are_read_when_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path)
    nets = DeepNets1M.open(path)
    path.unlink()
    assert nets[0].C == 64 and nets.num_nodes(0) == 3
    with pytest.raises(ValueError, match="small.hdf5"):
        nets.graph(0)
    write(tmp_path)
    assert len(nets.graph(0)) == 3
    opened = []
    monkeypatch.setattr("ghn_jax.deepnets1m.reader._open_hdf5", lambda p: opened.append(p))
    nets.graph(1)
    assert not opened  # once for each process
    monkeypatch.setattr("os.getpid", lambda: -5)
    with pytest.raises(ValueError, match="cannot be read"):
        nets.graph(1)
    assert opened == [path]


def test_given_widths_are_kept_and_missing_ones_chosen(tmp_path, monkeypatch):
    nets = [NET, without("C"), without("C", "num_params")]
    train = DeepNets1M.open(write(tmp_path, nets, ("train",)))
    assert train[0].C == 64
    drawn = {train.architecture(1, seed=s).C for s in range(60)}
    assert drawn == set(RULES["train"].widths)  # 1,000 parameters: any width
    large = DeepNets1M.open(train.path, image_size=224)
    assert {large.architecture(1, seed=s).C for s in range(60)} == {32}  # 0.9M: the smallest
    counted = {train.architecture(2, seed=s).C for s in range(60)}
    rng = np.random.default_rng(0)
    assert counted == {choose_width(train[2], rng).C for _ in range(60)}
    # Where the file has no sizes, they are counted for these images.
    with monkeypatch.context() as patch:
        patch.setattr(
            "ghn_jax.sampling.count_parameters", lambda *_, image_size, **__: 10**4 * image_size
        )
        for image_size, choices in ((32, 3), (224, 1)):
            train = DeepNets1M.open(train.path, image_size=image_size)
            drawn = {train.architecture(2, seed=s).C for s in range(60)}
            assert drawn == set(RULES["train"].widths[:choices])
    # An evaluation network without a width gets the one of its split.
    test = DeepNets1M.open(write(tmp_path, nets))
    assert (
        count_parameters(test[1]) >= 2_500_000 > count_parameters(test[1].replace(C=test[1].C - 16))
    )


def test_other_rules(tmp_path):
    rules = dataclasses.replace(RULES["train"], widths=(8, 16), fc_dims=(24,))
    nets = DeepNets1M.open(write(tmp_path, [without("C")], ("train",)), rules=rules)
    assert {nets.architecture(0, seed=s).C for s in range(20)} == {8, 16}
    assert nets[0].fc_dim == 24


# --- Errors ---------------------------------------------------------------------------------------


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.hdf5 does not exist: ") as error:
        DeepNets1M.open(tmp_path / "none.hdf5")
    one_sentence(error)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        DeepNets1M.open(tmp_path)
    path = write(tmp_path)
    path.with_name("small_meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"small_meta.json does not exist: .*beside"):
        DeepNets1M.open(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not HDF5", b"\x80\x04\x95pickle"])
def test_not_hdf5(tmp_path, content):
    path = write(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="small.hdf5 is truncated or not HDF5") as error:
        DeepNets1M.open(path)
    one_sentence(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not JSON"),
        (b'{"test": {"nets": [', "truncated or not JSON"),
        (b"\xff\xfe\x80", "truncated or not JSON"),
        (b"[1, 2]", "holds no splits"),
        (b'{"test": []}', "has no 'nets' and 'meta'"),
        (b'{"test": {"nets": [1, 2], "meta": {}}}', "has no 'nets' and 'meta'"),
        (b'{"test": {"nets": [{}, {}], "meta": {}}}', "'primitives_ext' is missing"),
        (b'{"test": {"nets": [{}, {}], "meta": {"primitives_ext": {"1": "sum"}}}}', "'primitives"),
        (b'{"other": {}}', "no split in common"),
    ],
)
def test_damaged_meta_file(tmp_path, content, message):
    path = write(tmp_path)
    path.with_name("small_meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        DeepNets1M.open(path)
    assert "small" in one_sentence(error)


def test_split_not_in_the_file(tmp_path):
    path = write(tmp_path, splits=("deep", "dense"))
    for split in ("train", "predefined"):
        with pytest.raises(ValueError, match=f"split '{split}' is not in .*present: deep, dense"):
            DeepNets1M.open(path, split)
    with pytest.raises(ValueError, match="several splits; name one of: deep, dense"):
        DeepNets1M.open(path)
    assert DeepNets1M.open(path, "dense").split == "dense"


@pytest.mark.parametrize("count", [1, 3])
def test_files_of_different_lengths(tmp_path, count):
    path = write(tmp_path)
    meta_path = path.with_name("small_meta.json")
    meta = json.loads(meta_path.read_text())
    meta["test"]["nets"] = [NET] * count
    meta_path.write_text(json.dumps(meta))
    match = f"2 graphs of split 'test' and small_meta.json {count} networks"
    with pytest.raises(ValueError, match=match) as error:
        DeepNets1M.open(path)
    one_sentence(error)


@pytest.mark.parametrize("index", [-1, 2, 10**6])
@pytest.mark.parametrize("method", ["__getitem__", "graph", "num_nodes", "architecture"])
def test_index_out_of_range(tmp_path, method, index):
    nets = DeepNets1M.open(write(tmp_path))
    with pytest.raises(IndexError, match=rf"index {index} is out of range; .* networks 0 to 1"):
        getattr(nets, method)(index)


def test_entry_that_is_not_an_architecture(tmp_path):
    nets = DeepNets1M.open(write(tmp_path, [NET, {**NET, "n_cells": 0}, without("num_nodes")]))
    assert nets[0].n_cells == 4
    with pytest.raises(ValueError, match="network 1: architecture field 'n_cells' is 0"):
        nets[1]
    with pytest.raises(ValueError, match="network 2: the meta file has no 'num_nodes'"):
        nets.num_nodes(2)


def test_graph_that_does_not_fit_its_entry(tmp_path):
    path = write(tmp_path, [{**NET, "num_nodes": 4}])
    with pytest.raises(ValueError, match="graph 0 has adjacency .* says 4 nodes"):
        DeepNets1M.open(path).graph(0)
    for table, names in (("primitives_ext", {"0": "sum"}), ("unique_op_names", {"0": "x"})):
        nets = DeepNets1M.open(write(tmp_path, **{table: names}))
        with pytest.raises(ValueError, match="graph 0 uses names that the meta file lacks"):
            nets.graph(0)
    with pytest.raises(ValueError, match="unknown primitive 'warp'; allowed: max_pool, "):
        DeepNets1M.open(write(tmp_path, primitives_ext={"0": "warp"}))
    path = write(tmp_path)
    with h5py.File(path, "a") as file:
        del file["test/1/adj"]
    nets = DeepNets1M.open(path)
    assert len(nets.graph(0)) == 3
    with pytest.raises(ValueError, match="graph 1 cannot be read"):
        nets.graph(1)
