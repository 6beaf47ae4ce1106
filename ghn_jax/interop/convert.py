"""Converts hypernetworks and predicted networks between JAX's and PyTorch's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from flax.traverse_util import unflatten_dict

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import Graph, build_graph
from ghn_jax.files.json_file import read_json
from ghn_jax.files.tensors import read_tensors, write_tensors
from ghn_jax.hypernet.checkpoint import Checkpoints, save_ghn
from ghn_jax.hypernet.ghn_file import tree_name, write_ghn_file
from ghn_jax.interop.pretrained import about, from_pretrained
from ghn_jax.interop.torch_file import read_torch, write_torch
from ghn_jax.interop.torch_ghn import save_torch_ghn
from ghn_jax.interop.torch_models import abstract_variables
from ghn_jax.interop.torch_network import abstract_params, from_torch, to_torch
from ghn_jax.training.config import PLACES
from ghn_jax.zoo import MODELS, Model

Framework = Literal["torch", "flax"]
_STATE_DICTS = (".pt", ".pth")  # as PyTorch writes them
_TORCH = (*_STATE_DICTS, ".safetensors")
_Path = Annotated[Path, tyro.conf.Positional]


def check_target(target: Path, to: Framework = "torch") -> None:
    """Raises an error unless something new can be written there.

    Args:
      target: a file or a folder.
      to: whose names and layouts it is to have.

    Raises:
      FileExistsError, FileNotFoundError: there is something, or no folder for it.
      ValueError: a name that is none of a file of this program, or not of that framework's.
    """
    if target.suffix not in (*_TORCH, ""):
        raise ValueError(f"{target} ends in {target.suffix}; allowed: .pt, .pth, .safetensors, or "
                         "a folder, whose name has no ending")  # fmt: skip
    if to == "flax" and target.suffix in _STATE_DICTS:
        raise ValueError(f"{target} has PyTorch's names; give NAME.safetensors with --to flax")
    if target.exists():
        raise FileExistsError(f"{target} exists already; give a new name")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {target.absolute().parent} does not exist; make it first")


def _check_there(source: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a .pt, .safetensors or a folder")


def _without_places(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a hypernetwork says about itself, to pass on: not where things were on this machine."""
    training = {k: v for k, v in about.get("training", {}).items() if k not in PLACES}
    return {**about, "training": training} if training else dict(about)


def convert_ghn(source: _Path, target: _Path, to: Framework = "torch", half: bool = False) -> None:
    """Converts a hypernetwork.

    Args:
      source: a checkpoint of the authors' code, or a file or folder of ours.
      target: the file or folder to write.
      to: whose names and layouts a .safetensors file gets; a .pt file is PyTorch's, a folder ours.
      half: a file of ours in half precision.
    """
    check_target(target, to)
    ours = target.suffix == ".safetensors" and to == "flax"
    if half and not ours:
        raise ValueError("--half is for files of ours: NAME.safetensors --to flax")
    ghn, variables = from_pretrained(source)
    if ours:
        write_ghn_file(target, ghn, variables, half=half, about=_without_places(about(source)))
    elif target.suffix in _TORCH:
        save_torch_ghn(ghn, variables, target)
    else:
        save_ghn(target, ghn, variables, about=_without_places(about(source)))


def read_network(net: str, num_classes: int, image_size: int) -> Architecture | Model:
    """The model of the zoo of that name, or the architecture in a JSON file.

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
        return Architecture.from_dict(read_json(path, "give an architecture"))
    except ValueError as error:
        raise ValueError(f"{net} holds no architecture: {error}") from None


def _read_arrays(path: Path) -> dict:
    """A state dict from a file."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    arrays = read_torch(path)
    if not isinstance(arrays, dict):
        raise ValueError(f"{path} holds no state dict, but a {type(arrays).__name__}")
    # Training programs save it beside other things.
    return arrays.get("state_dict", arrays)


def _read_variables(path: Path, network: Graph | Model) -> dict:
    """A network's variables from a file, or its parameters from a folder."""
    is_graph = isinstance(network, Graph)
    if path.suffix in _TORCH:
        arrays = _read_arrays(path)
        if any(name.startswith("params/") for name in arrays):  # Flax's names
            return unflatten_dict(arrays, sep="/")
        variables = from_torch(arrays, network)
        return {"params": variables} if is_graph else variables
    like = abstract_params(network) if is_graph else abstract_variables(network)["params"]
    return Checkpoints(path).load(params=like)[2]


def convert_network(
    net: Annotated[str, tyro.conf.Positional],
    source: _Path,
    target: _Path,
    num_classes: int = 10,
    image_size: int = 32,
    to: Framework = "torch",
) -> None:
    """Converts the parameters of a network.

    Args:
      net: a model of `ghn_jax.zoo` (resnet50), or a JSON file with an architecture
        (`Architecture.to_dict`).
      source: its parameters: a state dict, a .safetensors file with Flax's names, or a folder
        written by this program (which has no running statistics).
      target: the file or folder to write.
      num_classes: classes of the network.
      image_size: height and width of its images, in pixels.
      to: whose names and layouts a .safetensors file gets; a .pt is PyTorch's, a folder Flax's.
    """
    check_target(target, to)
    _check_there(source)
    network = read_network(net, num_classes, image_size)
    if isinstance(network, Architecture):
        network = build_graph(network, 1, num_classes=num_classes, image_size=image_size)
    write_network(_read_variables(source, network), network, target, to)


def write_network(
    variables: dict, network: Graph | Model, target: Path, to: Framework = "torch"
) -> None:
    """Writes a network's variables.

    Args:
      variables: with the key 'params'.
      network: a model of the zoo, or the graph of an architecture.
      target: a file, or a folder, which has no running statistics.
      to: whose names and layouts a .safetensors file gets; Flax's are paths such as
        'params/Dense_0/kernel'.

    Raises:
      ValueError: the variables are not the network's.
    """
    params = variables["params"]
    # Checks names and shapes.
    arrays = to_torch(params if isinstance(network, Graph) else variables, network)
    if target.suffix in _STATE_DICTS:
        write_torch(arrays, target)
    elif target.suffix == ".safetensors" and to == "flax":
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        write_tensors(target, {tree_name(path): np.asarray(leaf) for path, leaf in leaves})
    elif target.suffix == ".safetensors":
        write_tensors(target, arrays)
    else:
        Checkpoints(target).save(0, 0, params=params)
