"""Reads what joblib wrote of PyTorch's tensors, without either of them: GHN-3's released files.

Such a file is a pickle, compressed or not, in which each tensor is PyTorch's older format: pickles
that say what it is, then its bytes. As in `torch_file.py`, interpreters that know tensors and plain
data read them, and nothing of the file is executed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ghn_jax.interop.torch_file import DAMAGED, DTYPES, find_allowed

# First bytes -> how to decompress what follows.
_COMPRESSIONS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x80": bytes,  # a pickle as it is
    b"\x78": zlib.decompress,
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
    b"\x5d\x00": lzma.decompress,
}
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


def _decompression(first: bytes) -> Callable[[bytes], bytes] | None:
    return next((f for magic, f in _COMPRESSIONS.items() if first.startswith(magic)), None)


def is_joblib(path: Path) -> bool:
    """Whether a file begins as one of joblib's, and not as what PyTorch wrote before 1.6 does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(32)
    return _decompression(first) is not None and _MAGIC.to_bytes(10, "little") not in first


class _Storage:
    """The numbers of a storage, which its stream says after what they are for."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.numbers = np.empty(0, dtype)


class _StorageReader(pickle.Unpickler):
    """Reads one of the pickles of a stream that holds one storage."""

    found: _Storage | None = None

    def find_class(self, module: str, name: str):
        return find_allowed(module, name)

    def persistent_load(self, pid):
        kind, dtype, *_ = pid
        if kind != "storage" or dtype not in DTYPES:
            raise ValueError(f"it holds a {kind} of {dtype}")
        self.found = _Storage(DTYPES[dtype])
        return self.found


def _storage(data: bytes) -> np.ndarray:
    """The numbers of a storage in PyTorch's older format."""
    stream = io.BytesIO(data)
    if _StorageReader(stream).load() != _MAGIC or _StorageReader(stream).load() != _VERSION:
        raise ValueError("a tensor is not in PyTorch's older format")
    if not _StorageReader(stream).load().get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    reader = _StorageReader(stream)
    storage = reader.load()
    keys = _StorageReader(stream).load()
    if not isinstance(storage, _Storage) or storage is not reader.found or len(keys) != 1:
        raise ValueError("a tensor's numbers are not one storage")
    (count,) = struct.unpack("<q", stream.read(8))
    rest = stream.read()
    if count < 0 or len(rest) != count * storage.dtype.itemsize:
        raise ValueError(f"a tensor has {len(rest)} bytes for {count} numbers")
    return np.frombuffer(rest, storage.dtype.newbyteorder("<"))


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage
        return find_allowed(module, name)


def read_joblib(path: str | Path) -> Any:
    """Reads what `joblib.dump` wrote, tensors as NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, is damaged, or holds more than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file written by joblib.dump")
    data = path.read_bytes()
    decompress = _decompression(data)
    if decompress is None:
        raise ValueError(f"{path} is no file of joblib.dump")
    try:
        return _Reader(io.BytesIO(decompress(data))).load()
    except (*DAMAGED, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
