"""The state of a network's training, kept between epochs in one file."""

from __future__ import annotations

import io
import json
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ghn_jax.files.digest import DIGEST, digest_of_arrays
from ghn_jax.files.json_file import parse_json
from ghn_jax.files.messages import in_a_line
from ghn_jax.files.replace import write_beside

_RECORD = "record"
# What reading a damaged file raises: it is a ZIP archive of arrays with a header in Python's words.
_DAMAGED = (
    OSError, KeyError, ValueError, TypeError, SyntaxError, OverflowError, MemoryError, EOFError,
    RuntimeError, struct.error, zlib.error, tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


class SavedState:
    """A tree of arrays and a record, in one file that is always whole.

    Args:
      path: of the file, without its ending.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).with_name(Path(path).name + ".npz")

    def save(self, state: Any, record: dict) -> None:
        """Writes both; the file before stays as it is until they are written."""
        leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        text = json.dumps(record)
        digest = digest_of_arrays(leaves.values(), text)
        leaves[_RECORD] = np.frombuffer(text.encode(), np.uint8)
        leaves[DIGEST] = np.frombuffer(digest.encode(), np.uint8)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **leaves)
        write_beside(self.path, file.getvalue())

    def load(self, like: Any) -> tuple[Any, dict] | None:
        """The state and the record, if there are any.

        Args:
          like: a state of the same structure and shapes.

        Raises:
          ValueError: the file is damaged, or of another network.
        """
        if not self.path.exists():
            return None
        leaves, tree = jax.tree.flatten(like)
        try:
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                found = [file[str(i)] for i in range(len(leaves))]
                text = bytes(file[_RECORD]).decode()
                record = parse_json(text)
                digest = bytes(file[DIGEST]).decode() if DIGEST in file else None
            if digest is not None and digest != digest_of_arrays(found, text):
                raise ValueError("its digest differs")
        except _DAMAGED as error:
            raise ValueError(
                f"{self.path} is damaged ({in_a_line(error)}); remove it, and its network is "
                "trained from the start"
            ) from error
        for have, want in zip(found, leaves, strict=True):
            if have.shape != np.shape(want):
                raise ValueError(
                    f"{self.path} is of another network: it has an array of {have.shape} in place "
                    f"of {np.shape(want)}; remove it"
                )
        # Each leaf is what it was: numbers stay numbers, arrays go where arrays were.
        placed = [
            jax.device_put(have, want.sharding) if isinstance(want, jax.Array) else type(want)(have)
            for have, want in zip(found, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, placed), record

    def remove(self) -> None:
        """Gives the file up: its network is trained."""
        self.path.unlink(missing_ok=True)
