"""What an experiment found so far: a folder of JSON Lines, one record for each network.

    records = Records.open("runs/sgd", settings)
    for name in todo:
        if name not in records:
            records.add({"name": name, ...})

A record that is written stays: a run that is repeated computes what is missing. Processes that
share a folder write files of their own, `records-<unit>.jsonl`; all of them are read. Records know
hypernetworks and trained networks by their names; `parameters.json` says what parameters each name
stands for.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from ghn_jax.files.digest import DIGEST, digest_of_arrays, with_digest, without_digest
from ghn_jax.files.json_file import parse_json, read_json
from ghn_jax.files.replace import append, write_beside
from ghn_jax.files.tensors import read_tensors
from ghn_jax.hypernet.checkpoint import UNTRAINED
from ghn_jax.hypernet.ghn import GHN

TABLE = "table.md"  # of an experiment
_SETTINGS = "settings.json"
_PARAMETERS = "parameters.json"
_RECORDS = re.compile(r"records.*\.jsonl")


def describe(experiment: str, config: Any, *, without: Collection[str]) -> dict[str, Any]:
    """What records depend on, JSON-ready: the options of an experiment, but for some."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in without}
    return json.loads(json.dumps({"experiment": experiment, **options}, default=str))


def check_settings(
    now: Mapping[str, Any], before: Mapping[str, Any], where: str | Path, place: str
) -> None:
    """Raises ValueError where there are results of other settings.

    Args:
      now, before: of the results that are wanted, and that there are.
      where: the latter are.
      place: another one that may be given, such as 'another folder'.
    """
    other = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
    if other:
        changes = ", ".join(f"{k} {before.get(k)!r} (now {now.get(k)!r})" for k in other)
        raise ValueError(f"{where} has records with {changes}; give the same options, or {place}")


def _check_parameters(
    folder: Path, ghns: Mapping[str, tuple[GHN, dict]], trained: Mapping[str, Path]
) -> None:
    """Notes what parameters names stand for; raises ValueError where one stood for others.

    Args:
      folder: of records.
      ghns: name -> a hypernetwork and its variables, as of `load_ghns`.
      trained: name -> a file of a trained network's parameters.
    """
    path, known = folder / _PARAMETERS, {}
    if path.exists():
        known = read_json(path, "restore it, or give another folder")
        if not isinstance(known, dict):
            raise ValueError(f"{path} names no parameters; restore it, or give another folder")
        known = without_digest(known, path)
    now = {
        name: digest_of_arrays(jax.tree.leaves(variables), "")
        for name, (_, variables) in ghns.items()
        if name != UNTRAINED  # always the same, but for rounding on another machine
    }
    for name, file in trained.items():
        now[name] = digest_of_arrays(jax.tree.leaves(read_tensors(file)[0]), "")
    changed = [repr(name) for name in now if known.get(name, now[name]) != now[name]]
    if changed:
        raise ValueError(f"{folder} was begun with other parameters of {', '.join(changed)}: they "
                         "were trained on, or replaced; give another folder")  # fmt: skip
    if now.keys() - known.keys():
        write_beside(path, json.dumps(with_digest({**known, **now}), indent=1) + "\n")


def _complete(path: Path, *, signed: bool) -> list[dict]:
    """The records of a file; a last line that was cut off is not one.

    Args:
      path: of the file.
      signed: whether all of them have a digest.
    """
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        where, advice = f"{path}, line {number}", "remove the line: its network is computed again"
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):  # no newline behind it: the process ended while it wrote
                continue
            raise ValueError(f"{where}, is damaged ({error}); {advice}") from error
        if not isinstance(record, dict) or "name" not in record:
            raise ValueError(f"{where}, is no record: it has no 'name'; {advice}")
        if signed and DIGEST not in record:
            raise ValueError(f"{where}, is damaged: it has no digest; {advice}")
        records.append(without_digest(record, f"{where} ({advice})"))
    return records


class Records(Mapping[str, dict]):
    """Records by name; see the module's docstring.

    Args:
      path: the file that new ones go to.
      found: those of all files.
    """

    def __init__(self, path: Path, found: dict[str, dict]):
        self.path, self._found = path, found

    @classmethod
    def open(
        cls,
        folder: str | Path,
        settings: Mapping[str, Any],
        unit: str = "",
        *,
        ghns: Mapping[str, tuple[GHN, dict]] | None = None,
        trained: Mapping[str, Path] | None = None,
    ) -> Records:
        """Opens a folder, or makes it.

        Args:
          folder: of the experiment's results.
          settings: JSON-ready; what its records depend on. Kept in `settings.json`.
          unit: of a process that shares the folder with others.
          ghns: hypernetworks that records name, as of `load_ghns`.
          trained: files of trained networks' parameters, by the names that records have for them.

        Raises:
          ValueError: the folder has records of other settings, of a hypernetwork or a network
            whose parameters were others, or a damaged one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))
        path = folder / _SETTINGS
        if path.exists():
            before = read_json(path, "restore it, or give another folder")
            if not isinstance(before, dict):
                raise ValueError(f"{path} holds no settings; restore it, or give another folder")
            check_settings(settings, without_digest(before, path), folder, "another folder")
        else:
            theirs = [p.name for p in folder.iterdir() if p.name == TABLE or _RECORDS.match(p.name)]
            if theirs:
                raise ValueError(f"{folder} holds {', '.join(theirs)}, but no {_SETTINGS} of an "
                                 "experiment; give another folder")  # fmt: skip
            write_beside(path, json.dumps(with_digest(settings), indent=1) + "\n")
        _check_parameters(folder, ghns or {}, trained or {})
        path = folder / (f"records-{unit}.jsonl" if unit else "records.jsonl")
        if path.exists():  # a last line that was cut off would spoil the next one
            content = path.read_bytes()
            if content and not content.endswith(b"\n"):
                write_beside(path, content[: content.rfind(b"\n") + 1])
        return cls(path, read_records(folder))

    def add(self, record: dict) -> None:
        """Writes a record, at once and to the disk.

        Raises:
          OSError: it could not be written; those before it are as they were.
        """
        line = json.dumps(with_digest(record)) + "\n"
        append(self.path, line)
        self._found[record["name"]] = record

    def __getitem__(self, name: str) -> dict:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def read_records(folder: str | Path) -> dict[str, dict]:
    """The records of a folder by name, in the order of the files.

    Raises:
      ValueError: a line is damaged.
    """
    folder = Path(folder)
    # Folders of before have no digests, nor have their first records.
    settings = folder / _SETTINGS
    signed = settings.exists() and f'"{DIGEST}"'.encode() in settings.read_bytes()
    return {
        record["name"]: record
        for path in sorted(folder.glob("records*.jsonl"))
        for record in _complete(path, signed=signed)
    }


def count_records(folder: str | Path) -> int:
    """How many records a folder has, without reading what is in them."""
    return sum(path.read_bytes().count(b"\n") for path in Path(folder).glob("records*.jsonl"))
