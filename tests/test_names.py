"""Names: the public ones, those of version 0.1, and the commands."""

import ast
import importlib
import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import ghn_jax
from ghn_jax import zoo
from ghn_jax.cli import predict
from ghn_jax.data.images import load_images, train_batches
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.old_names import NAMES
from ghn_jax.interop.torch_file import read_torch

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_public_names_are_there():
    assert len(set(ghn_jax.__all__)) == len(ghn_jax.__all__)
    for name in ghn_jax.__all__:
        assert getattr(ghn_jax, name) is not None
    assert ghn_jax.predict is ghn_jax.predict_model


@pytest.mark.parametrize("old", [n for n in NAMES if not n.endswith("__main__")])
def test_modules_are_found_under_their_old_names(old):
    new = importlib.import_module(NAMES[old])
    assert importlib.import_module(old) is new
    assert new.__spec__.name == new.__name__ == NAMES[old]


@pytest.mark.parametrize(
    ("module", "name", "new"),
    [
        ("graph", "pad_graphs", "pad_graphs"),
        ("prediction", "predict", "predict_model"),
        ("images", "load_images", "data.images.load_images"),
        ("parity", "main", "cli.parity.main"),
        ("program_store", "ProgramStore", "engine.programs.Programs"),
    ],
)
def test_what_old_modules_had(module, name, new):
    """In a process of its own: what was imported before may not help."""
    source = f"""
import functools, importlib, ghn_jax
from ghn_jax.{module} import {name}
*path, last = "{new}".split(".")
place = importlib.import_module(".".join(["ghn_jax", *path]))
assert {name} is getattr(place, last)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", source], env=environment, check=True)


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="ghn_jax.nothing"):
        importlib.import_module("ghn_jax.nothing")


@pytest.mark.parametrize("module", ["parity", "convert", "deepnets1m"])
def test_old_commands(module):
    result = subprocess.run(
        [sys.executable, "-m", f"ghn_jax.{module}", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "usage" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("script", [*PROJECT["scripts"]])
def test_commands_say_what_is_wrong_in_a_line(script, monkeypatch):
    module, _, function = PROJECT["scripts"][script].partition(":")
    arguments = {
        "ghn-train": ["--resume", "--out", "/nowhere"],
        "ghn-eval": ["--ckpt", "/nowhere"],
        "ghn-paper": ["table-of-contents"],
        "ghn-predict": ["--ckpt", "/nowhere", "--out", "x.pt"],
        "ghn-convert": ["ghn", "/nowhere", "/x.pt"],
        "ghn-deepnets1m": ["stats", "--num", "0"],
        "ghn-demo": ["--ghn", "/nowhere"],
        "ghn-card": ["--ghn", "/nowhere"],
    }[script]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        getattr(importlib.import_module(module), function)()
    message = str(ended.value.code)
    assert message.startswith(f"{script}: ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("script", [*PROJECT["scripts"]])
def test_help_has_examples_on_lines_of_their_own(script, capsys):
    module = importlib.import_module(PROJECT["scripts"][script].partition(":")[0])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = {line.strip() for line in capsys.readouterr().out.splitlines()}
    examples = re.findall(rf"^    ({script} .*)$", module.__doc__, re.M)
    assert examples
    assert {line.strip() for line in examples} <= shown


def test_scripts_are_thin():
    for path in (*ROOT.glob("train/*.py"), *ROOT.glob("eval/*.py")):
        assert len(path.read_text().splitlines()) < 60


def test_packages_import_no_package_above_them():
    """The order in which packages stand: each imports only from those before it."""
    order = ["files", "deepnets1m", "zoo", "data", "plot", "hypernet", "engine", "tracing",
             "training", "detection", "evaluation", "interop", "web",
             "cli"]  # fmt: skip
    for path in ROOT.glob("ghn_jax/*/**/*.py"):
        package = path.relative_to(ROOT / "ghn_jax").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ghn_jax."):
                imported = node.module.split(".")[1]
                assert order.index(imported) <= order.index(package), path


def test_files_that_the_docs_name_are_there():
    named = [
        name
        for page in (*ROOT.glob("docs/*.md"), ROOT / "README.md")
        for name in re.findall(r"`([a-z_0-9]+/[a-z_0-9]+\.py)`", page.read_text())
    ]
    assert len(named) > 40
    for name in named:
        assert (ROOT / "ghn_jax" / name).exists() or (ROOT / name).exists(), name


def test_requirements_are_those_of_all_extras():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {re.sub(r"\s*#.*", "", line) for line in lines} - {""}
    extras = PROJECT["optional-dependencies"]
    parts = ("train", "plot", "cluster", "tensorboard", "detection")
    assert listed == {*PROJECT["dependencies"], *(line for part in parts for line in extras[part])}
    assert extras["all"] == [f"ghn_jax[{','.join(parts)}]"]


WITHOUT_EXTRAS = """
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {"matplotlib", "markdown", "tensorflow_datasets", "array_record", "sklearn",
                   "submitit", "pycocotools"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)
sys.meta_path.insert(0, NotInstalled())
from ghn_jax.cli import convert, deepnets1m, evaluate, predict, train
sys.argv = ["ghn-deepnets1m", "stats", "--splits", "bnfree", "--num", "1", "--figures", "."]
deepnets1m.run()
"""


def test_without_extras_all_is_imported_and_what_is_missing_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    message = "this needs matplotlib; install it with pip install 'ghn_jax[plot]'"
    assert result.stderr.splitlines()[-1] == f"ghn-deepnets1m: {message}"


# --- ghn-predict ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    ghn = GHN(max_shape=(16, 16, 11, 11))
    path = tmp_path_factory.mktemp("predict") / "ghn"
    ghn_jax.save_ghn(path, ghn, ghn.init_variables(0))
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_predicting_a_network_of_a_split(ckpt, tmp_path, suffix):
    out = tmp_path / f"weights{suffix}"
    options = ["--ckpt", ckpt, "--split", "test", "--index", "7", "--out", out]
    predict.main([str(o) for o in options])
    arch = ghn_jax.evaluation_set("test")[7]
    ghn, variables = ghn_jax.load_ghn(ckpt)
    expected = ghn_jax.to_torch(ghn.predict(variables, arch), arch)
    if suffix:
        found = (read_torch if suffix == ".pt" else safetensors.numpy.load_file)(out)
    else:
        params = ghn.predict(variables, arch)
        found = ghn_jax.to_torch(Checkpoints(out).load(params=params)[2]["params"], arch)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(FileExistsError, match="exists already"):
        predict.main([str(o) for o in options])


def test_predicting_a_model(ckpt, tmp_path, capsys):
    out = tmp_path / "r18.safetensors"
    predict.main(["--ckpt", str(ckpt), "--net", "resnet18", "--out", str(out)])
    assert "decoded" in capsys.readouterr().out
    assert safetensors.numpy.load_file(out)["conv1.weight"].shape == (64, 3, 3, 3)


def test_running_statistics_of_a_predicted_model(ckpt, tmp_path, capsys):
    """Without images they are not known, which is said; with them they are averages."""
    plain, averaged = tmp_path / "plain.pth", tmp_path / "averaged.pt"
    options = ["--ckpt", str(ckpt), "--net", "resnet18", "--out"]
    predict.main([*options, str(plain)])
    assert "Running statistics are not predicted" in capsys.readouterr().out
    predict.main([*options, str(averaged), "--dataset", "digits", "--batches", "2"])
    assert "Running statistics are not predicted" not in capsys.readouterr().out
    model, images = zoo.resnet18(), load_images("digits", "train", image_size=32)
    variables = ghn_jax.from_torch(read_torch(plain), model)
    batches = [x for x, _ in itertools.islice(train_batches(images, 64, seed=0), 2)]
    expected = ghn_jax.average_statistics(model, variables, batches)
    found = ghn_jax.from_torch(read_torch(averaged), model)
    jax.tree.map(np.testing.assert_array_equal, found["params"], expected["params"])
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("a.npz", [], "a.npz ends in .npz; allowed: .pt, .pth, .safetensors, or a folder"),
        ("a.pt", ["--to", "flax"], "has PyTorch's names; give NAME.safetensors with --to flax"),
        ("a", ["--dataset", "digits"], "--dataset needs a file"),
        ("a.pt", ["--dataset", "digits", "--batches", "0"], "--batches is 0; allowed: 1 or more"),
        ("a.pt", ["--dataset", "digts"], "digts"),
    ],
)
def test_what_is_written_is_said_before_it_is_predicted(ckpt, tmp_path, out, options, message):
    with pytest.raises(ValueError, match=message):
        predict.main(["resnet18", "--ckpt", str(ckpt), "--out", str(tmp_path / out), *options])
    assert not (tmp_path / out).exists()


def test_networks_of_the_design_space_have_no_running_statistics(ckpt, tmp_path):
    options = ["--split", "test", "--out", str(tmp_path / "a.pt"), "--dataset", "digits"]
    with pytest.raises(ValueError, match="--dataset is for models of the zoo"):
        predict.main(["--ckpt", str(ckpt), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", "resnet18", "--split", "test"], "give a network .* or --split"),
        ([], "give a network .* or --split"),
        (["--net", "lenet"], "lenet does not exist; give a JSON file or one of"),
        (["--split", "test", "--index", "500"], "--index is 500; allowed: 0 to 499"),
    ],
)
def test_what_cannot_be_predicted(ckpt, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        predict.main(["--ckpt", str(ckpt), "--out", str(tmp_path / "x.pt"), *options])
    assert not (tmp_path / "x.pt").exists()
