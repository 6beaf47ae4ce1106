"""Notebooks: `make docs` executes them and shows their outputs; here is what it relies on."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_in_the_site_and_has_no_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), "clear the outputs before committing"
    assert f"notebooks/{path.name}" in (ROOT / "mkdocs.yml").read_text()
    assert "execute: true" in (ROOT / "mkdocs.yml").read_text()


def test_there_are_notebooks():
    assert NOTEBOOKS
