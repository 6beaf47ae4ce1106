"""Hypernetworks on disk."""

import json

import jax
import numpy as np
import pytest

from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn, load_ghns, save_ghn
from ghn_jax.hypernet.ghn import GHN, mlp_baseline

SMALL = {"max_shape": (8, 8, 11, 11)}


@pytest.mark.parametrize(
    "ghn", [GHN(7, virtual_includes_real=True, **SMALL), mlp_baseline(dummy_op=False, **SMALL)]
)
def test_what_was_saved_is_loaded(ghn, tmp_path):
    variables = ghn.init_variables(3)
    save_ghn(tmp_path / "ghn", ghn, variables)
    again, loaded = load_ghn(tmp_path / "ghn")
    assert again == ghn
    jax.tree.map(np.testing.assert_array_equal, variables, loaded)


@pytest.fixture
def saved(tmp_path):
    ghn = GHN(**SMALL)
    save_ghn(tmp_path / "ghn", ghn, ghn.init_variables(0))
    return tmp_path / "ghn"


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_overwritten(saved):
    before = files(saved)
    ghn = GHN(**SMALL)
    with pytest.raises(FileExistsError, match="exists already; give a new folder"):
        save_ghn(saved, ghn, ghn.init_variables(1))
    assert files(saved) == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"features": 32', '"features": 16', "does not fit the module: .* arrays of 'params'"),
        ('"virtual_edges": 50', '"virtual_edges": 1', "does not fit the module: .*gnn/mlp_0"),
        ('"layer_norm": true,', "", "describes a hypernetwork by"),
        ('"ghn": {', '"ghn": [', "is damaged"),
        ('"ghn"', '"net"', "is damaged"),
    ],
)
def test_a_checkpoint_that_does_not_fit(saved, old, new, message):
    path = saved / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    before = files(saved)
    with pytest.raises(ValueError, match=message):
        load_ghn(saved)
    assert files(saved) == before


def test_checkpoints_of_before_are_read(saved):
    """Of when the encoder was called hypernet, and the decoder was no choice."""
    path = saved / "config.json"
    config = json.loads(path.read_text())
    ghn = config["ghn"]
    before = {"num_classes": ghn["num_classes"], "max_shape": ghn["max_shape"],
              "hypernet": ghn["encoder"], "virtual_edges": 50, "virtual_includes_real": False,
              "normalise": True, "layer_norm": True, "features": 32, "dummy_op": True}  # fmt: skip
    path.write_text(json.dumps({**config, "ghn": before}))
    assert load_ghn(saved)[0] == GHN(**SMALL)
    path.write_text(json.dumps({**config, "ghn": {**before, "hypernet": "mlp"}}))
    with pytest.raises(ValueError, match="does not fit the module"):
        load_ghn(saved)


def test_no_checkpoint(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; give a folder"):
        load_ghn(tmp_path / "nothing")
    Checkpoints(tmp_path / "empty").write_config(GHN(**SMALL))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_ghn(tmp_path / "empty")


def test_only_the_latest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    tree = {"a": np.arange(3.0)}
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        checkpoints.save(step, 10 * step, params=tree)
    assert checkpoints.latest() == 3
    step, position, trees = checkpoints.load(params=tree)
    assert (step, position) == (3, 30)
    np.testing.assert_array_equal(trees["params"]["a"], tree["a"])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_several_hypernetworks_have_the_names_of_their_folders(tmp_path):
    ghn = GHN(max_shape=(16, 16, 7, 7))
    for i, name in enumerate(("a/x", "b/y", "b/x")):
        save_ghn(tmp_path / name, ghn, ghn.init_variables(i))
    found = load_ghns([tmp_path / "a/x", tmp_path / "b/y"])
    assert list(found) == ["x", "y"]
    jax.tree.map(np.testing.assert_array_equal, found["y"][1], dict(ghn.init_variables(1)))
    with pytest.raises(ValueError, match="folders called 'x'"):
        load_ghns([tmp_path / "a/x", tmp_path / "b/x"])
    assert list(load_ghns([])) == ["untrained GHN-2"]
