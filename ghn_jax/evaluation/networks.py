"""The networks that are evaluated and trained: of a split, or by name (§ 3, § 5.1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn

from ghn_jax import zoo
from ghn_jax.deepnets1m.architecture import DARTS, PDARTS, VIT, Architecture
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.reader import DeepNets1M, read_architectures
from ghn_jax.deepnets1m.sampling import SPLITS, Rules, sample_architecture
from ghn_jax.deepnets1m.task import Task

Named = tuple[str, Architecture | str]  # a name; an architecture, or a model of the zoo


def named_architectures(width: int, n_cells: int = 8) -> dict[str, Architecture]:
    """The paper's named networks of the design space, at a small width."""
    darts = functools.partial(Architecture, C=width, n_cells=n_cells, fc_layers=1)
    return {
        "DARTS": darts(DARTS),
        "PDARTS": darts(PDARTS),
        "ViT": Architecture(
            VIT, n_cells=n_cells, C=width, C_mult=1, preproc=False, stem_type=0, fc_layers=1
        ),
    }


def by_name(names: Sequence[str], width: int | None = None) -> list[Named]:
    """Networks by name: DARTS, PDARTS, ViT, or a model of the zoo.

    Args:
      names: of the networks.
      width: initial channels of those of the design space; 32 if not given.

    Raises:
      ValueError: a name is not known.
    """
    known = named_architectures(width or 32)
    for name in names:
        if name not in known and name not in zoo.MODELS:
            allowed = ", ".join([*known, *zoo.MODELS])
            raise ValueError(f"there is no network {name!r}; allowed: {allowed}")
    return [(name, known.get(name, name)) for name in names]


def of_file(path: str | Path, width: int | None = None) -> list[Named]:
    """Networks of a JSON file: name -> architecture (`Architecture.to_dict`).

    Raises:
      ValueError: the file holds something else.
    """
    return [
        (name, arch if width is None else arch.replace(C=width))
        for name, arch in read_architectures(path).items()
    ]


def of_split(
    split: str,
    start: int = 0,
    stop: int | None = None,
    *,
    image_size: int = 32,
    width: int | None = None,
    nets: str | Path | None = None,
    seed: int | None = None,
) -> list[Named]:
    """Networks of a split of DeepNets-1M.

    Args:
      split: one of the evaluation sets, or `predefined`; with `nets` one of the file's; with `seed`
        one of those that are generated.
      start, stop: which of them; to the last if `stop` is not given.
      image_size: of the images, in pixels.
      width: initial channels; the architectures' own if not given.
      nets: official HDF5 file to read them from.
      seed: of generated ones.

    Raises:
      ValueError: there is no such split, or no network in the range.
    """
    found: Sequence[Architecture | str]
    if nets is not None:
        file = DeepNets1M.open(nets, split, image_size=image_size)
        found = [file[i] for i in range(start, min(len(file), stop or len(file)))]
    elif seed is not None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; generated are {', '.join(SPLITS)}")
        if stop is None:
            raise ValueError("generated architectures have no end; say how many")
        found = [sample_architecture(split, seed, i) for i in range(start, stop)]
    else:
        if split not in (*EVALUATION_SIZES, "predefined"):
            allowed = ", ".join([*EVALUATION_SIZES, "predefined"])
            raise ValueError(f"split is {split!r}; allowed: {allowed}; others with a seed")
        found = evaluation_set(split, image_size=image_size)[start:stop]
    if not found:
        raise ValueError(f"{split} has no network from {start} to {stop}")
    if width is not None:
        found = [a if isinstance(a, str) else a.replace(C=width) for a in found]
    return [(f"{split}[{i}]", network) for i, network in enumerate(found, start)]


def of_rules(rules: Rules, count: int) -> list[Named]:
    """Networks of the training rules, from a random stream that training never draws from."""
    rules = dataclasses.replace(rules, stream="test")
    return [(f"unseen {i}", sample_architecture("test", 0, i, rules=rules)) for i in range(count)]


def module_of(network: Architecture | str, task: Task) -> nn.Module:
    """The Flax module of a network."""
    if isinstance(network, str):
        return zoo.MODELS[network](task.num_classes, task.image_size)
    return build_network(network, task.num_classes, task.image_size)
