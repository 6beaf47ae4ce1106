"""Digests of the compiled programs that JAX keeps: it runs them as it finds them.

They are in one file of the folder, `SHA256SUMS`, which `sha256sum --check` reads. A program is
listed some programs after it was written, and when the process ends; one that is not listed has the
checksum of its compression only.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import threading
import warnings
from pathlib import Path

import jax

_DIGESTS = "SHA256SUMS"
_LIST_EVERY = 64  # programs that are new in a folder
_WRITE_EVENT = "/jax/compilation_cache/cache_misses"


class ProgramDigests:
    """The SHA-256 of each program in a folder.

    Args:
      folder: JAX's cache.
    """

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._listed: dict[str, str] = {}
        self._new = 0
        try:
            lines = (folder / _DIGESTS).read_text().splitlines()
        except (OSError, ValueError):
            lines = []
        for line in lines:
            digest, _, name = line.partition("  ")
            if len(digest) == 64 and name.endswith("-cache") and "/" not in name:
                self._listed[name] = digest

    def remove_damaged(self) -> None:
        """Removes programs that are not as they were listed; others' files stay."""
        damaged = [name for name, digest in self._listed.items()
                   if self._digest(name) not in (digest, None)]  # fmt: skip
        for name in damaged:
            (self._folder / name).unlink(missing_ok=True)
            del self._listed[name]
        if damaged:
            warnings.warn(
                f"{len(damaged)} compiled programs in {self._folder} were damaged; they are "
                "compiled again",
                stacklevel=4,
            )

    def _digest(self, name: str) -> str | None:
        try:
            return hashlib.sha256((self._folder / name).read_bytes()).hexdigest()
        except OSError:
            return None

    def hear(self, event: str, **_) -> None:
        """JAX tells that it writes a program."""
        if event == _WRITE_EVENT:
            self._new += 1
            if self._new % _LIST_EVERY == 0:
                self.list_new()

    def list_new(self) -> None:
        """Lists what has come since."""
        with self._lock:
            try:
                names = {entry.name for entry in os.scandir(self._folder)
                         if entry.name.endswith("-cache")}  # fmt: skip
                found = {name: self._digest(name) for name in names - set(self._listed)}
                new = {name: digest for name, digest in found.items() if digest is not None}
                if new:
                    with (self._folder / _DIGESTS).open("a") as file:
                        file.write("".join(f"{d}  {name}\n" for name, d in new.items()))
                self._listed.update(new)
            except OSError:  # a full disk, or the folder is gone: what is not listed is not checked
                return


@functools.cache
def check_programs(folder: Path) -> None:
    """Checks a folder's programs, once, and lists those that this process adds."""
    digests = ProgramDigests(folder)
    digests.remove_damaged()
    jax.monitoring.register_event_listener(digests.hear)
    atexit.register(digests.list_new)
