"""Arrays by name in safetensors files, with a digest in their metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ghn_jax.files.digest import DIGEST, digest_of_arrays
from ghn_jax.files.messages import in_a_line
from ghn_jax.files.replace import write_beside


def _digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    names = sorted(arrays)
    place = json.dumps([names, sorted(metadata.items())])
    return digest_of_arrays((arrays[name] for name in names), place)


def write_tensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file that any reader of safetensors reads.

    Args:
      path: of the file, which appears when it is complete.
      arrays: by name.
      metadata: of the file.

    Raises:
      OSError: it could not be written; what was there is as it was.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = dict(metadata or {})
    whole = {**metadata, DIGEST: _digest(arrays, metadata)}
    write_beside(path, safetensors.numpy.save(arrays, whole))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file by name, and its metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {in_a_line(error)}") from None
    digest = metadata.pop(DIGEST, None)
    if digest is not None and digest != _digest(arrays, metadata):
        raise ValueError(
            f"{path} is damaged: its numbers are not those that were written. Restore it; or, if "
            f"you changed it on purpose, remove {DIGEST!r} from its metadata"
        )
    return arrays, metadata
