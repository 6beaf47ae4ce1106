"""The web page: what it shows of a network is what the network is."""

import asyncio
import base64
import dataclasses
import io
import json
import socket
import zipfile
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from definition import unit_by_unit
from PIL import Image

from ghn_jax.cli import web
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import RULES, sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.evaluation.accuracy import evaluate_network, logits_of, random_parameters
from ghn_jax.hypernet.checkpoint import Checkpoints, save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.torch_file import read_torch
from ghn_jax.interop.torch_models import abstract_variables
from ghn_jax.interop.torch_network import abstract_params
from ghn_jax.training.config import preset
from ghn_jax.web import networks, predictor, results, trial
from ghn_jax.web.downloads import write_downloads

SMALL_GHN = GHN(max_shape=(8, 8, 7, 7))
NORMAL = (("conv_1x1", 0), ("skip_connect", 1))
REDUCE = (("max_pool_3x3", 0), ("max_pool_3x3", 1))
SMALL = Architecture(Genotype(NORMAL, (2,), REDUCE, (2,)), n_cells=2, C=8)
RULES_ = dataclasses.replace(RULES["train"], n_cells=(3, 4), nodes=(1, 1), widths=(8,))


@pytest.fixture(scope="module")
def page():
    """Of a hypernetwork that is not trained, with 100 digits, which are not two whole batches."""
    digits = load_images("digits", "test")
    some = dataclasses.replace(
        digits, pixels=digits.pixels[:100], labels=digits.labels[:100],
        class_names=tuple(f"<{i}>" for i in range(10)),
    )  # fmt: skip
    large = load_images("digits", "test", image_size=32)
    large = dataclasses.replace(large, pixels=large.pixels[:32], labels=large.labels[:32])
    found = predictor.Predictor(
        SMALL_GHN, SMALL_GHN.init_variables(3), some, enlarged=large, rules=RULES_
    )
    yield found
    found.engine.programs.close()


@pytest.fixture(scope="module")
def prediction(page):
    return page.predict("a <small> network", SMALL)


# --- Predictions ----------------------------------------------------------------------------------


def test_accuracies_are_those_of_ghn_eval(page, prediction):
    network = build_network(SMALL, 10, 16)
    params = SMALL_GHN.predict(page.variables, SMALL, image_size=16)
    predicted, random = evaluate_network(
        network, params, random_parameters(network, 16, seed=0), images=page.images,
        engine=page.engine,
    )  # fmt: skip
    tested = prediction.trial
    assert (tested.top1, tested.top1_random) == (predicted.top1, random.top1)
    assert tested.tested == predicted.images == 100
    assert tested.chance == 0.1
    jax.tree.map(np.testing.assert_array_equal, prediction.variables["params"], params)
    assert prediction.parameters == sum(p.size for p in jax.tree.leaves(params))
    assert prediction.left == 0
    assert 0 < prediction.seconds < 5  # without compiling


def test_classes_are_those_that_the_network_gives(page, prediction):
    images = page.images
    x = (images.pixels[:64] / 255 - images.mean) / images.std
    with unit_by_unit():
        logits = build_network(SMALL, 10, 16).apply(prediction.variables, x.astype(np.float32))
    tested = prediction.trial
    assert tested.classes == [f"<{i}>" for i in logits.argmax(1)[:10]]
    assert tested.labels == [f"<{i}>" for i in images.labels[:10]]
    np.testing.assert_array_equal(tested.images, images.pixels[:10])
    assert len(set(tested.classes)) > 1


def test_few_batches_of_many_images_are_tested(page, monkeypatch):
    monkeypatch.setattr(trial, "MOST_BATCHES", 1)
    network = build_network(SMALL, 10, 16)
    params = random_parameters(network, 16, seed=0)
    run = logits_of(network, page.engine, 64)
    assert trial.Tester(page.images).test(network, run, params).tested == 64


def test_a_model_of_the_zoo(page):
    prediction = page.predict("squeezenet1_1", "squeezenet1_1")
    again = page.predict("squeezenet1_1", "squeezenet1_1")
    assert again.network is prediction.network  # hence compiled and traced once
    params = jax.tree.leaves(abstract_variables(prediction.network)["params"])
    assert prediction.parameters == sum(p.size for p in params)
    assert prediction.architecture is None
    assert prediction.trial.images.shape == (10, 32, 32, 3)  # smaller ones are not for it
    assert len(prediction.graph) > 26  # convolutions
    assert results.first_filters(prediction).shape == (64, 3, 3, 3)
    assert "First layer: 64 filters of 3×3" in results.results(prediction)


def test_what_cannot_be_predicted_is_said(page, monkeypatch):
    with pytest.raises(ValueError, match="there is no model 'resnet7'; allowed: resnet18, "):
        page.predict("a", "resnet7")
    nothing = (("none", 0), ("none", 1))
    with pytest.raises(ValueError, match="no path"):
        page.predict("a", SMALL.replace(genotype=Genotype(nothing, (2,), nothing, (2,))))
    monkeypatch.setattr(networks, "MAX_PARAMETERS", 999)
    with pytest.raises(ValueError, match=r"has \d+,\d+ parameters; allowed here: 999. Use fewer"):
        page.predict("a", SMALL)


def test_a_seed_gives_an_architecture_of_the_rules(page):
    assert page.sample(3) == page.sample(3) != page.sample(4)
    assert page.sample(3) == sample_architecture("test", 3, 0, rules=RULES_)
    with pytest.raises(ValueError, match="seed"):
        page.sample(-1)


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [Architecture(DARTS, 8), evaluation_set("dense")[3], SMALL])
def test_an_architecture_is_edited_as_text(arch):
    text = networks.as_text(arch)
    assert networks.from_text(text) == arch
    # An edge is a line, and so is a field.
    genotype = arch.genotype
    assert len(text.splitlines()) == len(genotype.normal) + len(genotype.reduce) + 21
    edited = text.replace(f'"n_cells": {arch.n_cells}', '"n_cells": 5')
    assert networks.from_text(edited) == arch.replace(n_cells=5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"C": 8,', '"C": 8', "this is not JSON: Expecting ',' delimiter: line 16 "),
        ('"C": 8', '"c": 8', "there is no field 'c' in an architecture; allowed: genotype, "),
        ('"C": 8', '"C": 7', "'C' is 7; allowed: even numbers"),
        ('"n_cells": 2', '"n_cells": "two"', "'n_cells' is 'two'; allowed: an integer, 1 to"),
        ('"conv_1x1"', '"conv_2x2"', "names the operation 'conv_2x2'; allowed: none, "),
        ('["conv_1x1", 0]', '["conv_1x1", 4]', r"'genotype.normal\[0\]' is 4; allowed: 0 to 1"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(old, new, message):
    text = networks.as_text(SMALL)
    assert old in text
    with pytest.raises(ValueError, match=message):
        networks.from_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match="given as list"):
        networks.from_text("[]")


def test_networks_of_evaluation_splits():
    assert networks.of_split("deep", 99, 16) == evaluation_set("deep")[99]
    with pytest.raises(ValueError, match="is 100; deep has 0 to 99"):
        networks.of_split("deep", 100, 16)
    with pytest.raises(ValueError, match="is -1; deep has 0 to 99"):
        networks.of_split("deep", -1, 16)
    with pytest.raises(ValueError, match="split is 'train'; allowed: val, test, "):
        networks.of_split("train", 0, 16)


def test_the_largest_network_of_the_splits_is_not_too_large():
    for split in ("wide", "deep", "dense"):
        for arch in evaluation_set(split)[::10]:
            networks.check_size(arch, Task())


# --- What is shown --------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.pictures, self.said, self.links = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag == "img":
            head, _, data = found["src"].partition(",")
            assert head == "data:image/png;base64"
            self.pictures[found["alt"]] = Image.open(io.BytesIO(base64.b64decode(data)))

    def handle_data(self, data):
        self.said.append(data)


def test_the_results(prediction):
    text = results.results(prediction)
    page = _Page(text)
    assert "a <small> network" in page.said
    assert "<small>" not in text
    assert "<3>" not in text
    assert "&lt;3&gt;" in text
    tested = prediction.trial
    for said in (f"{tested.top1:.1%}", f"{tested.top1_random:.1%}", "10.0%",
                 f"{prediction.parameters:,}", str(len(prediction.graph)),
                 "accuracy on 100 test images"):  # fmt: skip
        assert said in page.said
    assert all(link.startswith("data:") for link in page.links)
    shown = [p for alt, p in page.pictures.items() if alt.startswith("test image of class ")]
    np.testing.assert_array_equal(np.asarray(shown[3]), tested.images[3])
    assert [alt for alt in page.pictures if alt.startswith("filter")] == [
        f"filter {i}"
        for i in range(24)  # 3 C, as in DARTS
    ]
    assert page.pictures["legend"].width > 200
    assert page.pictures[f"graph of {len(prediction.graph)} nodes"].height > 300
    assert page.pictures[f"histogram of {prediction.parameters} parameters"].width > 300
    right = sum(a == b for a, b in zip(tested.labels, tested.classes, strict=True))
    assert sum(said.startswith("✓") for said in page.said) == right
    assert sum(said.startswith("✗") for said in page.said) == 10 - right


def test_logits_that_are_not_finite_are_no_class(prediction):
    none = dataclasses.replace(prediction.trial, classes=[None] * 10)
    text = results.results(dataclasses.replace(prediction, trial=none))
    assert text.count("✗ none, is ") == 10


def test_parameters_that_are_left_are_counted(prediction):
    assert "initial values" not in results.results(prediction)
    left = results.results(dataclasses.replace(prediction, left=1234))
    assert "1,234 parameters stay at their initial values" in left


def test_filters_are_the_first_kernels(prediction):
    filters = results.first_filters(prediction)
    kernel = np.asarray(prediction.variables["params"]["stem_0"]["kernel"])
    for out, shown in enumerate(filters):
        own = kernel[..., out]
        np.testing.assert_allclose(shown, (own - own.min()) / np.ptp(own), atol=1e-6)
    name = next(iter(prediction.arrays))
    flat = {**prediction.arrays, name: np.ones_like(prediction.arrays[name])}
    gray = results.first_filters(dataclasses.replace(prediction, arrays=flat))
    np.testing.assert_array_equal(gray, 0.5)
    without = dataclasses.replace(prediction, arrays={"a": np.ones((4, 4))})
    assert results.first_filters(without) is None
    assert "First layer" not in results.results(without)


def test_the_histogram_counts_every_parameter(prediction):
    figure = results.histogram(prediction)
    (axes,) = figure.axes
    counts = [steps.get_data().values.sum() for steps in axes.patches]
    leaves = jax.tree.leaves(prediction.variables["params"])
    weights = sum(leaf.size for leaf in leaves if leaf.ndim > 1)
    assert counts == [weights, prediction.parameters - weights]
    figure.draw_without_rendering()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"weights ({counts[0]:,})", f"norms and biases ({counts[1]:,})"]


def test_the_histogram_of_equal_and_of_infinite_values(prediction):
    for value in (0.0, np.inf, np.nan):
        arrays = {"a.weight": np.full((3, 3), value, np.float32)}
        results.histogram(dataclasses.replace(prediction, arrays=arrays)).draw_without_rendering()


def test_messages_are_text():
    assert "&lt;script&gt;" in results.message(ValueError("<script>"))


# --- Downloads ------------------------------------------------------------------------------------


def test_downloads_are_the_parameters(prediction, tmp_path):
    flax, torch = write_downloads(prediction, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a_small_network.pt",
        "a_small_network.zip",
    ]
    with zipfile.ZipFile(flax) as archive:
        archive.extractall(tmp_path / "out")
    folder = tmp_path / "out" / "a_small_network"
    arch = Architecture.from_dict(json.loads((folder / "architecture.json").read_text()))
    assert arch == SMALL
    like = abstract_params(prediction.graph)
    params = Checkpoints(folder / "weights").load(params=like)[2]["params"]
    jax.tree.map(np.testing.assert_array_equal, params, prediction.variables["params"])
    arrays = read_torch(torch)
    assert list(arrays) == list(prediction.arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, prediction.arrays[name])


# --- Hypernetworks --------------------------------------------------------------------------------


def test_a_run_says_what_it_was_trained_on(page, tmp_path):
    config = preset("demo").replace(image_size=20)
    run = Checkpoints(tmp_path / "run")
    run.write_config(SMALL_GHN, training=config.describe(), image_size=20)
    run.save(0, 0, params=page.variables["params"])
    found = predictor.open_predictor(str(tmp_path / "run"), None, None)
    found.engine.programs.close()
    assert (found.images.name, found.images.split, found.images.image_size) == (
        "digits",
        "test",
        20,
    )
    rules = config.space.rules(20)
    assert found.sample(1) == sample_architecture("test", 1, 0, rules=rules)
    assert found.sample(1).n_cells in (3, 4)


def test_hypernetworks_that_do_not_fit_are_refused(page, tmp_path):
    save_ghn(tmp_path / "ghn", SMALL_GHN, page.variables)
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), np.uint8), labels=np.arange(30) % 3)
    with pytest.raises(ValueError, match="does not say what it was trained on; give --dataset"):
        predictor.open_predictor(str(tmp_path / "ghn"), None, None)
    with pytest.raises(ValueError, match="has 3 classes, but .* for 10; give the dataset"):
        predictor.open_predictor(str(tmp_path / "ghn"), f"npz:{tmp_path / 'a.npz'}", None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        predictor.open_predictor(str(tmp_path / "nothing"), "digits", None)


# --- The page itself ------------------------------------------------------------------------------


@pytest.fixture
def handlers(page, tmp_path):
    pytest.importorskip("gradio")
    from ghn_jax.web.page import _Handlers

    return _Handlers(page, tmp_path)


def test_the_page_is_built(page, tmp_path):
    pytest.importorskip("gradio")
    from ghn_jax.web.page import build

    async def built():  # Gradio leaves event loops open that it finds none running
        return build(page, tmp_path, "mine").get_config_file()

    config = asyncio.run(built())
    labels = {c["props"].get("label") for c in config["components"]}
    assert {"Seed", "Split", "Number", "Model", "Cells", "Channels"} <= labels
    assert not config["analytics_enabled"]


def test_handlers(handlers, tmp_path):
    """The fields of a network, its text, sliders, prediction, and files."""
    from ghn_jax.web.page import PLACEHOLDER, SAMPLED, SPLIT, ZOO

    sampled, chosen = (SAMPLED, 1, "test", 0, "resnet18"), (SPLIT, 1, "deep", 7, "resnet18")
    *fields, cells, width, text, problem = handlers.choose(*chosen)
    assert [field["visible"] for field in fields] == [False, True, False]
    assert networks.from_text(text["value"]) == evaluation_set("deep")[7]
    assert problem == ""
    assert [update["visible"] for update in handlers.choose(ZOO, *chosen[1:])[:-1]] == [
        False, False, True, False, False, False
    ]  # fmt: skip
    assert "deep has 0 to 99" in handlers.choose(SPLIT, 1, "deep", 100, "resnet18")[-1]
    assert "the seed is empty" in handlers.choose(SAMPLED, None, "deep", 0, "resnet18")[-1]

    small = networks.as_text(SMALL)
    cells, width, problem = handlers.edited(networks.as_text(SMALL.replace(C=1024)))
    assert (cells["value"], width["value"], width["maximum"], problem) == (2, 1024, 1024, "")
    assert "this is not JSON" in handlers.edited("{")[-1]
    text, problem = handlers.resized(small, 5, 16)
    assert networks.from_text(text) == SMALL.replace(n_cells=5, C=16)
    vit = Architecture(VIT, 4, C=16, C_mult=1, preproc=False)
    assert "multiples of 8" in handlers.resized(networks.as_text(vit), 4, 20)[-1]

    shown, flax, torch, problem = handlers.predict(*sampled, small)
    assert "sampled 1, edited" in shown
    assert problem == ""
    assert flax["interactive"] and torch["interactive"]
    before = [flax["value"], torch["value"]]
    assert (
        "sampled 1<"
        in handlers.predict(*sampled, networks.as_text(handlers.predictor.sample(1)))[0]
    )
    kept = {str(path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(kept) == 2 and not kept & {*before}
    shown, flax, torch, problem = handlers.predict(*sampled, small.replace("8", "7"))
    assert (shown, flax["interactive"], flax["value"]) == (PLACEHOLDER, False, None)
    assert "allowed: even numbers" in problem


def test_a_taken_port_is_said_before_anything_is_read():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"at 127.0.0.1:{port}: Address already in use"):
            web.main(["--ghn", "nowhere", "--port", str(port)])
