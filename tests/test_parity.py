"""Our numbers are the authors': `ghn_jax.parity` on their outputs, and on spoiled ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghn_jax.cli.parity import main
from ghn_jax.engine.engine import Engine
from ghn_jax.interop import parity
from ghn_jax.interop.parity import Report, check_network, relative_error
from ghn_jax.interop.torch_ghn import load_torch_ghn, to_torch_tensors


def test_everything_the_authors_computed(shared):
    # The definition's gradient takes minutes to compile; `test_training.py` has the engine's, which
    # is here, equal to it.
    checks = [pair for pair in parity.checks(shared / "golden") if "(definition)" not in pair[0]]
    reports = [parity.report(*pair) for pair in checks]
    print("\n".join(map(str, reports)))
    assert all(r.passed for r in reports)
    kinds = {kind for r in reports for kind in r.errors}
    assert kinds >= set(parity.TOLERANCES) - {"states", "loss"}  # of later hypernetworks
    assert len(reports) >= 35


@pytest.fixture(scope="module")
def network(shared):
    """One network of the folder: its entry, its file, and what it is checked with."""
    folder = shared / "golden"
    entry = next(e for e in json.loads((folder / "index.json").read_text())
                 if e["file"] == "arch01_ghn2.npz")  # fmt: skip
    file = dict(np.load(folder / entry["file"]))
    images = jnp.asarray(np.load(folder / "images.npy").transpose(0, 2, 3, 1))
    return entry, file, load_torch_ghn(folder / "random_ghn2_cifar10.pt"), images


def spoil_primitive(file):
    file["node_primitive"][3] += 1


def spoil_distance(file):
    file["edges"][len(file["edges"]) // 2, 2] += 1


def spoil_edge(file):
    file["edges"] = file["edges"][:-1]


def spoil_embedding(file):
    file["embedding"][2] *= 1.01


def spoil_parameter(file):
    name = next(k for k in file if k.startswith("param/"))
    file[name].flat[0] += 0.01


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("graph", spoil_primitive),
        ("graph", spoil_distance),
        ("graph", spoil_edge),
        ("embedding", spoil_embedding),
        ("parameters", spoil_parameter),
    ],
)
def test_a_spoiled_tensor_is_found(network, kind, spoil):
    entry, file, model, images = network
    file = {k: v.copy() for k, v in file.items() if k != "logits"}
    spoil(file)
    report = Report("spoiled", check_network(entry, file, *model, images, Engine()))
    assert not report.passed
    assert report.errors[kind] > parity.TOLERANCES[kind]
    assert str(report).startswith("FAIL spoiled")


def test_spoiled_logits_are_found(network):
    entry, file, model, images = network
    file = {**file, "logits": file["logits"] * 1.01}
    errors = check_network(entry, file, *model, images, Engine())
    assert errors["logits"] > parity.TOLERANCES["logits"]
    assert errors["parameters"] < parity.TOLERANCES["parameters"]


def test_a_spoiled_gradient_is_found(network, monkeypatch):
    monkeypatch.setattr(parity, "ROUNDINGS", 1)
    entry, _, (ghn, variables), images = network
    logits = np.ones((1, 2, ghn.num_classes), np.float32)

    def make_step(*_):  # its gradient is what it is taken at
        return lambda given: (1.0, logits[0], given)

    def errors(spoil):
        tensors = to_torch_tensors(ghn, variables)
        file = {f"grad/{name}": tensor for name, tensor in tensors.items()}
        norm = np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(variables)])
        file |= {"labels": np.zeros(2, int), "logits": logits, "loss_per_arch": [1.0],
                 "grad_norm": norm}  # fmt: skip
        spoil(file)
        return parity.check_gradient(file, [entry["net"]], ghn, variables, images, make_step)

    right = errors(lambda file: None)
    assert right["gradient"] < 1e-6
    assert right["logits"] < 1e-6
    for spoil in (spoil_norm, spoil_gradient):
        assert errors(spoil)["gradient"] > parity.TOLERANCES["gradient"]
    assert errors(spoil_loss)["logits"] > parity.TOLERANCES["logits"]


def spoil_norm(file):
    file["grad_norm"] = file["grad_norm"] * 1.01


def spoil_gradient(file):
    name = max((n for n in file if n.startswith("grad/")), key=lambda n: file[n].size)
    file[name] = file[name] + 0.01 * np.abs(file[name]).mean()


def spoil_loss(file):
    file["loss_per_arch"] = [1.01]


def test_digests_tell_a_changed_tensor():
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((20, 10, 3, 3))
    flat = tensor.reshape(-1)
    digest = np.array([flat.mean(), flat.std(), np.abs(flat).sum(),
                       (flat * np.cos(np.arange(len(flat)))).sum()])  # fmt: skip
    assert parity._digest_error(tensor, digest, flat[:16]) < 1e-12
    for other in (tensor * 1.001, tensor.transpose(1, 0, 2, 3), -tensor):
        assert parity._digest_error(other, digest, flat[:16]) > parity.TOLERANCES["parameters"]


def test_relative_error():
    assert relative_error([3.0, 4.0], [3.0, 4.0]) == 0
    assert relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert relative_error([3.0], [3.0, 4.0]) == np.inf
    assert relative_error([np.nan, 4.0], [3.0, 4.0]) == np.inf


def test_a_folder_without_anything(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="holds nothing to check"):
        main([str(tmp_path)])
    entry = {"file": "a.npz", "ghn": "ghn2", "net": {"torchvision": "lenet"}}
    (tmp_path / "index.json").write_text(json.dumps([entry]))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 1
    assert "FAIL a.npz" in capsys.readouterr().out
