"""Records of experiments: kept, whole, and of the options and parameters that they say."""

import ast
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

from ghn_jax.deepnets1m.task import Task
from ghn_jax.evaluation.experiments import compared_architectures
from ghn_jax.evaluation.experiments.kept_parameters import write_parameters
from ghn_jax.evaluation.experiments.records import Records, read_records
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training.config import preset


def test_records_are_kept_and_not_added_twice(tmp_path):
    records = Records.open(tmp_path, {"a": 1})
    records.add({"name": "x", "top1": 0.5})
    Records.open(tmp_path, {"a": 1}, unit="5-9").add({"name": "y", "top1": 0.6})
    again = Records.open(tmp_path, {"a": 1})
    assert {name: again[name]["top1"] for name in again} == {"x": 0.5, "y": 0.6}


def test_a_record_that_was_cut_off_is_dropped(tmp_path):
    records = Records.open(tmp_path, {})
    for name in "xyz":
        records.add({"name": name})
    whole = records.path.read_bytes()
    for cut in range(1, len(whole)):
        records.path.write_bytes(whole[:cut])
        found = Records.open(tmp_path, {})
        assert list(found) == list("xyz")[: whole[:cut].count(b"\n")]
        found.add({"name": "new"})
        assert list(read_records(tmp_path)) == [*found]


def test_damaged_records_are_named(tmp_path):
    records = Records.open(tmp_path, {})
    (tmp_path / "settings.json").write_text("{}")  # as before there were digests
    records.path.write_text('{"name": "x"}\n{"nam\n{"name": "y"}\n')
    with pytest.raises(ValueError, match=r"records.jsonl, line 2, is damaged"):
        Records.open(tmp_path, {})
    records.path.write_text('{"top1": 1}\n')
    with pytest.raises(ValueError, match="line 1, is no record"):
        Records.open(tmp_path, {})


def test_records_of_other_settings_are_refused(tmp_path):
    Records.open(tmp_path, {"seed": 1, "epochs": 5})
    with pytest.raises(ValueError, match=r"seed 1 \(now 2\)"):
        Records.open(tmp_path, {"seed": 2, "epochs": 5})


def test_records_of_a_hypernetwork_that_changed_are_refused(tmp_path):
    """A name stands for the parameters that it had when its first record was made."""
    ghn = GHN(max_shape=(16, 16, 7, 7))
    first, other = ({"x": (ghn, ghn.init_variables(seed))} for seed in (0, 1))
    Records.open(tmp_path, {}, ghns=first).add({"name": "x: net"})
    both = {**first, "y": other["x"]}
    assert list(Records.open(tmp_path, {}, ghns=both)) == ["x: net"]
    for ghns in (other, {**both, "y": first["x"]}):
        with pytest.raises(ValueError, match="begun with other parameters of .*another folder"):
            Records.open(tmp_path, {}, ghns=ghns)
    assert list(Records.open(tmp_path, {}, ghns=both)) == ["x: net"]


def test_records_of_trained_networks_that_changed_are_refused(tmp_path):
    files = {name: tmp_path / f"{name}.safetensors" for name in ("SGD: a", "SGD: b")}
    for file in files.values():
        write_parameters(file, {"stem": {"kernel": np.zeros(3)}})
    out = tmp_path / "out"
    Records.open(out, {}, trained={"SGD: a": files["SGD: a"]}).add({"name": "x"})
    assert list(Records.open(out, {}, trained=files)) == ["x"]
    write_parameters(files["SGD: b"], {"stem": {"kernel": np.ones(3)}})
    with pytest.raises(ValueError, match="begun with other parameters of 'SGD: b'"):
        Records.open(out, {}, trained=files)


def test_an_experiment_does_not_mix_two_hypernetworks_of_one_name(tmp_path):
    run, ghn = tmp_path / "run", preset("demo").ghn(Task())
    with Checkpoints(run) as checkpoints:
        checkpoints.write_config(ghn)
        checkpoints.save(1, 1, params=ghn.init_variables(0)["params"])
    config = compared_architectures.Config(
        ghn=(run,), training=4, networks=3, pairs=2, out=tmp_path / "out"
    )
    found = json.dumps(compared_architectures.run(config))
    assert json.dumps(compared_architectures.run(config)) == found
    with Checkpoints(run) as checkpoints:  # it is trained on
        checkpoints.save(2, 2, params=ghn.init_variables(1)["params"])
    with pytest.raises(ValueError, match="begun with other parameters of 'run'"):
        compared_architectures.run(config)


def test_every_experiment_says_which_hypernetworks_its_records_are_of():
    folder = Path(inspect.getfile(compared_architectures)).parent
    for file in sorted(folder.glob("*.py")):
        text = file.read_text()
        if "load_ghn" in text or "from_pretrained" in text:
            for call in ast.walk(ast.parse(text)):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "Records.open":
                    assert "ghns" in [keyword.arg for keyword in call.keywords], file.name
