"""The web page in a browser, from the choice of a network to the downloads: `make test-browser`."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile

import pytest

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.torch_file import read_torch
from ghn_jax.interop.torch_network import abstract_params, to_torch
from ghn_jax.training.config import preset

webdriver = pytest.importorskip("selenium.webdriver")
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

pytestmark = pytest.mark.browser

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--window-size=1400,1000")  # fmt: skip
LONGEST = 120  # seconds for anything that is waited for
PORTS = 7871, 7872


def wait_until(check):
    """What `check` returns as soon as it is true."""
    deadline = time.monotonic() + LONGEST
    while not (found := check()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def serving(folder, ghn, port, *options):
    """The program, with its files in a folder that is new; gives the page's address."""
    address = f"http://127.0.0.1:{port}/"
    (folder / "tmp").mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "ghn_jax.cli.web", "--ghn", str(ghn), "--port", str(port),
         "--cache-dir", str(folder / "cache"), *options],
        env={**os.environ, "TMPDIR": str(folder / "tmp"), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip

    def answers():
        assert process.poll() is None, "the program has ended"
        try:
            return urllib.request.urlopen(address, timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(answers)
        yield address
        assert any((folder / "tmp").iterdir())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert [*(folder / "tmp").iterdir()] == []


@contextlib.contextmanager
def chromium(folder, address):
    """A browser that shows a page, with its files in a folder that is new."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    for flag in (*FLAGS, f"--user-data-dir={folder / 'user'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    driver.address, driver.downloads = address, downloads
    try:
        driver.get(address)
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """The page of a hypernetwork that is not trained."""
    folder = tmp_path_factory.mktemp("browser")
    ghn = GHN(max_shape=(8, 8, 7, 7))
    run = Checkpoints(folder / "ghn")
    run.write_config(ghn, training=preset("demo").describe())
    run.save(0, 0, params=ghn.init_variables(0)["params"])
    with (
        serving(folder / "server", folder / "ghn", PORTS[0]) as address,
        chromium(folder / "chromium", address) as driver,
    ):
        yield driver


def one(browser, css):
    """The element of a selector, as soon as it is there and shown."""

    def shown():
        return [e for e in browser.find_elements("css selector", css) if e.is_displayed()]

    return wait_until(shown)[0]


def said(browser, css):
    return "".join(e.text for e in browser.find_elements("css selector", css))


def downloaded(browser, button, suffix):
    one(browser, f"#{button}").click()

    def whole():
        return [p for p in browser.downloads.iterdir() if p.suffix == suffix]

    return wait_until(whole)[0]


def write(field, text):
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def test_a_network_is_predicted_shown_and_downloaded(browser):
    one(browser, "#predict").click()
    facts = wait_until(lambda: said(browser, "#results .facts"))
    assert "accuracy on 382 test images" in facts
    assert facts.count("%") == 3
    widths = browser.execute_script(
        "return [...document.querySelectorAll('#results img')].map(i => [i.alt, i.naturalWidth])"
    )
    kinds = {alt.split()[0] for alt, _ in widths}
    assert kinds == {"test", "filter", "graph", "legend", "histogram"}
    assert all(width > 0 for _, width in widths)

    with zipfile.ZipFile(downloaded(browser, "flax", ".zip")) as archive:
        archive.extractall(browser.downloads)
    folder = browser.downloads / "sampled_0"
    arch = Architecture.from_dict(json.loads((folder / "architecture.json").read_text()))
    graph = build_graph(arch, 1, image_size=16)
    like = abstract_params(graph)
    params = Checkpoints(folder / "weights").load(params=like)[2]["params"]
    arrays = read_torch(downloaded(browser, "torch", ".pt"))
    expected = to_torch(params, graph)
    assert set(arrays) == set(expected)
    assert all((arrays[name] == expected[name]).all() for name in expected)


def test_another_network_is_chosen_and_edited(browser):
    """By its number, by the sliders' numbers, and by its text."""
    arch = evaluation_set("test")[3]
    one(browser, "#source input[value='evaluation split']").click()
    write(one(browser, "#index input"), "3")
    cells, channels = (
        one(browser, f"#{name} input[type=number]") for name in ("cells", "channels")
    )
    wait_until(lambda: cells.get_attribute("value") == str(arch.n_cells))
    assert channels.get_attribute("value") == str(arch.C)
    write(cells, "2\t")
    write(channels, "8\t")
    wait_until(lambda: all(f in said(browser, "#architecture") for f in ('"n_cells": 2', '"C": 8')))
    one(browser, "#predict").click()
    wait_until(lambda: said(browser, "#results h3").startswith("test 3, edited"))
    assert said(browser, "#problem") == ""

    one(browser, "#architecture .cm-content").click()
    keys = ActionChains(browser)
    keys.key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys(
        "n_cells = 3"
    ).perform()
    assert "this is not JSON" in wait_until(lambda: said(browser, "#problem [role=alert]"))
    one(browser, "#predict").click()
    wait_until(lambda: "press Predict" in said(browser, "#results"))
    assert "this is not JSON" in said(browser, "#problem [role=alert]")
    assert not one(browser, "#flax").is_enabled()


def test_nothing_comes_from_elsewhere(browser):
    """Of all that the browser has asked for."""
    asked = browser.execute_script("return performance.getEntries().map(e => e.name)")
    addresses = [name for name in asked if "://" in name]
    assert len(addresses) > 10
    assert [name for name in addresses if not name.startswith(browser.address)] == []
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def accuracies(browser, title):
    """Accuracies in per cent, predicted and random, as soon as a network's results are shown."""
    wait_until(lambda: said(browser, "#results h3").startswith(title))
    facts = said(browser, "#results .facts")
    assert "accuracy on 512 test images" in facts
    return [float(number) for number in re.findall(r"([\d.]+)%", facts)][:2]


def test_the_hypernetwork_that_comes_with_the_package(tmp_path, shared):
    """By its name, on real photographs: networks that nobody trained see what is on them."""
    data = ("--data-dir", str(shared / "tfds"))
    with (
        serving(tmp_path / "server", "ghn2-cifar10-small", PORTS[1], *data) as address,
        chromium(tmp_path / "chromium", address) as browser,
    ):
        one(browser, "#predict").click()
        predicted, random = accuracies(browser, "sampled 0")
        assert predicted > 25 and random < 20
        one(browser, "#source input[value='model of the zoo']").click()
        one(browser, "#model")
        one(browser, "#predict").click()
        predicted, random = accuracies(browser, "resnet18")
        assert predicted > 38 and random < 20
        assert set(read_torch(downloaded(browser, "torch", ".pt"))) >= {"conv1.weight", "fc.bias"}
