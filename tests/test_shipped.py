"""The hypernetworks that come with the package: what they are, and that their cards are true."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import ghn_jax
from ghn_jax.data.images import eval_batches, load_images
from ghn_jax.interop import pretrained
from ghn_jax.training.config import TrainConfig

NAMES = ghn_jax.available()
ROOT = Path(__file__).parents[1]
FOLDER = Path(pretrained.__file__).parents[1] / "pretrained"


def card(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text()


def row(name: str, network: str) -> list[str]:
    """The cells of a network's row in a card's table."""
    (found,) = re.findall(rf"^\| {network} \|(.*)\|$", card(name), re.M)
    return [cell.strip() for cell in found.split("|")]


def test_there_is_one():
    assert "ghn2-cifar10-small" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_small_and_says_how_it_was_trained(name):
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 4e6
    config = TrainConfig.read(pretrained.about(name)["training"])
    ghn, variables = ghn_jax.from_pretrained(name)
    *widths, widest = map(str, config.space.widths)
    text = re.sub(r"\s+", " ", card(name))
    assert f"{', '.join(widths)} or {widest} initial channels" in text
    assert "{} to {} cells".format(*config.space.n_cells) in text
    pieces = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())["pieces"]
    assert f"{sum(piece['updates'] for piece in pieces):,} updates" in text
    arch = ghn_jax.sample_architecture("test", 0, 0, rules=config.space.rules(32))
    network, params = ghn_jax.build_network(arch), ghn.predict(variables, arch)
    logits = network.apply({"params": params}, jnp.ones((2, 32, 32, 3)))
    assert logits.shape == (2, 10) and np.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_resnet_that_nobody_trained_is_as_good_as_the_card_says(name, shared):
    """On a fifth of the test images, so within a few per cent."""
    test = load_images("cifar10", "test", data_dir=str(shared / "tfds"))
    ghn, ghn_variables = ghn_jax.from_pretrained(name)
    model = ghn_jax.zoo.resnet18()
    variables, _ = ghn_jax.predict_model(ghn, ghn_variables, model, jnp.zeros((1, 32, 32, 3)))
    right, counted = 0, 0
    for images, labels in eval_batches(test, 64):
        if counted >= 2048:
            break
        logits = ghn_jax.apply_on_batch(model, variables, images)
        right += int((np.argmax(logits, -1) == labels).sum())
        counted += len(labels)
    stated = float(row(name, "resnet18")[1].rstrip("%"))
    assert abs(100 * right / counted - stated) < 4
