"""Converts hypernetworks and predicted networks between JAX's and PyTorch's files.

    python -m ghn_jax.convert ghn ghn2_cifar10.pt my_ghn           # the authors' -> ours (a folder)
    python -m ghn_jax.convert ghn runs/x my_ghn.pt                 # ours -> the authors'
    python -m ghn_jax.convert network resnet50 weights resnet50.pt # predicted -> state dict
    python -m ghn_jax.convert network arch.json weights.pt weights # state dict -> ours

What a path is, its name tells: `.pt` and `.safetensors` are PyTorch's names and layouts, anything
else is a folder of Orbax's. Nothing that exists is overwritten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import safetensors.numpy
import tyro

from ghn_jax.architecture import Architecture
from ghn_jax.checkpoint import Checkpoints, load_ghn, save_ghn
from ghn_jax.graph import Graph, build_graph
from ghn_jax.torch_file import read_torch, write_torch
from ghn_jax.torch_ghn import load_torch_ghn, save_torch_ghn
from ghn_jax.torch_models import abstract_variables
from ghn_jax.torch_network import abstract_params, from_torch, to_torch
from ghn_jax.zoo import MODELS, Model

_TORCH = (".pt", ".safetensors")
_Path = Annotated[Path, tyro.conf.Positional]


def _check(source: Path, target: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a .pt, .safetensors or a folder")
    if target.exists():
        raise FileExistsError(f"{target} exists already; give a new name")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {target.absolute().parent} does not exist; make it first")


def convert_ghn(source: _Path, target: _Path) -> None:
    """Converts a hypernetwork.

    Args:
      source: a checkpoint of the authors' code, or a folder of save_ghn or of a training run.
      target: the file or folder to write.
    """
    _check(source, target)
    ghn, variables = (load_torch_ghn if source.suffix in _TORCH else load_ghn)(source)
    if target.suffix in _TORCH:
        save_torch_ghn(ghn, variables, target)
    else:
        save_ghn(target, ghn, variables)


def read_network(net: str, num_classes: int, image_size: int) -> Graph | Model:
    """The model of the zoo of that name, or the graph of the architecture in a JSON file.

    Raises:
      FileNotFoundError, ValueError: there is no such file, or it holds no architecture.
    """
    if net in MODELS:
        return MODELS[net](num_classes, image_size)
    path = Path(net)
    if not path.is_file():
        raise FileNotFoundError(
            f"{net} does not exist; give a JSON file or one of {', '.join(MODELS)}"
        )
    try:
        arch = Architecture.from_dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{net} holds no architecture: {error}") from None
    return build_graph(arch, 1, num_classes=num_classes, image_size=image_size)


def _read_arrays(path: Path) -> dict:
    """A state dict from a file."""
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    arrays = read_torch(path)
    if not isinstance(arrays, dict):
        raise ValueError(f"{path} holds no state dict, but a {type(arrays).__name__}")
    # Training programs save it beside other things.
    return arrays.get("state_dict", arrays)


def _read_variables(path: Path, network: Graph | Model) -> dict:
    """A network's variables from a file, or its parameters from a folder."""
    is_graph = isinstance(network, Graph)
    if path.suffix in _TORCH:
        variables = from_torch(_read_arrays(path), network)
        return {"params": variables} if is_graph else variables
    like = abstract_params(network) if is_graph else abstract_variables(network)["params"]
    return Checkpoints(path).load(params=like)[2]


def convert_network(
    net: Annotated[str, tyro.conf.Positional],
    source: _Path,
    target: _Path,
    num_classes: int = 10,
    image_size: int = 32,
) -> None:
    """Converts the parameters of a network.

    Args:
      net: a model of `ghn_jax.zoo` (resnet50), or a JSON file with an architecture
        (`Architecture.to_dict`).
      source: its parameters: a state dict, or a folder written by this program (which has no
        running statistics).
      target: the file or folder to write.
      num_classes: classes of the network.
      image_size: height and width of its images, in pixels.
    """
    _check(source, target)
    network = read_network(net, num_classes, image_size)
    variables = _read_variables(source, network)
    params = variables["params"]
    # Checks names and shapes.
    arrays = to_torch(params if isinstance(network, Graph) else variables, network)
    if target.suffix == ".pt":
        write_torch(arrays, target)
    elif target.suffix == ".safetensors":
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, target)
    else:
        Checkpoints(target).save(0, 0, params=params)


def main(arguments: list[str]) -> None:
    """Entry point."""
    commands = {"ghn": convert_ghn, "network": convert_network}
    tyro.extras.subcommand_cli_from_dict(commands, args=arguments, description=__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"ghn_jax.convert: {error}")
