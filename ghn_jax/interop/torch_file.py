"""Reads and writes PyTorch's checkpoint files, without PyTorch.

A `.pt` file is a ZIP archive: `data.pkl` says which tensors there are, `data/N` holds their bytes.
The pickle is read by an interpreter that knows tensors, dictionaries, lists, numbers and strings;
whatever else a file asks for is refused, so that reading one never runs code of a stranger's.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ghn_jax.files.messages import in_a_line
from ghn_jax.files.replace import written_beside

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGES = {dtype: name for name, dtype in DTYPES.items()}


def _tensor(storage: np.ndarray, offset: int, size, stride, *_) -> np.ndarray:
    """A tensor from the elements that it is a view of."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or offset < 0 or min((*size, *stride), default=0) < 0:
        raise ValueError(f"a tensor of shape {size} with strides {stride}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    # Views that repeat elements (strides of 0) could have any size; no checkpoint has them.
    if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise ValueError(f"a tensor of shape {size} is larger than its {len(storage)} elements")
    strides = [s * storage.itemsize for s in stride]
    # No copy: a file may ask for any number of tensors of the same elements.
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _parameter(data: np.ndarray, *_) -> np.ndarray:
    return data


class Options:
    """Stands for the command line's options that training checkpoints keep (`argparse`)."""


def _device(*of: str | int) -> str:
    if not all(isinstance(part, str | int) for part in of):
        raise ValueError("a device is not named by a string and a number")
    return ":".join(map(str, of))


# All that a pickle may call.
_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("argparse", "Namespace"): Options,
}


def find_allowed(module: str, name: str) -> Any:
    """What stands for a class or function that a pickle asks for.

    Raises:
      ValueError: it has no business there.
    """
    if module == "torch" and name in DTYPES:
        return name
    try:
        return _ALLOWED[module, name]
    except KeyError:
        raise ValueError(
            f"it holds a {module}.{name}; allowed: tensors, dictionaries, lists, numbers and "
            "strings"
        ) from None


# What reading damaged archives and pickles raises.
DAMAGED = (
    pickle.UnpicklingError, ValueError, KeyError, TypeError, IndexError, EOFError, OSError,
    AttributeError, struct.error, OverflowError, MemoryError, RuntimeError, zipfile.BadZipFile,
)  # fmt: skip


def check_pickle(stream: io.BytesIO) -> None:
    """Looks at a pickle's operations before any is done; the stream stays where it is.

    Raises:
      ValueError: it is cut short, has an operation that there is not, or numbers what it remembers
        higher than it has bytes: an interpreter makes room for all numbers before.
    """
    start, size = stream.tell(), len(stream.getbuffer())
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > size:
            raise ValueError(f"it remembers a value as number {argument} in {size} bytes")
    stream.seek(start)


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of a file in an archive; its CRC-32 is checked.

    Raises:
      ValueError: it is compressed: what unpacks may be of any size.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, as PyTorch never writes it")
    return archive.read(entry)


class _Reader(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, folder: str):
        super().__init__(file, encoding="utf-8")
        self._archive, self._folder = archive, folder
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str):
        return find_allowed(module, name)

    def persistent_load(self, pid):
        kind, storage, key, _, count = pid
        if kind != "storage" or storage not in DTYPES:
            raise ValueError(f"it holds a {kind} of {storage}")
        if key not in self._storages:
            data = _stored(self._archive, f"{self._folder}data/{key}")
            if not 0 <= count * DTYPES[storage].itemsize <= len(data):
                raise ValueError(f"data/{key} holds {len(data)} bytes, too few for {count} numbers")
            self._storages[key] = np.frombuffer(data, DTYPES[storage].newbyteorder("<"), count)
        return self._storages[key]


def read_torch(path: str | Path) -> Any:
    """Reads what `torch.save` wrote, tensors as NumPy arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file, is cut short, or holds more than plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a file written by torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("data.pkl")]
            if len(names) != 1:
                raise ValueError("it holds no data.pkl")
            folder = names[0].removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in archive.namelist() and _stored(archive, order) != b"little":
                raise ValueError("its numbers are big-endian")
            stream = io.BytesIO(_stored(archive, names[0]))
            check_pickle(stream)
            return _Reader(stream, archive, folder).load()
    except zipfile.BadZipFile:
        raise ValueError(
            f"{path} is damaged or cut short, or no file of torch.save (files of PyTorch before "
            "1.6 have to be saved again by a newer one)"
        ) from None
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {in_a_line(error)}") from None


class _Writer:
    """Writes plain data in the pickle opcodes that `torch.load(weights_only=True)` accepts."""

    def __init__(self):
        self.out = bytearray(b"\x80\x02")
        self.storages: list[np.ndarray] = []

    def _call(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()

    def _tensor(self, array: np.ndarray) -> None:
        if array.dtype not in _STORAGES:
            raise ValueError(f"PyTorch has no type for {array.dtype}")
        # Not ascontiguousarray, which turns () into (1,).
        array = np.asarray(array, order="C")
        self._call("torch._utils", "_rebuild_tensor_v2")
        self.out += b"(("
        self.write("storage")
        self._call("torch", _STORAGES[array.dtype])
        for part in (str(len(self.storages)), "cpu", array.size):
            self.write(part)
        self.out += b"tQ"
        self.write(0)
        self.write(array.shape)
        self.write(tuple(s // array.itemsize for s in array.strides))
        self.out += b"\x89"  # requires no gradient
        self._call("collections", "OrderedDict")
        self.out += b")RtR"
        self.storages.append(array)

    def write(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.out += b"J" + struct.pack("<i", value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode()
            self.out += b"X" + struct.pack("<I", len(text)) + text
        elif isinstance(value, tuple | list):
            self.out += b"(" if isinstance(value, tuple) else b"]("
            for item in value:
                self.write(item)
            self.out += b"t" if isinstance(value, tuple) else b"e"
        elif isinstance(value, dict):
            self.out += b"}("
            for key, item in value.items():
                self.write(key)
                self.write(item)
            self.out += b"u"
        else:
            self._tensor(np.asarray(value))


def write_torch(tree: Any, path: str | Path) -> None:
    """Writes dictionaries, lists, tuples, numbers, strings and arrays as `torch.save` would.

    `torch.load(path, weights_only=True)` reads the result. The file appears when it is complete.

    Raises:
      ValueError: an array of a type that PyTorch does not have.
    """
    path = Path(path)
    writer = _Writer()
    writer.write(tree)
    with (
        written_beside(path) as beside,
        zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.writestr(f"{path.stem}/data.pkl", bytes(writer.out) + b".")
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, array in enumerate(writer.storages):
            archive.writestr(f"{path.stem}/data/{key}", array.tobytes())
        archive.writestr(f"{path.stem}/version", "3\n")
