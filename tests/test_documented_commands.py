"""Commands that the documentation and docstrings tell people to type: each is understood."""

import ast
import contextlib
import functools
import importlib
import io
import re
import tomllib
from pathlib import Path

import pytest

from ghn_jax.cli import paper

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SUBCOMMANDS = {
    "ghn-paper": tuple(paper.EXPERIMENTS),
    "ghn-deepnets1m": ("stats", "export", "unique", "freeze"),
    "ghn-convert": ("ghn", "network"),
}
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("ghn_jax/**/*.py")]


def commands() -> set[str]:
    """In code of pages and in examples of docstrings, without comments and line breaks."""
    found = set()
    for page in PAGES:
        text = re.sub(r"\\+\n\s*", "", page.read_text())
        if page.suffix == ".md":
            # A table's rows end in more columns, but no command of theirs holds a backtick.
            spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"`(ghn-[^`]*)`", text)]
            blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
            found |= {*spans, *(line for block in blocks for line in block.splitlines())}
        else:
            found |= set(re.findall(r"^    (ghn-.*)$", text, re.M))
    return {re.sub(r"\s+#.*", "", command) for command in found if command.startswith("ghn-")}


@functools.cache
def explained(program: str, subcommand: str) -> str:
    """The help of a command."""
    module = importlib.import_module(SCRIPTS[program].partition(":")[0])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        module.main([*filter(None, [subcommand]), "--help"])
    assert ended.value.code == 0
    return shown.getvalue()


def understood(command: str) -> bool:
    program, *words = command.split()
    if program not in SCRIPTS:
        return False
    subcommand = ""
    if words and program in SUBCOMMANDS and not words[0].startswith(("-", "[", "NAME")):
        subcommand = words.pop(0)
        if subcommand not in SUBCOMMANDS[program]:
            return False
    options = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
    shown = explained(program, subcommand) + "--help"
    return all(re.search(rf"{option}\b(?!-)", shown) for option in options)


def test_commands_are_understood():
    found = commands()
    assert len(found) > 60
    assert {c.split()[0] for c in found} == set(SCRIPTS)
    assert sorted(c for c in found if not understood(c)) == []


def test_every_experiment_is_in_the_table_of_the_paper():
    page = (ROOT / "docs" / "paper.md").read_text()
    named = set(re.findall(r"`ghn-paper ([a-z0-9-]+)", page))
    assert named == {*paper.EXPERIMENTS} - {"all"}


def unexplained(file: Path) -> set[str]:
    """Options of a file's configuration that have no comment; tyro shows one as their help."""
    text, found = file.read_text(), set()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef) and (
            node.name.endswith("Config") or file.stem == "recipe"
        ):
            for field in node.body:
                groups = isinstance(field, ast.AnnAssign) and ast.unparse(field.annotation)
                if not groups or groups.endswith("Config") or groups == "Recipe":
                    continue
                line, above = lines[field.end_lineno - 1], lines[field.lineno - 2].strip()
                if "#" not in line and not above.startswith("#"):
                    found.add(ast.unparse(field.target))
    return found


def test_every_option_is_explained(tmp_path):
    (tmp_path / "a.py").write_text("class Config:\n    a: int = 1\n    b: int = 2  # so many\n")
    assert unexplained(tmp_path / "a.py") == {"a"}
    files = [
        *ROOT.glob("ghn_jax/cli/*.py"),
        *ROOT.glob("ghn_jax/evaluation/experiments/*.py"),
        ROOT / "ghn_jax/training/config.py",
        ROOT / "ghn_jax/evaluation/recipe.py",
    ]
    found = {file.name: unexplained(file) for file in files}
    assert not any(found.values()), found
