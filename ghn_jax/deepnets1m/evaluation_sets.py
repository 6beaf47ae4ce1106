"""The evaluation sets of DeepNets-1M, frozen: who compares results compares the same networks.

    arch = evaluation_set("test")[0]

They were generated once by the splits' rules, widths included, and are kept in the package
(`evaluation_sets.json.bz2`; `python -m ghn_jax.deepnets1m freeze` makes the same file again).
Training architectures that are among them are passed over (`sampling.sample_architecture`).
"""

from __future__ import annotations

import bz2
import functools
import json
from importlib import resources
from typing import Literal, overload

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.canonical import Form, canonical, normal_form
from ghn_jax.deepnets1m.task import Task

# Split: number of networks (paper § 3, Table 1). All are different networks, but for `wide`: those
# are the first of `test`, wider.
EVALUATION_SIZES = {"val": 500, "test": 500, "wide": 100, "deep": 100, "dense": 100, "bnfree": 100}
RESNET50 = "resnet50"  # outside the design space, hence no Architecture

FILE = "evaluation_sets.json.bz2"


def pack(sets: dict[str, list[Architecture | str]]) -> bytes:
    """The contents of the file for some sets; the same bytes for the same sets."""
    data = {
        split: [arch if isinstance(arch, str) else arch.to_dict() for arch in architectures]
        for split, architectures in sets.items()
    }
    return bz2.compress(json.dumps(data, separators=(",", ":")).encode())


@functools.cache
def _sets() -> dict[str, tuple[Architecture | str, ...]]:
    packed = (resources.files("ghn_jax.deepnets1m") / FILE).read_bytes()
    return {
        split: tuple(e if isinstance(e, str) else Architecture.from_dict(e) for e in entries)
        for split, entries in json.loads(bz2.decompress(packed)).items()
    }


@overload
def evaluation_set(
    split: Literal["val", "test", "wide", "deep", "dense", "bnfree"], *, image_size: int = 32
) -> tuple[Architecture, ...]: ...


@overload
def evaluation_set(split: str, *, image_size: int = 32) -> tuple[Architecture | str, ...]: ...


def evaluation_set(split: str, *, image_size: int = 32) -> tuple[Architecture | str, ...]:
    """The networks of an evaluation split.

    Args:
      split: 'val', 'test', 'wide', 'deep', 'dense', 'bnfree' or 'predefined'; the last holds
        'resnet50', which is not an `Architecture`, and the 12-layer ViT.
      image_size: height of the images in pixels; above 96, `wide` is twice, not four times, as wide
        as `test`.

    Raises:
      ValueError: there is no such split; the message names those that there are.
    """
    sets = _sets()
    if split not in sets:
        raise ValueError(f"split {split!r} has no evaluation set; allowed: {', '.join(sets)}")
    if split == "wide" and Task(image_size=image_size).large:  # as in the official files
        wide = (arch for arch in sets[split] if isinstance(arch, Architecture))
        return tuple(arch.replace(C=arch.C // 2) for arch in wide)
    return sets[split]


@functools.cache
def _held_out() -> dict[tuple, frozenset[Form]]:
    """Forms of all evaluation architectures, by their normal cells."""
    forms: dict[tuple, set[Form]] = {}
    for architectures in _sets().values():
        for arch in architectures:
            if isinstance(arch, Architecture):
                form = canonical(arch)
                forms.setdefault(form.normal, set()).add(form)
    return {normal: frozenset(group) for normal, group in forms.items()}


def is_held_out(arch: Architecture) -> bool:
    """Whether an architecture, at any width, is in an evaluation set."""
    # Few training architectures share even the normal cell, so that the rest is rarely computed.
    same_cell = _held_out().get(normal_form(arch))
    return same_cell is not None and canonical(arch) in same_cell
