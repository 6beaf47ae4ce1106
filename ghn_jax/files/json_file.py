"""JSON files, whoever wrote them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ghn_jax.files.messages import in_a_line


def parse_json(text: str | bytes) -> Any:
    """JSON as data.

    Raises:
      ValueError: it is none.
    """
    try:
        return json.loads(text)
    except RecursionError:  # thousands of brackets in brackets
        raise ValueError("it is nested too deep") from None


def read_json(path: str | os.PathLike[str], advice: str) -> Any:
    """The data of a file.

    Args:
      path: of the file.
      advice: what to do where it is damaged.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is cut off, or no JSON.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:  # of its encoding, too
        raise ValueError(
            f"{path} is truncated or not JSON ({in_a_line(error)}); {advice}"
        ) from None
