"""One run, one folder: who writes to it, and with which options it goes on.

A lock says which process a folder belongs to; the system takes it from a process that has died.
`config.json` says what the run was started with: what decides on the result stays so.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from ghn_jax.files.replace import write_beside
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.training.config import TrainConfig

_LOCK = "run.lock"

# Options that may change when a run goes on: where and how long it runs, not what comes out.
_FREE = {
    "data_dir", "epochs", "steps", "init", "out", "resume", "override", "replay", "save_every",
    "save_minutes", "validate_every", "validate_nets", "tensorboard", "workers", "mesh",
    "coordinator", "process_id", "num_processes", "cache_dir",
}  # fmt: skip


# What a run writes over or takes away: a folder with one of them and no run is somebody's.
_WRITTEN = ("config.json", "metrics.jsonl", "bad_updates.jsonl", "checkpoints")


def check_not_anothers(folder: Path) -> None:
    """Raises ValueError for a folder of something else, whose files a run would write over."""
    there = [name for name in _WRITTEN if (folder / name).exists()]
    if not there:
        return
    try:
        Checkpoints(folder).config()
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{folder} holds {', '.join(there)}, but no run ({error}); give another --out"
        ) from None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes a folder this process's own, until it ends, however it ends.

    Raises:
      ValueError: another process runs there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    held = filelock.FileLock(path, timeout=0)
    owner = folder / f"{_LOCK}.owner"
    try:
        held.acquire()
    except filelock.Timeout:
        who = owner.read_text().strip() if owner.exists() else "another process"
        raise ValueError(
            f"{folder} is in use by {who}; wait until it has ended, or give another --out"
        ) from None
    try:
        write_beside(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        owner.unlink(missing_ok=True)
        held.release()


def differences(config: TrainConfig, before: TrainConfig) -> dict[str, list[Any]]:
    """Options that decide on the result and differ: name -> [before, now], JSON-ready."""
    # The learning rates of a cosine depend on where it ends.
    free = _FREE - ({"epochs", "steps"} if config.optimiser.schedule == "cosine" else set())
    found = {
        name: [before.options()[name], value]
        for name, value in config.options().items()
        if name not in free and value != before.options()[name]
    }
    return json.loads(json.dumps(found, default=str))


def check_same(config: TrainConfig, before: TrainConfig) -> None:
    """Raises ValueError where a run would go on with options that decide on its result."""
    found = differences(config, before)
    if found:
        words = ", ".join(
            f"--{name.replace('_', '-')} {old} (now {new})" for name, (old, new) in found.items()
        )
        raise ValueError(
            f"the run in {config.run.out} was started with {words}; leave the options out to go on "
            "as it was, or add --override to change them from here on"
        )
