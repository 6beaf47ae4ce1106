r"""How different predicted tensors are from each other, and how sparse (paper § C.3, Table 12).

    ghn-paper predicted-parameters --ghn runs/ghn2 runs/ghn1 runs/mlp --out runs/parameters
    ghn-paper predicted-parameters --quick

Diversity: of all tensors of one frequent shape (128×1×3×3), the cosine distance 1 - |cos| of each
pair, averaged. Sparsity: the share of a network's first kernel below 0.05. Random (He) parameters
stand beside; with `--trained`, those that `ghn-paper trained-networks --keep-parameters` wrote.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import Graph, build_graph
from ghn_jax.deepnets1m.names import parameter_path
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.experiments.kept_parameters import (
    parameters_file,
    parameters_folder,
    read_parameters,
)
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.networks import Named, of_split
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.ghn import GHN

SHAPE = (128, 1, 3, 3)  # in PyTorch's order, of depthwise and dilated depthwise convolutions
SMALL = 0.05  # magnitude of what counts as sparse
HE, SGD = "He", "He and SGD"
# Method -> diversity and sparsity in the paper.
PAPER = {SGD: (0.98, 0.33), "MLP": (0.01, 0.16), "GHN-1": (0.07, 0.20), "GHN-2": (0.17, 0.39)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Whose parameters are looked at."""

    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    trained: Path | None = None  # folder of `trained-networks --keep-parameters`
    splits: tuple[str, ...] = ("val", "test")  # of these, all networks
    networks: int | None = None  # of each split; default: all
    width: int | None = None  # initial channels of all of them; default: each its own
    shape: tuple[int, int, int, int] = SHAPE  # of the tensors that are compared
    image_size: int = 32  # of the images, in pixels
    out: Path = Path("runs/predicted_parameters")  # folder for records and the table


def quick() -> Config:
    """24 `test` networks, as narrow as `trained-networks --quick` trains them: a minute or two."""
    return Config(
        splits=("test",), networks=24, width=8, shape=(32, 1, 3, 3),
        out=Path("runs/quick/predicted_parameters"),
    )  # fmt: skip


def diversity(tensors: np.ndarray) -> float:
    """Mean of 1 - |cos| over all pairs of rows, each with itself included, as in the paper.

    Args:
      tensors: (N, d).

    Raises:
      ValueError: fewer than two rows, or a row of zeros, which has no direction.
    """
    if len(tensors) < 2:
        raise ValueError(f"{len(tensors)} tensors; two are needed to compare")
    lengths = np.linalg.norm(tensors.astype(np.float64), axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a tensor is all zeros: it has no direction to compare")
    rows = tensors / lengths
    # Rounding makes the cosine of a row with itself a little more than one.
    return float(1 - np.minimum(np.abs(rows @ rows.T), 1).mean())


def sparsity(tensor: np.ndarray) -> float:
    """The share of numbers with a magnitude below `SMALL`."""
    return float((np.abs(tensor) < SMALL).mean())


def _kernel(graph: Graph, node: int, params: Mapping) -> np.ndarray:
    """A node's kernel in the `params` tree of its network."""
    leaf: Any = params
    for part in (*parameter_path(graph.names[node]), "kernel"):
        leaf = leaf[part]
    return np.asarray(leaf)


def look_at(graph: Graph, params: Mapping, shape: Sequence[int]) -> tuple[list[np.ndarray], float]:
    """What Table 12 needs of a network.

    Args:
      graph: its graph.
      params: its `params` tree.
      shape: of the tensors that are compared, (out, in, height, width).

    Returns:
      Those tensors, flat, and the sparsity of the first kernel.

    Raises:
      ValueError: the parameters are of a network of another width.
    """
    kernels = [n for n, s in enumerate(graph.param_shapes) if s is not None and len(s) == 4]
    kernels = [n for n in kernels if graph.names[n].endswith(".weight")]
    first = _kernel(graph, kernels[0], params)
    expected = graph.param_shapes[kernels[0]]
    if first.size != math.prod(expected or ()):
        raise ValueError(
            f"{graph.names[kernels[0]]} has the shape {first.shape}, but that of the network is "
            f"{expected}, channels first; give the --width that it was trained with"
        )
    found = [
        _kernel(graph, n, params).ravel() for n in kernels if graph.param_shapes[n] == tuple(shape)
    ]
    return found, sparsity(first)


# (name, architecture, seed) -> the `params` tree of a network, or None where there is none.
Parameters = Callable[[str, Architecture, int], Mapping | None]


def _methods(config: Config, ghns: Mapping[str, tuple[GHN, dict]]) -> dict[str, Parameters]:
    """Where parameters come from, by name.

    Args:
      config: of the experiment.
      ghns: hypernetworks by name.
    """

    def predicted(ghn, variables) -> Parameters:
        return lambda name, arch, seed: ghn.predict(variables, arch, image_size=config.image_size)

    def random(name: str, arch: Architecture, seed: int) -> Mapping:
        network = build_network(arch, image_size=config.image_size)
        # A seed of its own: equal names in two networks would get equal numbers.
        return random_parameters(network, config.image_size, seed=seed)

    methods = {method: predicted(*loaded) for method, loaded in ghns.items()}
    methods[HE] = random
    if config.trained is not None:
        where = config.trained
        if not parameters_folder(where).is_dir():
            raise ValueError(f"{where} has no parameters; make them with ghn-paper "
                             "trained-networks --keep-parameters")  # fmt: skip

        def trained(name: str, arch: Architecture, seed: int) -> Mapping | None:
            file = parameters_file(where, name)
            return read_parameters(file) if file.exists() else None

        methods[SGD] = trained
    return methods


def networks(config: Config) -> list[Named]:
    """Those whose parameters are looked at."""
    if config.networks is not None and config.networks < 1:
        raise ValueError(f"--networks is {config.networks}; allowed: 1 or more")
    splits = (of_split(s, 0, config.networks, width=config.width) for s in config.splits)
    return list(itertools.chain.from_iterable(splits))


def run(config: Config) -> list[dict]:
    """Looks at what has no record yet; writes the table; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
    """
    nets, ghns = networks(config), load_ghns(config.ghn)
    methods = _methods(config, ghns)
    settings = describe("predicted_parameters", config, without=("ghn", "trained", "out"))
    files = (
        {}
        if config.trained is None
        else {
            f"{SGD}: {name}": file
            for name, _ in nets
            if (file := parameters_file(config.trained, name)).exists()
        }
    )
    records = Records.open(config.out, settings, ghns=ghns, trained=files)
    for method, parameters in methods.items():
        if method in records:
            continue
        tensors, shares = [], []
        bar = tqdm(nets, desc=method, unit="network", dynamic_ncols=True, leave=False)
        for seed, (name, arch) in enumerate(bar):
            if not isinstance(arch, Architecture):
                continue
            params = parameters(name, arch, seed)
            if params is None:
                continue
            graph = build_graph(arch, 1, image_size=config.image_size)
            some, share = look_at(graph, params, config.shape)
            tensors += some
            shares.append(share)
        if len(tensors) < 2:
            shape = "x".join(map(str, config.shape))
            raise ValueError(f"{method}: {len(shares)} networks have {len(tensors)} tensors of "
                             f"--shape {shape}; take more networks or another shape")  # fmt: skip
        records.add({
            "name": method, "networks": len(shares), "tensors": len(tensors),
            "diversity": diversity(np.stack(tensors)), "sparsity": float(np.mean(shares)),
        })  # fmt: skip
    found = [records[method] for method in methods]
    write_beside(config.out / "table.md", table(found))
    print(table(found))
    return found


def table(records: Sequence[Mapping]) -> str:
    """Markdown: Table 12, the paper's numbers below ours."""
    lines = ["| parameters | networks | tensors | mean distance | sparsity of the first layer |",
             "|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {r['name']} | {r['networks']} | {r['tensors']} | {r['diversity']:.2f} | "
              f"{r['sparsity']:.0%} |" for r in records]  # fmt: skip
    lines += [f"| {name}, the paper | 1000 | 760 | {distance:.2f} | {share:.0%} |"
              for name, (distance, share) in PAPER.items()]  # fmt: skip
    return "\n".join(lines) + "\n"
