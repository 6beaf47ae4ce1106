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
import re
import sys
import threading
import warnings
import zlib
from pathlib import Path

import jax

_DIGESTS = "SHA256SUMS"
_LIST_EVERY = 64  # programs that are new in a folder
_MANY = 4  # programs that are not whole
_PROGRAM = re.compile(r"[\w.<>-]+-[0-9a-f]{64}-cache")  # as JAX names them
_WRITE_EVENT = "/jax/compilation_cache/cache_misses"


def _cut_off(content: bytes) -> bool:
    """Whether a program is not whole: a full disk, or a process that was killed as it wrote."""
    if not content.startswith(b"\x78"):  # of zlib; others are left to JAX
        return not content
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(content)
    except zlib.error:
        return True
    return not decompressor.eof


class ProgramDigests:
    """The SHA-256 of each program in a folder.

    Args:
      folder: JAX's cache.
    """

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._listed: dict[str, str] = {}
        self._new, self._said = 0, False
        try:
            lines = (folder / _DIGESTS).read_text().splitlines()
        except (OSError, ValueError):
            lines = []
        for line in lines:
            digest, _, name = line.partition("  ")
            if len(digest) == 64 and _PROGRAM.fullmatch(name):
                self._listed[name] = digest

    def _content(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return None

    def _unlisted(self) -> dict[str, bytes]:
        names = {entry.name for entry in os.scandir(self._folder)} - set(self._listed)
        found = {name: self._content(name) for name in names if _PROGRAM.fullmatch(name)}
        return {name: content for name, content in found.items() if content is not None}

    def remove_damaged(self) -> None:
        """Removes programs that are not as they were listed, or not whole; others' files stay."""
        damaged = [
            name for name, digest in self._listed.items()
            if (content := self._content(name)) is not None
            and hashlib.sha256(content).hexdigest() != digest
        ]  # fmt: skip
        damaged += [name for name, content in self._unlisted().items() if _cut_off(content)]
        for name in damaged:
            (self._folder / name).unlink(missing_ok=True)
            self._listed.pop(name, None)
        if damaged:
            warnings.warn(
                f"{len(damaged)} compiled programs in {self._folder} were damaged; they are "
                "compiled again",
                stacklevel=4,
            )

    def hear(self, event: str, **_) -> None:
        """JAX tells that it writes a program."""
        if event == _WRITE_EVENT:
            self._new += 1
            if self._new % _LIST_EVERY == 0:
                self.list_new()

    def list_new(self) -> None:
        """Lists what has come since; says so, once, where the disk is full."""
        with self._lock:
            try:
                found = self._unlisted()
                whole = {name: x for name, x in found.items() if not _cut_off(x)}
                new = {name: hashlib.sha256(x).hexdigest() for name, x in whole.items()}
                if new:
                    with (self._folder / _DIGESTS).open("a") as file:
                        file.write("".join(f"{d}  {name}\n" for name, d in new.items()))
                self._listed.update(new)
                # Others may be writing one just now.
                problem = "" if len(found) - len(whole) < _MANY else "they are cut off"
            except OSError as error:
                problem = error.strerror or str(error)
        if problem and not self._said:
            self._said = True
            print(
                f"compiled programs are not kept in {self._folder} ({problem}): make room there, "
                "or give another --cache-dir",
                file=sys.stderr,
            )


@functools.cache
def check_programs(folder: Path) -> None:
    """Checks a folder's programs, once, and lists those that this process adds."""
    digests = ProgramDigests(folder)
    digests.remove_damaged()
    jax.monitoring.register_event_listener(digests.hear)
    atexit.register(digests.list_new)
    # A full disk is said once, not for each program.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
