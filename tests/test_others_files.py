"""No file is removed or written over that this program did not write."""

import ast
from pathlib import Path

import numpy as np
import pytest

import ghn_jax
from ghn_jax.cli import train
from ghn_jax.evaluation.experiments import gallery
from ghn_jax.evaluation.experiments.records import Records
from ghn_jax.hypernet.checkpoint import Checkpoints

# Every file of the package that removes or renames something, and what.
REMOVES = {
    "files/replace.py": "a file of a random name, which it wrote beside another",
    "engine/program_digests.py": "programs that are listed, and those that JAX did not finish",
    "evaluation/experiments/saved_state.py": "the state of a network that is trained",
    "training/run_folder.py": "who owned the lock",
    "web/downloads.py": "what it has put into an archive, in a temporary folder",
    "web/page.py": "the last network's files, in a temporary folder",
}
REMOVING = {"unlink", "rmtree", "rmdir", "removedirs"}
ALSO = {"remove", "rename", "replace"}  # of paths; strings, lists and records have them, too
PATHS = {"path", "file", "folder", "beside", "owner", "part", "target", "source", "os", "shutil"}


def removals(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, ast.unparse(node.func.value)
            if name in REMOVING or (name in ALSO and of.split(".")[-1] in PATHS):
                found.append(f"{of}.{name}")
    return found


def test_files_are_removed_in_known_places_only():
    root = Path(ghn_jax.__file__).parent
    found = {str(p.relative_to(root)): removals(p) for p in root.rglob("*.py")}
    found = {name: calls for name, calls in found.items() if calls}
    assert set(found) == set(REMOVES), found


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/7/thesis.txt"])
@pytest.mark.parametrize("more", [(), ("--resume", "auto")])
def test_a_folder_of_another_program_is_not_trained_in(name, more, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"model": "of another program"}\n')
    before = files(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train.main(["--preset", "demo", "--out", str(tmp_path), *more])
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before


def test_results_of_another_program_are_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "_hypernetworks", lambda config: pytest.fail("it goes on"))
    (tmp_path / "table.md").write_text("prices")
    with pytest.raises(ValueError, match=r"holds table\.md, but no settings\.json of an exper"):
        Records.open(tmp_path, {"seed": 1})
    (tmp_path / "index.html").write_text("<title>home</title>")
    with pytest.raises(ValueError, match=r"index\.html is another page; give another --out"):
        gallery.run(gallery.Config(out=tmp_path, quick=True))
    assert {p.name for p in tmp_path.iterdir()} == {"table.md", "index.html"}


def test_old_checkpoints_go_and_nothing_beside_them(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, 0, params={"a": np.zeros(3)})
    theirs = [tmp_path / "notes.md", tmp_path / "checkpoints" / "notes.md",
              tmp_path / "checkpoints" / "mine" / "notes.md"]  # fmt: skip
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for step in (1, 2, 3):
        checkpoints.save(step, step, params={"a": np.zeros(3)})
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "3", "mine", "notes.md"}
    assert all(path.read_text() == "mine" for path in theirs)
