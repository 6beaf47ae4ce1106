"""Compiled programs in files, found by what they were made from, without tracing them again.

JAX's cache on disk is keyed by the traced program, and tracing one of the executor's takes longer
than loading it (on one core: traced and lowered in 4 s, loaded in 2). Files here are keyed by what
decides on the trace: the package's source, the versions and settings of JAX and of the machine, the
function, its static arguments and the shapes of the others.

Functions that are replaced while Python runs, and hypernetworks whose class is defined elsewhere,
are not part of that: the former are for who replaces them to mind, the latter are never kept.

Like JAX's own, such a file holds machine code. One that belongs to another user is not read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import flax
import jax
import jaxlib

_UNUSED_DAYS = 30  # after which a file is removed


@functools.cache
def _source() -> bytes:
    """Hash of the package's source."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).digest()


@functools.cache
def _machine() -> str:
    """What machine code depends on besides the device."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _settings() -> str:
    """JAX's settings, but for those of its cache."""
    values = sorted(jax.config.values.items())
    return repr([(k, v) for k, v in values if "cache" not in k and "coordinator" not in k])


def is_known(value) -> bool:
    """Whether `_source` and a value's `repr` say all about it."""
    return type(value).__module__.split(".")[0] in ("builtins", __name__.split(".")[0])


def program_name(device: jax.Device, *what) -> str:
    """A name for the program made from `what` (data with a `repr`) for a kind of device."""
    parts = (
        _source(), jax.__version__, jaxlib.__version__, flax.__version__, _settings(), _machine(),
        os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", ""),
        device.device_kind, device.client.platform_version, *what,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class ProgramStore:
    """A folder of compiled programs, inside JAX's cache; nothing is kept where JAX has none."""

    def __init__(self):
        folder = jax.config.jax_compilation_cache_dir
        self.folder = Path(folder) / "programs" if folder else None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            oldest = time.time() - _UNUSED_DAYS * 24 * 3600
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    if path.stat().st_mtime < oldest:
                        path.unlink()

    def load(self, name: str) -> bytes | None:
        """What this user saved under a name; None if nothing was, or the file is damaged."""
        if self.folder is None:
            return None
        path = self.folder / name
        try:
            if path.stat().st_uid != os.getuid():
                return None
            data = zlib.decompress(path.read_bytes())
            os.utime(path)
        except (OSError, zlib.error):
            return None
        return data

    def save(self, name: str, data: bytes) -> None:
        """Saves a program, or warns that it cannot; processes may do so at the same time."""
        if self.folder is None:
            return
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(zlib.compress(data, 1))
            Path(file.name).replace(self.folder / name)
        except OSError as error:  # a full disk, say: no reason to end a training run
            warnings.warn(f"a compiled program is not kept in {self.folder}: {error}", stacklevel=2)
