"""SHA-256 of what a file holds, written with it, so that damage is found when it is read.

A file without one is read as it is: those of others, and of earlier versions, have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DIGEST = "digest"


def digest_of_json(data: Any) -> str:
    """Of JSON-ready data, in whatever order its keys are."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def digest_of_arrays(arrays: Iterable[np.ndarray], place: str) -> str:
    """Of arrays, their types and shapes, and of what they are.

    Args:
      arrays: in an order that is always the same.
      place: what the numbers belong to, in words: equal numbers elsewhere have another digest.
    """
    digest = hashlib.sha256(place.encode())
    for leaf in arrays:
        array = np.ascontiguousarray(leaf)  # of a single number too: (1,), as it always was
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def with_digest(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready data, and as its last key its digest."""
    data = json.loads(json.dumps(data))
    return {**data, DIGEST: digest_of_json(data)}


def without_digest(data: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """The data of `with_digest`, or any other.

    Args:
      data: as it was read.
      where: it was read from, for the message.

    Raises:
      ValueError: it is not what was written.
    """
    data = dict(data)
    digest = data.pop(DIGEST, None)
    if digest is not None and digest != digest_of_json(data):
        raise ValueError(
            f"{where} is not as it was written: its digest differs. Restore it; or, if you changed "
            f"it on purpose, remove its last key, {DIGEST!r}"
        )
    return data
