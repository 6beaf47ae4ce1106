"""Files as TFDS writes them, without TensorFlow."""

import io
import json
import struct
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

FEATURE = "tensorflow_datasets.core.features."
TEXT = {"pythonClassName": FEATURE + "text_feature.Text", "text": {}}


def image_feature(*shape: int, dtype: str = "uint8") -> dict:
    image = {"dtype": dtype, "shape": {"dimensions": [str(n) for n in shape]}}
    return {"pythonClassName": FEATURE + "image_feature.Image", "image": image}


def label_feature(num_classes: int) -> dict:
    label = {"numClasses": str(num_classes)}
    return {"pythonClassName": FEATURE + "class_label_feature.ClassLabel", "classLabel": label}


FEATURES = {"image": image_feature(-1, -1, 3), "label": label_feature(200), "id": TEXT}


def varint(number: int) -> bytes:
    """A number below 2**14 as protocol buffers write it."""
    return bytes([number]) if number < 128 else bytes([number % 128 + 128, number // 128])


def field(number: int, content: bytes) -> bytes:
    return bytes([number * 8 + 2]) + varint(len(content)) + content


def example(values: dict[str, bytes | int]) -> bytes:
    """A tf.train.Example of single bytes (BytesList is field 1) and integers (Int64List is 3)."""
    features = b""
    for name, value in values.items():
        value = (
            field(3, field(1, varint(value)))
            if isinstance(value, int)
            else (field(1, field(1, value)))
        )
        features += field(1, field(1, name.encode()) + field(2, value))
    return field(1, features)


def write_array_record(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    """Length, its checksum, data, its checksum."""

    def checksum(data: bytes) -> bytes:
        crc = 2**32 - 1
        for byte in data:  # bit by bit, as the definition of CRC-32C says
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 2**32 - 1
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    with path.open("wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + checksum(length) + record + checksum(record))


WRITERS = {"array_record": write_array_record, "tfrecord": write_tfrecord}


def write_tfds(
    folder: Path,
    name: str,
    version: str,
    splits: dict[str, list[list[dict]]],
    *,
    file_format: str = "array_record",
    features: dict | None = None,
    supervised: tuple[str, ...] = (),
) -> Path:
    """A dataset NAME or NAME/CONFIG as TFDS prepares it: splits of shards of records."""
    path = folder / name / version
    path.mkdir(parents=True)
    name, _, config = name.partition("/")
    infos = []
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            file = path / f"{name}-{split}.{file_format}-{i:05d}-of-{len(shards):05d}"
            WRITERS[file_format](file, [example(record) for record in shard])
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        lengths = [str(len(shard)) for shard in shards]
        infos.append({"name": split, "filepathTemplate": template, "shardLengths": lengths})
    info = {"name": name, "version": version, "fileFormat": file_format, "splits": infos}
    if config:
        info["configName"] = config
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (path / "dataset_info.json").write_text(json.dumps(info))
    written = {
        "pythonClassName": FEATURE + "features_dict.FeaturesDict",
        "featuresDict": {"features": features or FEATURES},
    }
    (path / "features.json").write_text(json.dumps(written))
    return folder


def encode(pixels: np.ndarray, file_format: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, file_format)
    return file.getvalue()
