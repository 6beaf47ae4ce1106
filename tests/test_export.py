"""Official DeepNets-1M files, written: what is read is written as it was."""

import json

import h5py
import numpy as np
import pytest

from ghn_jax import sample_architecture
from ghn_jax.cli.deepnets1m import main
from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.reader import FileGraph
from ghn_jax.deepnets1m.sampling import RULES
from ghn_jax.deepnets1m.writer import entry_and_graph, write_deepnets1m


def assert_equal(a: FileGraph, b: FileGraph) -> None:
    assert (a.primitives, a.names, a.extended) == (b.primitives, b.names, b.extended)
    np.testing.assert_array_equal(a.cells, b.cells)
    np.testing.assert_array_equal(a.distances, b.distances)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_the_sample_is_exported_byte_for_byte(shared, tmp_path, kind):
    name = f"deepnets1m_{kind}"
    sample = shared / "golden" / "deepnets1m"
    main(["export", "--kind", kind, "--nets", str(sample / f"{name}.hdf5"), "--out", str(tmp_path)])
    for file in (f"{name}.hdf5", f"{name}_meta.json"):
        assert (tmp_path / file).read_bytes() == (sample / file).read_bytes(), file


@pytest.mark.parametrize("split", ["train", *EVALUATION_SIZES, "search"])
def test_what_is_written_is_read(tmp_path, split):
    rules = RULES[split]
    nets = [
        evaluation_set(split)[i] if split in EVALUATION_SIZES else sample_architecture(split, 0, i)
        for i in range(3)
    ]
    written = [entry_and_graph(arch, rules) for arch in nets]
    write_deepnets1m(tmp_path / "small.hdf5", {split: iter(written)})
    file = DeepNets1M.open(tmp_path / "small.hdf5", split)
    assert len(file) == 3
    for i, (arch, (entry, stored)) in enumerate(zip(nets, written, strict=True)):
        assert file.entry(i) == entry
        assert_equal(file.graph(i), stored)
        if split == "train":
            assert "C" not in entry
            arch = arch.replace(C=file[i].C, fc_dim=file[i].fc_dim)
        assert file[i] == arch
        graph = build_graph(arch, 250)
        assert [PRIMITIVES[p] for p in graph.primitives] == stored.primitives
        assert graph.names == stored.names
        assert file.num_nodes(i) == len(graph)
        assert np.count_nonzero(stored.distances) == len(graph.edges)
        for source, target, length in graph.edges[::37].tolist():
            assert stored.distances[source, target] == length


def test_entries_are_the_official_ones(shared):
    """Meta files in order and value, from nothing but the architecture."""
    sample = shared / "golden" / "deepnets1m"
    for kind, splits in (("train", ["train"]), ("eval", EVALUATION_SIZES)):
        meta = json.loads((sample / f"deepnets1m_{kind}_meta.json").read_text())
        for split in splits:
            file = DeepNets1M.open(sample / f"deepnets1m_{kind}.hdf5", split)
            for i, entry in enumerate(meta[split]["nets"]):
                ours, graph = entry_and_graph(file[i], RULES[split])
                assert list(ours) == list(entry) and ours == entry
                stored = file.graph(i)
                nodes = (zip(g.extended, g.names, strict=True) for g in (graph, stored))
                assert len(set(map(frozenset, nodes))) == 1


def test_export_writes_all_evaluation_sets(tmp_path, capsys):
    main(["export", "--kind", "eval", "--num", "2", "--out", str(tmp_path)])
    assert "12 networks" in capsys.readouterr().out
    with h5py.File(tmp_path / "deepnets1m_eval.hdf5") as file:
        assert sorted(file) == sorted(EVALUATION_SIZES)
        assert file.attrs["title"] == "DeepNets-1M"
    for split in EVALUATION_SIZES:
        file = DeepNets1M.open(tmp_path / "deepnets1m_eval.hdf5", split)
        assert tuple(file) == evaluation_set(split)[:2]


def test_existing_files_are_left_alone(tmp_path):
    for name in ("deepnets1m_train.hdf5", "deepnets1m_train_meta.json"):
        existing = tmp_path / name
        existing.write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} exists; remove it"):
            main(["export", "--kind", "train", "--num", "1", "--out", str(tmp_path)])
        assert existing.read_text() == "mine"
        assert list(tmp_path.iterdir()) == [existing]
        existing.unlink()


def test_nothing_is_left_of_a_failed_export(tmp_path):
    def broken():
        yield entry_and_graph(sample_architecture("train", 0, 0), RULES["train"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_deepnets1m(tmp_path / "x.hdf5", {"train": broken()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--kind", "train", "--out", "/nowhere/at/all"], "which is not a folder"),
        (["export", "--kind", "train", "--num", "0", "--out", "/tmp"], "--num is 0; allowed: 1"),
        (["unique", "--split", "easy"], "split 'easy' has no generated architectures"),
        (["stats", "--figures", "/nowhere/at/all"], "which is not a folder"),
    ],
)
def test_what_cannot_work_ends_in_a_sentence(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(arguments)


def test_unique_counts_networks(capsys):
    main(["unique", "--num", "200"])
    assert "200 architectures of train: 200 different networks" in capsys.readouterr().out
