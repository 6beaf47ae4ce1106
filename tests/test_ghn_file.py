"""Hypernetworks in one file, and those that are found by name."""

import jax
import numpy as np
import pytest
import safetensors.numpy

import ghn_jax
from ghn_jax.cli import convert, predict
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghns
from ghn_jax.hypernet.ghn_file import read_about, read_ghn_file, write_ghn_file
from ghn_jax.interop import pretrained

GHN = ghn_jax.GHN(max_shape=(8, 8, 11, 11), features=16, virtual_edges=7)


@pytest.fixture(scope="module")
def variables():
    return GHN.init_variables(3)


def leaves(variables):
    return jax.tree_util.tree_leaves_with_path(variables["params"])


@pytest.mark.parametrize(("half", "error", "size"), [(False, 0, 4), (True, 5e-4, 2)])
def test_what_was_written_is_read(tmp_path, variables, half, error, size):
    path = tmp_path / "a.safetensors"
    write_ghn_file(path, GHN, variables, half=half, about={"updates": 7})
    for source in (path, str(path), tmp_path):  # a folder with one file as well
        ghn, found = ghn_jax.from_pretrained(source)
        assert ghn == GHN
        assert jax.tree.structure(found) == jax.tree.structure(dict(variables))
        for (_, ours), (_, theirs) in zip(leaves(found), leaves(variables), strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=error, atol=1e-7 if half else 0)
    assert read_about(path) == {"updates": 7}
    numbers = sum(leaf.size for _, leaf in leaves(variables))
    assert abs(path.stat().st_size - size * numbers) < 9000
    assert [*load_ghns([path])] == ["a"]


def test_names_of_those_that_come_with_the_package(tmp_path, variables, monkeypatch):
    monkeypatch.setattr(pretrained, "_SHIPPED", tmp_path)
    write_ghn_file(tmp_path / "small.safetensors", GHN, variables)
    (tmp_path / "small.md").write_text("about it")
    assert ghn_jax.available() == ["small"]
    ghn, found = ghn_jax.from_pretrained("small")
    assert ghn == GHN
    assert [*load_ghns(["small"])] == ["small"]
    with pytest.raises(FileNotFoundError, match="smal does not exist; .*, or a name: small"):
        ghn_jax.from_pretrained("smal")
    predict.main(["resnet18", "--ghn", "small", "--out", str(tmp_path / "r.pt")])
    assert (tmp_path / "r.pt").exists()


def test_nothing_is_overwritten_and_nothing_bad_is_written(tmp_path, variables):
    path = tmp_path / "a.safetensors"
    params = jax.tree.map(np.array, variables["params"])
    for number, half, message in ((np.nan, False, "not finite"), (1e5, True, "half precision")):
        params["embedding"] = jax.tree.map(lambda x, n=number: np.full_like(x, n), params["gnn"])
        with pytest.raises(ValueError, match=message):
            write_ghn_file(path, GHN, {"params": params}, half=half)
        assert not path.exists()
    write_ghn_file(path, GHN, variables)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        write_ghn_file(path, GHN, variables)
    assert path.read_bytes() == before


def test_files_that_do_not_fit_are_refused(tmp_path, variables):
    path = tmp_path / "a.safetensors"
    params = dict(variables["params"])
    del params["gnn"]
    write_ghn_file(path, GHN, {"params": params})
    with pytest.raises(ValueError, match="does not fit the hypernetwork that it describes: .*gnn"):
        read_ghn_file(path)
    other = tmp_path / "b.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, other, {"ghn": '{"encoder": 3}'})
    with pytest.raises(ValueError, match="describes a hypernetwork by"):
        ghn_jax.from_pretrained(other)
    safetensors.numpy.save_file({"a": np.zeros(3)}, other, {"ghn": "[1"})
    with pytest.raises(ValueError, match="its 'ghn' is no JSON"):
        ghn_jax.from_pretrained(other)
    safetensors.numpy.save_file({"a": np.zeros(3)}, other)
    with pytest.raises(ValueError, match="no hypernetwork"):
        read_ghn_file(other)
    write_ghn_file(tmp_path / "c.safetensors", GHN, variables)
    content = bytearray((tmp_path / "c.safetensors").read_bytes())
    content[-9] ^= 1
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="c.safetensors is damaged"):
        ghn_jax.from_pretrained(tmp_path / "c.safetensors")


def test_the_command_writes_one(tmp_path, variables):
    ghn_jax.save_ghn(tmp_path / "folder", GHN, variables)
    training = {"preset": "demo", "widths": [8]}
    places = {"out": "/home/me/x", "data_dir": "/home/me/data", "init": "/home/me/y"}
    Checkpoints(tmp_path / "folder").write_config(GHN, training={**training, **places})
    small = tmp_path / "small.safetensors"
    convert.main(["ghn", str(tmp_path / "folder"), str(small), "--to", "flax", "--half"])
    assert ghn_jax.from_pretrained(small)[0] == GHN
    assert pretrained.about(tmp_path / "folder")["training"] == {**training, **places}
    assert pretrained.about(small) == {"training": training}
    assert b"/home/me" not in small.read_bytes()
    assert small.stat().st_size < 2.2 * sum(leaf.size for _, leaf in leaves(variables)) + 9000
    convert.main(["ghn", str(small), str(tmp_path / "again")])
    assert ghn_jax.load_ghn(tmp_path / "again")[0] == GHN
    assert pretrained.about(tmp_path / "again") == {"training": training}
    with pytest.raises(ValueError, match="x.ckpt ends in .ckpt; allowed"):
        convert.main(["ghn", str(small), str(tmp_path / "x.ckpt")])
    with pytest.raises(ValueError, match="--half is for files of ours"):
        convert.main(["ghn", str(small), str(tmp_path / "x.pt"), "--half"])


def test_networks_in_files_with_names_of_flax(tmp_path, variables):
    write_ghn_file(tmp_path / "ghn.safetensors", GHN, variables)
    arguments = ["--split", "test", "--index", "7", "--ghn", str(tmp_path / "ghn.safetensors")]
    out = tmp_path / "weights.safetensors"
    predict.main([*arguments, "--out", str(out), "--to", "flax"])
    predict.main([*arguments, "--out", str(tmp_path / "folder")])
    arch = ghn_jax.evaluation_set("test")[7]
    params = GHN.predict(variables, arch)
    expected = {"params/" + "/".join(k.key for k in path): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    found = safetensors.numpy.load_file(out)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    (_, _, trees) = Checkpoints(tmp_path / "folder").load(params=params)
    jax.tree.map(np.testing.assert_array_equal, trees["params"], params)
