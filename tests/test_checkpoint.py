"""Hypernetworks on disk."""

import contextlib
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from ghn_jax.files.digest import digest_of_arrays
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


def without_digest(text):
    return re.sub(r',\s*"digest": "\w+"', "", text)


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
        ('"ghn": {', '"ghn": [', "is truncated or not JSON"),
        ('"ghn"', '"net"', "is damaged"),
    ],
)
def test_a_checkpoint_that_does_not_fit(saved, old, new, message):
    path = saved / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(without_digest(text.replace(old, new)))
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
    del config["digest"]
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


def test_a_configuration_that_was_changed_is_not_taken_for_what_was_trained(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"virtual_edges": 50', '"virtual_edges": 49'))
    with pytest.raises(ValueError, match="its digest differs. Restore it; or"):
        load_ghn(saved)
    path.write_text(without_digest(path.read_text()))
    assert load_ghn(saved)[0].virtual_edges == 49


def damage(data, kind, rng):
    """Bytes as a disk or a copy that was cut off leaves them."""
    place = int(rng.integers(len(data)))
    if kind == "flipped":
        return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]
    return {"cut off": data[:place], "zeros": bytes(len(data)), "empty": b""}[kind]


# Orbax leaves coroutines behind where it meets damage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damage_gives_wrong_numbers(tmp_path):
    """Whatever file of a folder is damaged: the right numbers, or an error that says so."""
    rng, ghn = np.random.default_rng(0), GHN(**SMALL)
    tree = {"a": rng.standard_normal((40, 30)).astype(np.float32), "b": np.arange(7)}
    whole = tmp_path / "whole"
    with Checkpoints(whole) as checkpoints:
        checkpoints.write_config(ghn)
        for step in (1, 2):
            checkpoints.save(step, 10 * step, params={**tree, "a": tree["a"] * step})
    like = jax.eval_shape(lambda: jax.tree.map(np.asarray, tree))
    spoiled = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.stat().st_size]
    outcomes = set()
    for i in range(60):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        path = folder / spoiled[i % len(spoiled)]
        kind = ("flipped", "cut off", "zeros", "empty")[int(rng.integers(4))]
        path.write_bytes(damage(path.read_bytes(), kind, rng))
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert Checkpoints(folder).ghn() == ghn
                step, position, trees = Checkpoints(folder).load(params=like)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error)
            assert "\n" not in str(error)
            outcomes.add("error")
            continue
        assert position == 10 * step
        np.testing.assert_array_equal(trees["params"]["a"], tree["a"] * step)
        np.testing.assert_array_equal(trees["params"]["b"], tree["b"])
        messages = [str(w.message) for w in said if "damaged" in str(w.message)]
        assert bool(messages) == (step == 1)
        outcomes.add(step)
    assert outcomes == {1, 2, "error"}


def test_numbers_of_another_checkpoint_are_not_taken_for_its_own(tmp_path):
    checkpoints, like = Checkpoints(tmp_path), {"a": jax.ShapeDtypeStruct((3,), np.float32)}
    for step in (1, 2):
        checkpoints.save(step, 10 * step, params={"a": np.full(3, step, np.float32)})
    metadata = tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    text = metadata.read_text()
    assert '"position": 20' in text
    metadata.write_text(text.replace('"position": 20', '"position": 28'))
    with pytest.warns(UserWarning, match="2 in .* is damaged .*; going on from checkpoint 1"):
        assert checkpoints.load(params=like)[:2] == (1, 10)
    metadata.write_text(text)
    assert checkpoints.load(params=like)[:2] == (2, 20)
    one, two = (tmp_path / "checkpoints" / step / "params" for step in "12")
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    with pytest.raises(ValueError, match="2 in .* not those that were saved.*, and none before it"):
        checkpoints.load(params=like)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("found", "instead"),
    [("performance_metrics", "performance_m%trics"), ('commit_timestamp_nsecs": 1', 'a": "1')],
)
def test_training_goes_on_where_metadata_are_damaged(tmp_path, found, instead):
    like = {"a": jax.ShapeDtypeStruct((3,), np.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, 10 * step, params={"a": np.full(3, step, np.float32)})
    metadata = tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    text = metadata.read_text()
    assert found in text
    metadata.write_text(text.replace(found, instead))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 2
        with pytest.warns(UserWarning, match="2 in .* is damaged .*; going on from checkpoint 1"):
            assert checkpoints.load(params=like)[:2] == (1, 10)
        for step in (2, 3):
            checkpoints.save(step, 11 * step, params={"a": np.full(3, step, np.float32)})
    assert Checkpoints(tmp_path).steps() == [2, 3]
    for step in (2, 3):
        _, position, trees = Checkpoints(tmp_path).load(params=like, upto=step)
        assert (position, trees["params"]["a"][0]) == (11 * step, step)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("held", [True, False])
def test_checkpoints_before_one_that_is_damaged_are_saved(tmp_path, held):
    """What is damaged is set aside, so that it is in nobody's way."""
    array, checkpoints = {"a": np.zeros(3, np.float32)}, Checkpoints(tmp_path)
    with checkpoints if held else contextlib.nullcontext():
        for step in (9, 14):
            checkpoints.save(step, step, params=array)
        checkpoints.load(params=array)
        (tmp_path / "checkpoints" / "14" / "params" / "_METADATA").write_text("{")
        with pytest.warns(UserWarning, match="14 in .* is damaged .*; going on from checkpoint 9"):
            assert checkpoints.load(params=array)[0] == 9
        for step in (10, 11, 12):
            checkpoints.save(step, step, params=array)
            assert checkpoints.load(params=array)[:2] == (step, step)
    assert Checkpoints(tmp_path).steps() == [11, 12]
    assert (tmp_path / "set_aside" / "14").is_dir()
    Checkpoints(tmp_path).save(14, 14, params=array)
    assert Checkpoints(tmp_path).load(params=array)[0] == 14
    Checkpoints(tmp_path).save(13, 13, params=array)
    assert {path.name for path in (tmp_path / "set_aside").iterdir()} == {"14", "14.1"}


def test_what_is_not_saved_is_an_error(tmp_path, monkeypatch):
    never = lambda *args, **options: None  # noqa: E731
    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", never)
    with pytest.raises(OSError, match="checkpoint 1 could not be written"):
        Checkpoints(tmp_path).save(1, 1, params={"a": np.zeros(3, np.float32)})


def test_what_is_saved_in_the_background_is_what_it_was(tmp_path):
    array = jnp.zeros((200, 200))
    update = jax.jit(lambda x: x + 1, donate_argnums=0)  # into the memory that was saved from
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            array = update(array)
            checkpoints.save(step, step, params={"a": array})
        update(update(array))
    like = {"a": jax.ShapeDtypeStruct((200, 200), np.float32)}
    step, _, trees = Checkpoints(tmp_path).load(params=like)
    assert step == 3
    np.testing.assert_array_equal(trees["params"]["a"], np.full((200, 200), 3))


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, 1, params={"a": np.ones(3, np.float32)})

    def full(*args, **options):
        raise ValueError("UNAVAILABLE: write failed: No space left on device\nand so on\n" * 100)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", full)
        with pytest.raises(
            OSError, match="checkpoint 2 .* No space left .* it was. Make room"
        ) as e:
            checkpoints.save(2, 2, params={"a": np.ones(3, np.float32)})
    assert "\n" not in str(e.value)
    assert checkpoints.load(params={"a": jax.ShapeDtypeStruct((3,), np.float32)})[0] == 1


def test_several_hypernetworks_have_the_names_of_their_folders(tmp_path):
    ghn = GHN(max_shape=(16, 16, 7, 7))
    for i, name in enumerate(("a/x", "b/y", "b/x")):
        save_ghn(tmp_path / name, ghn, ghn.init_variables(i))
    found = load_ghns([tmp_path / "a/x", tmp_path / "b/y"])
    assert list(found) == ["x", "y"]
    jax.tree.map(np.testing.assert_array_equal, found["y"][1], dict(ghn.init_variables(1)))
    with pytest.raises(ValueError, match="hypernetworks are called 'x'"):
        load_ghns([tmp_path / "a/x", tmp_path / "b/x"])
    assert list(load_ghns([])) == ["untrained GHN-2"]


def test_digests_are_those_of_checkpoints_of_before():
    arrays = [np.int32(3), np.zeros((2, 0)), np.ones((2, 3))]
    expected = "b3d4791e6ccd453d77bfbf52143d3e9e20dd9ee3f11ab6818ffa4015b7c48029"
    assert digest_of_arrays(arrays, "1 2") == expected
