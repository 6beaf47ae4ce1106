"""Reads what joblib wrote of PyTorch's tensors, without either of them: GHN-3's released files.

Such a file is a pickle, compressed or not, in which each tensor is PyTorch's older format: pickles
that say what it is, then its bytes. As in `torch_file.py`, interpreters that know tensors and plain
data read them, and nothing of the file is executed.
"""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ghn_jax.files.messages import in_a_line
from ghn_jax.interop.torch_file import DAMAGED, DTYPES, check_pickle, find_allowed

_MOST_COMPRESSED = 100  # bytes of a byte; parameters that were trained come to about one
_LZMA_MEMORY = 2**28  # bytes, of which its highest level takes a quarter


def _decompressed(data: bytes, decompressor: Any) -> bytes:
    found = decompressor.decompress(data, _MOST_COMPRESSED * len(data) + 2**20)
    if not decompressor.eof:
        raise ValueError(
            f"it is cut short, or holds more than {_MOST_COMPRESSED} times its {len(data)} bytes"
        )
    return found


def _lzma(data: bytes) -> bytes:
    return _decompressed(data, lzma.LZMADecompressor(memlimit=_LZMA_MEMORY))


# First bytes -> how to decompress what follows.
_COMPRESSIONS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x80": bytes,  # a pickle as it is
    b"\x78": lambda data: _decompressed(data, zlib.decompressobj()),
    b"\x1f\x8b": lambda data: _decompressed(data, zlib.decompressobj(zlib.MAX_WBITS | 16)),  # gzip
    b"BZh": lambda data: _decompressed(data, bz2.BZ2Decompressor()),
    b"\xfd7zXZ": _lzma,
    b"\x5d\x00": _lzma,
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


def _load(stream: io.BytesIO) -> tuple[_StorageReader, Any]:
    check_pickle(stream)
    reader = _StorageReader(stream)
    return reader, reader.load()


def _storage(data: bytes) -> np.ndarray:
    """The numbers of a storage in PyTorch's older format."""
    stream = io.BytesIO(data)
    if _load(stream)[1] != _MAGIC or _load(stream)[1] != _VERSION:
        raise ValueError("a tensor is not in PyTorch's older format")
    if not _load(stream)[1].get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    reader, storage = _load(stream)
    keys = _load(stream)[1]
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
        stream = io.BytesIO(decompress(data))
        check_pickle(stream)
        return _Reader(stream).load()
    except (*DAMAGED, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {in_a_line(error)}") from None
