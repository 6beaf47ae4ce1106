"""All experiments as one page: what is on it, and what happens where one fails."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ghn_jax.cli import paper
from ghn_jax.deepnets1m.task import Task
from ghn_jax.evaluation.experiments import gallery
from ghn_jax.evaluation.experiments.gallery import EXHIBITS, STATISTICS, Config


def test_every_experiment_of_the_paper_is_on_the_page():
    names = [exhibit.name for exhibit in EXHIBITS]
    assert len(set(names)) == len(names)
    assert set(names) == {STATISTICS, *paper.EXPERIMENTS} - {"all", "nasbench201"}


@pytest.mark.parametrize("exhibit", [e for e in EXHIBITS if e.name != STATISTICS],
                         ids=lambda e: e.name)  # fmt: skip
def test_options_are_those_of_the_experiment(exhibit, monkeypatch, tmp_path):
    """Each gets its quick form, the hypernetworks, and the networks that were trained before."""
    module, ran = gallery._experiment(exhibit.name), []
    monkeypatch.setattr(module, "run", ran.append)
    ghns = Path("GHN-2"), Path("GHN-1"), Path("MLP")
    gallery._make(exhibit, Config(quick=True, out=tmp_path), ghns)
    (config,) = ran
    quick = module.quick()
    assert config.out == tmp_path / exhibit.name
    if hasattr(config, "ghn"):
        some = ghns[:1] if exhibit.name == "detection" else ghns
        assert config.ghn == (some if isinstance(quick.ghn, tuple) else ghns[0])
    for option in ("trained", "fit"):
        given = getattr(config, option, None)
        if exhibit.trained == option:
            assert given in (tmp_path / "trained-networks", (tmp_path / "trained-networks",))
    same = {"out", "ghn", "keep_parameters", exhibit.trained, *exhibit.options}
    for field in dataclasses.fields(config):
        if field.name not in same:
            assert getattr(config, field.name) == getattr(quick, field.name)


def test_the_three_hypernetworks():
    made = {name: gallery._training(name, Config()).ghn(Task(image_size=16))
            for name in gallery.HYPERNETWORKS}  # fmt: skip
    assert made["GHN-2"].virtual_edges == 50
    assert (made["GHN-1"].virtual_edges, made["GHN-1"].normalise) == (1, False)
    assert made["MLP"].encoder == "mlp"


def experiment(name: str):
    """One that writes a table and a picture, and one that fails."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        ghn: tuple[Path, ...] = ()
        out: Path = Path()

    def run(config):
        if name == "search":
            raise ValueError("there is <nothing> to search")
        config.out.mkdir()
        (config.out / "table.md").write_text("| a | b |\n|---|---|\n| 1 | 2 |\n")
        (config.out / "a_picture.png").write_bytes(b"")

    return SimpleNamespace(Config=Options, quick=Options, run=run)


def test_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "_experiment", experiment)
    some = [e for e in EXHIBITS if e.name in ("few-shot", "search")]
    some = [dataclasses.replace(e, trained="") for e in some]
    monkeypatch.setattr(gallery, "EXHIBITS", some)
    config = Config(quick=True, ghn=(Path("runs/mine"),), out=tmp_path / "page")
    with pytest.raises(SystemExit, match="failed: search; the page says why"):
        gallery.run(config, report=lambda text: None)
    page = (tmp_path / "page" / "index.html").read_text()
    assert re.search(r"<td>1</td>\s*<td>2</td>", page)
    for picture in re.findall(r'src="([^"]+)"', page):
        assert (tmp_path / "page" / picture).exists()
    assert 'src="few-shot/a_picture.png"' in page
    assert "there is &lt;nothing&gt; to search" in page
    for exhibit in some:
        assert f'href="#{exhibit.name}"' in page
        assert f'id="{exhibit.name}"' in page


def test_what_was_made_before_stays_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "_experiment", experiment)
    names = ("few-shot", "activations")
    some = [dataclasses.replace(e, trained="") for e in EXHIBITS if e.name in names]
    monkeypatch.setattr(gallery, "EXHIBITS", some)
    config = Config(quick=True, ghn=(Path("runs/mine"),), out=tmp_path / "page")
    for name in ("activations", "few-shot"):
        gallery.run(dataclasses.replace(config, only=(name,)), report=lambda text: None)
    page = (tmp_path / "page" / "index.html").read_text()
    assert re.findall(r'<h2 id="([^"]+)"', page) == [e.name for e in some]


def test_what_cannot_work(tmp_path):
    with pytest.raises(ValueError, match="months; use `ghn-paper all --quick`"):
        gallery.run(Config(out=tmp_path / "no"))
    with pytest.raises(ValueError, match="--only has 'fig1'; allowed: splits, predicted-networks"):
        gallery.run(Config(quick=True, only=("fig1",), out=tmp_path / "no"))
    assert not (tmp_path / "no").exists()
