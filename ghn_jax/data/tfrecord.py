"""TFRecord files, read without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of that (4 bytes), its data and a
checksum of these: a CRC-32C, rotated by 15 bits, plus a constant.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, bits in reverse
_BLOCK = 1024  # bytes that are looked up at once
_OFFSETS = np.arange(_BLOCK) * 256
_ONES = bytes.fromhex("54641f64")  # after these, a state of 0 is all ones
_MASK = 0xA282EAD8


class TFRecords(Sequence[bytes]):
    """Records of TFRecord files. Their places are found now; each is read when it is asked for.

    Args:
      files: of each, its path, how many records are passed over, how many are taken, and how many
        there are in all.

    Raises:
      ValueError: a file is damaged, or has another number of records.
      OSError: a file cannot be read.
    """

    def __init__(self, files: Iterable[tuple[str | os.PathLike, int, int, int]]):
        self._paths, places = [], []
        for number, (path, skip, take, total) in enumerate(files):
            path = Path(path)
            found = find_records(path)
            if len(found) != total:
                raise ValueError(
                    f"{path} has {len(found)} records, and dataset_info.json says {total}; get "
                    "it again"
                )
            found = found[skip : skip + take]
            self._paths.append(path)
            places.append(np.column_stack([np.full(len(found), number), found]))
        self._places = np.concatenate([np.empty((0, 3), np.int64), *places])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        number, offset, length = self._places[index].tolist()
        with self._paths[number].open("rb") as file:
            file.seek(offset)
            data, checksum = file.read(length), file.read(4)
        if checksum != _checksum(data):
            raise _damaged(self._paths[number], offset)
        return data


def find_records(path: Path) -> np.ndarray:
    """(N, 2) offsets and lengths of the records' data, in bytes.

    Raises:
      ValueError: the file is damaged.
    """
    found, offset = [], 0
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        while offset < end:
            file.seek(offset)
            header = file.read(12)
            if len(header) < 12 or header[8:] != _checksum(header[:8]):
                raise _damaged(path, offset)
            (length,) = struct.unpack("<Q", header[:8])
            found.append((offset + 12, length))
            offset += 12 + length + 4
    if offset != end:
        raise _damaged(path, end)
    return np.array(found, np.int64).reshape(-1, 2)


def _damaged(path: Path, offset: int) -> ValueError:
    return ValueError(f"{path} is no TFRecord file, or damaged at byte {offset}; get it again")


def _checksum(data: bytes) -> bytes:
    crc = crc32c(data)
    rotated = crc >> 15 | crc << 17
    return struct.pack("<I", (rotated + _MASK) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of some bytes."""
    tables, (first, second, third, fourth) = _tables()
    # Zeros in front of all leave the state 0; it has to be all ones before the data.
    front = bytes(-(len(_ONES) + len(data)) % _BLOCK) + _ONES
    blocks = np.frombuffer(front + data, np.uint8).reshape(-1, _BLOCK)
    # A sum without carry of what each byte alone leaves; then blocks follow one another.
    sums = np.bitwise_xor.reduce(tables.take(_OFFSETS + blocks), axis=1)
    crc = 0
    for of_block in sums.tolist():
        crc = (
            first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24]
            ^ of_block
        )  # fmt: skip
    return crc ^ 0xFFFFFFFF


@functools.cache
def _tables() -> tuple[np.ndarray, list[list[int]]]:
    """What a byte leaves at each place of a block: (BLOCK * 256,) uint32; the first four places."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    tables = np.empty((_BLOCK, 256), np.uint32)
    tables[-1] = table
    for place in range(_BLOCK - 2, -1, -1):  # one more byte follows
        later = tables[place + 1]
        tables[place] = later >> 8 ^ table[later & 255]
    return tables.ravel(), tables[:4].tolist()
