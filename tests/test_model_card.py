"""The numbers of a model card: by one command, and batch norm on averaged statistics."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from ghn_jax.cli import card
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation import random_parameters
from ghn_jax.evaluation.model_card import (
    _averaging_engine,
    _averaging_module,
    averaged_accuracy,
    table,
)
from ghn_jax.evaluation.networks import by_name
from ghn_jax.hypernet import write_ghn_file
from ghn_jax.training.config import preset


class Small(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (3, 3), strides=4)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((64, 32, 32, 3), np.float32) * (1 + i) for i in range(3)]


def logits_by(run, network, params, batches):
    if run is _averaging_engine:
        return run(network, params, iter(batches), len(batches[0]), Engine())
    return run(network, params, iter(batches), 32)


@pytest.mark.parametrize("run", [_averaging_engine, _averaging_module])
def test_averaged_statistics(run, batches):
    """Of one batch they are those of the batch; of several, their mean, in whatever order."""
    if run is _averaging_engine:
        rules = preset("demo").space.rules(32)
        network = build_network(sample_architecture("train", 0, 1, rules=rules))
        on_batch = network.apply
    else:
        network = Small()
        statistics = network.init(jax.random.key(0), batches[0])["batch_stats"]

        def on_batch(variables, images):
            variables = {**variables, "batch_stats": statistics}
            return network.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    params = random_parameters(network, 32, seed=0)
    a, b, c = batches
    expected = on_batch({"params": params}, a)
    np.testing.assert_allclose(logits_by(run, network, params, [a])(a), expected, rtol=1e-2,
                               atol=1e-3 * float(np.abs(expected).max()))  # fmt: skip
    several = logits_by(run, network, params, [a, b, c])(a)
    again = logits_by(run, network, params, [c, a, b])(a)
    size = float(np.abs(several).max())
    np.testing.assert_allclose(several, again, atol=1e-4 * size)
    assert np.abs(several - expected).max() > 1e-2 * size


def test_a_card_by_one_command(tmp_path, capsys):
    """A network of each kind; what is measured is not measured again."""
    trained = preset("demo").replace(image_size=32)
    ghn = trained.ghn(Task(10, 32))
    file = tmp_path / "small.safetensors"
    write_ghn_file(file, ghn, ghn.init_variables(0), about={"training": trained.describe()})
    options = ["--ghn", str(file), "--unseen", "1", "--networks", "DARTS", "resnet18",
               "--width", "8", "--batches", "2", "--out", str(tmp_path / "card")]  # fmt: skip
    card.main(options)
    lines = (tmp_path / "card" / "records.jsonl").read_text().splitlines()
    records = {r["name"]: r for r in map(json.loads, lines)}
    assert list(records) == ["DARTS", "resnet18", "unseen 0"]
    for name in ("DARTS", "resnet18"):
        assert 0 <= records[name]["top1_averaged"] <= 1
        assert records[name]["top1_random"] < 0.3
    text = (tmp_path / "card" / "table.md").read_text()
    assert text == table(list(records.values())) and "| 1 unseen |" in text
    assert (tmp_path / "card" / "accuracy.png").exists()
    card.main(options)
    assert (tmp_path / "card" / "records.jsonl").read_text().splitlines() == lines
    assert text in capsys.readouterr().out
    # The third number is that of averaged statistics.
    ((_, arch),) = by_name(["DARTS"], 8)
    training, test = (load_images("digits", part, image_size=32) for part in ("train", "test"))
    params = ghn.predict(ghn.init_variables(0), arch)
    again = averaged_accuracy(build_network(arch), params, training, test, 2, Engine())
    assert records["DARTS"]["top1_averaged"] == pytest.approx(again, abs=0.01)
    assert records["DARTS"]["top1_averaged"] != records["DARTS"]["top1"]
    # Records of another hypernetwork are not mixed with these.
    other = tmp_path / "other.safetensors"
    write_ghn_file(other, ghn, ghn.init_variables(1), about={"training": trained.describe()})
    with pytest.raises(ValueError, match="has records with card of"):
        card.main(["--ghn", str(other), *options[2:]])


def test_a_card_on_few_images(tmp_path, capsys):
    """Fewer than batch norm takes statistics of, as a rule."""
    rng = np.random.default_rng(0)
    data = {"images": rng.integers(0, 255, (100, 32, 32, 3)), "labels": np.arange(100) % 10}
    np.savez(tmp_path / "few.npz", **{k: v.astype(np.uint8) for k, v in data.items()})
    trained = preset("demo").replace(image_size=32, dataset=f"npz:{tmp_path / 'few.npz'}")
    ghn = trained.ghn(Task(10, 32))
    file = tmp_path / "small.safetensors"
    write_ghn_file(file, ghn, ghn.init_variables(0), about={"training": trained.describe()})
    card.main(["--ghn", str(file), "--unseen", "0", "--networks", "DARTS", "--width", "8",
               "--batches", "1", "--out", str(tmp_path / "card")])  # fmt: skip
    assert "| DARTS |" in capsys.readouterr().out


def test_options_that_cannot_work(tmp_path):
    ghn = preset("demo").ghn(Task(10, 16))
    file = tmp_path / "untold.safetensors"
    write_ghn_file(file, ghn, ghn.init_variables(0))
    with pytest.raises(ValueError, match="does not say what rules"):
        card.main(["--ghn", str(file)])
    with pytest.raises(ValueError, match="--batches is 0"):
        card.main(["--ghn", str(file), "--batches", "0"])
    small = tmp_path / "small.safetensors"
    write_ghn_file(small, ghn, ghn.init_variables(0), about={"training": preset("demo").describe()})
    with pytest.raises(ValueError, match="16 pixels are too small for resnet18, .* 32 or more"):
        card.main(["--ghn", str(small), "--networks", "DARTS", "resnet18"])
    with pytest.raises(ValueError, match="no network 'resnet19'"):
        card.main(["--ghn", str(file), "--networks", "resnet19"])
