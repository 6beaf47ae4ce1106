"""The networks that the page is about: of an evaluation split, sampled, or edited as JSON."""

from __future__ import annotations

import dataclasses
import json
import re

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set
from ghn_jax.deepnets1m.task import Task
from ghn_jax.files.json_file import parse_json

# A few more than the largest model of the zoo has: more would fill the memory of a small machine.
MAX_PARAMETERS = 150_000_000

_FIELDS = tuple(field.name for field in dataclasses.fields(Architecture))
# What entries of the official files have beside an architecture's fields.
_COUNTS = ("num_nodes", "num_params")


def of_split(split: str, index: int, image_size: int) -> Architecture:
    """A network of an evaluation split (§ 3).

    Args:
      split: a key of `EVALUATION_SIZES`.
      index: of the network, from 0.
      image_size: height of the images in pixels.

    Raises:
      ValueError: there is no such split or network.
    """
    if split not in EVALUATION_SIZES:
        raise ValueError(f"the split is {split!r}; allowed: {', '.join(EVALUATION_SIZES)}")
    if not 0 <= index < EVALUATION_SIZES[split]:
        last = EVALUATION_SIZES[split] - 1
        raise ValueError(f"the number of the network is {index}; {split} has 0 to {last}")
    found = evaluation_set(split, image_size=image_size)[index]
    assert isinstance(found, Architecture)  # ResNet-50 is in none of these splits
    return found


def as_text(arch: Architecture) -> str:
    """An architecture as JSON to edit: an edge of a cell is a line."""
    text = json.dumps(arch.to_dict(), indent=1)
    # Lists without lists in them go in one line.
    return re.sub(r"\[\s*([^\[\]{}]*?)\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def from_text(text: str) -> Architecture:
    """The architecture that `as_text` wrote, or that was made of it.

    Raises:
      ValueError: it is no JSON, or no architecture; the message says where.
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ValueError(f"this is not JSON: {error}") from None
    if isinstance(data, dict):
        unknown = sorted(set(data) - {*_FIELDS, *_COUNTS})
        if unknown:
            raise ValueError(
                f"there is no field {unknown[0]!r} in an architecture; allowed: "
                f"{', '.join(_FIELDS)}"
            )
    return Architecture.from_dict(data)


def check_size(arch: Architecture, task: Task) -> None:
    """Raises ValueError for a network that is too large for a page."""
    count = count_parameters(arch, num_classes=task.num_classes, image_size=task.image_size)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"the network has {count:,} parameters; allowed here: {MAX_PARAMETERS:,}. Use fewer "
            "channels (C) or cells (n_cells)"
        )
