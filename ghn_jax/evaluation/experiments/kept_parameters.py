"""Trained parameters that one experiment keeps and others read.

`trained-networks --keep-parameters` writes `<out>/parameters/<network>.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax

from ghn_jax.files.tensors import read_tensors, write_tensors


def parameters_folder(out: Path) -> Path:
    """Where `trained-networks` keeps parameters, in the folder that it writes."""
    return out / "parameters"


def parameters_file(out: Path, network: str) -> Path:
    """The file of one network there."""
    return parameters_folder(out) / f"{network}.safetensors"


def existing_file(out: Path, network: str) -> Path:
    """The same, of a network that was trained.

    Raises:
      ValueError: there is none.
    """
    file = parameters_file(out, network)
    if not file.exists():
        raise ValueError(f"there is no {file}; make it with ghn-paper trained-networks "
                         f"--networks {network} --keep-parameters --out {out}")  # fmt: skip
    return file


def write_parameters(file: Path, params: Mapping) -> None:
    """Writes a `params` tree."""
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree.flatten_with_path(params)
    write_tensors(file, {".".join(key.key for key in keys): leaf for keys, leaf in leaves})


def read_parameters(file: Path) -> dict:
    """A `params` tree that `write_parameters` wrote."""
    params: dict = {}
    for name, array in read_tensors(file)[0].items():
        *parts, leaf = name.split(".")
        tree = params
        for part in parts:
            tree = tree.setdefault(part, {})
        tree[leaf] = array
    return params
