"""TFRecord files without TensorFlow: their checksums, and what is damaged."""

import numpy as np
import pytest

from ghn_jax.data.tfrecord import TFRecords, crc32c, find_records


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"a", 0xC1D04330),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_crc32c_of_known_data(data, crc):
    assert crc32c(data) == crc


@pytest.mark.parametrize("length", [1, 3, 4, 5, 1019, 1020, 1021, 2044, 5000])
def test_crc32c_by_its_definition(length):
    data = np.random.default_rng(length).bytes(length)
    crc = 2**32 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 2**32 - 1


# Two records, "1 1" and "1 2 1 1", as TensorFlow wrote them.
BY_TENSORFLOW = bytes.fromhex(
    "0300000000000000b0994" "90e31203159bed8de" "0700000000000000bbd79f11312032203120319886ebb8"
)  # fmt: skip


def test_files_that_tensorflow_wrote_are_read(tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(BY_TENSORFLOW)
    assert find_records(path).tolist() == [[12, 3], [31, 7]]
    assert list(TFRecords([(path, 0, 2, 2), (path, 1, 1, 2)])) == [b"1 1", b"1 2 1 1", b"1 2 1 1"]
    path.write_bytes(b"")
    assert len(TFRecords([(path, 0, 0, 0)])) == 0


@pytest.mark.parametrize("position", [0, 5, 9, 13, 16, 25, 40])
def test_a_damaged_byte_is_noticed(tmp_path, position):
    data = bytearray(BY_TENSORFLOW)
    data[position] ^= 4
    path = tmp_path / "x.tfrecord"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} is no TFRecord file, or damaged at byte"):
        list(TFRecords([(path, 0, 2, 2)]))


@pytest.mark.parametrize("length", [3, 14, 25, 40])
def test_a_file_that_ends_early_is_noticed(tmp_path, length):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(BY_TENSORFLOW[:length])
    with pytest.raises(ValueError, match="damaged at byte"):
        TFRecords([(path, 0, 2, 2)])
    path.write_bytes(BY_TENSORFLOW[:19])  # ends where a record does
    with pytest.raises(ValueError, match="has 1 records, and dataset_info.json says 2; get it"):
        TFRecords([(path, 0, 2, 2)])
