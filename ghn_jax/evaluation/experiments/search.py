r"""Architecture search by predicted properties (paper C.2.4, Table 9).

    ghn-paper search --ghn runs/ghn2 --trained runs/sgd-val runs/sgd-test --out runs/search
    ghn-paper search --quick

A regression from embeddings to a property of trained networks (§ 5.2) is asked about networks of the
`search` split, which nobody trains; the best are kept, with their costs. `--trained` are folders
that `ghn-paper trained-networks` has written. Train what was found with

    ghn-paper trained-networks --architectures runs/search/best.json --recipe-name final
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.counts import count_flops, count_parameters
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.evaluation.experiments.records import read_records, write_beside
from ghn_jax.evaluation.experiments.regression import fit
from ghn_jax.hypernet.checkpoint import load_ghn
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.hypernet.ghn import GHN

CHUNK = 512  # networks whose scores are written together


class Found(NamedTuple):
    """A network and what was predicted of it.

    Attributes:
      index: in the split.
      arch: the architecture.
      score: the objective.
      parameters, flops: its costs (multiply-adds for one image).
    """

    index: int
    arch: Architecture
    score: float
    parameters: int
    flops: int


def search(
    ghn: GHN,
    variables,
    objective: Callable[[np.ndarray], np.ndarray],
    *,
    num: int,
    constraint: Callable[[Architecture], bool] = lambda arch: True,
    keep: int = 10,
    seed: int = 0,
    task: Task | None = None,
    report: Callable[[int], None] = lambda seen: None,
) -> list[Found]:
    """The networks of the `search` split with the highest objective.

    Args:
      ghn, variables: whose embeddings the objective takes.
      objective: (N, d) embeddings -> (N,) scores, as a fitted regression's `predict`.
      num: networks that are looked at; those that miss the constraint count.
      constraint: whether a network may be chosen, as by its parameters (`count_parameters`).
      keep: how many are returned at most.
      seed: of the split's networks.
      task: that costs are for; CIFAR-10 if not given.
      report: called with the number of networks looked at since the last call.

    Returns:
      The best, the highest first.

    Raises:
      ValueError: `num` or `keep` is less than 1.
    """
    if num < 1 or keep < 1:
        raise ValueError(f"num is {num} and keep is {keep}; use 1 or more")
    task, best = task or Task(), []
    for start in range(0, num, CHUNK):
        indices, graphs, archs = [], [], []
        for i in range(start, min(start + CHUNK, num)):
            arch = sample_architecture("search", seed, i)
            if constraint(arch):
                indices.append(i)
                archs.append(arch)
                graphs.append(ghn.graph(arch, image_size=task.image_size))
        if archs:
            scores = objective(embed_graphs(ghn, variables, graphs))
            best += [
                Found(i, arch, float(score), *costs(arch, task))
                for i, arch, score in zip(indices, archs, scores, strict=True)
            ]
            best = sorted(best, key=lambda found: -found.score)[:keep]
        report(min(CHUNK, num - start))
    return best
