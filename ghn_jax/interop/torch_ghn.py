"""Hypernetworks in the format of the authors' released checkpoints, read and written.

GHN-2's files and training checkpoints of GHN-3 and LoGAH are a dictionary of `state_dict`, `config`
and `epoch`, as `.pt`. The released files of GHN-3 hold the tensors alone, written by joblib. Here
both may be `.safetensors`, too, with the config as JSON in the metadata or in a file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ghn_jax.deepnets1m.names import insert
from ghn_jax.files.json_file import parse_json, read_json
from ghn_jax.files.tensors import read_tensors, write_tensors
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.joblib_file import is_joblib, read_joblib
from ghn_jax.interop.torch_config import check_expressible, config_of, describe, ghn_of
from ghn_jax.interop.torch_file import read_torch, write_torch
from ghn_jax.interop.torch_tensors import torch_tensors

# Tables of GHN-3 that are the hypernetwork's own in released files, the first layer's in others.
_TABLES = ("centrality_embed_in.weight", "centrality_embed_out.weight", "input_dist_embed.weight")


def _read_safetensors(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    state, metadata = read_tensors(path)
    try:
        config = parse_json(metadata.get("config", "null"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: its config is no JSON ({error})") from None
    beside = path.with_suffix(".json")
    if config is None and beside.is_file():
        found = read_json(beside, f"it should hold the config of {path.name}")
        if not isinstance(found, dict) or "config" not in found:
            raise ValueError(f"{path} cannot be read: {beside} has no 'config'")
        config = found["config"]
    return config, state


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors: the size of its header, and JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(9)
    size = int.from_bytes(first[:8], "little")
    return first[8:] == b"{" and size < path.stat().st_size


def _is_state(tree: Any) -> bool:
    return (
        isinstance(tree, Mapping)
        and len(tree) > 0
        and all(isinstance(x, np.ndarray) for x in tree.values())
    )


def _read(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The config of a file, None if it has none, and its tensors."""
    config: Any
    if path.suffix == ".safetensors" or is_safetensors(path):
        config, state = _read_safetensors(path)
    else:
        checkpoint = read_joblib(path) if is_joblib(path) else read_torch(path)
        if _is_state(checkpoint):
            config, state = None, checkpoint
        elif not isinstance(checkpoint, Mapping) or not {"state_dict", "config"} <= set(checkpoint):
            found = (describe(checkpoint) if isinstance(checkpoint, Mapping)
                     else f"a {type(checkpoint).__name__}")  # fmt: skip
            raise ValueError(
                f"{path} is no hypernetwork: it holds {found}, expected state_dict, config and "
                "epoch, or tensors alone"
            )
        else:
            config, state = checkpoint["config"], checkpoint["state_dict"]
            if not _is_state(state):
                raise ValueError(
                    f"{path} is no hypernetwork: its state_dict is not made of tensors"
                )
    # Wrapped for several GPUs, names begin with the wrapper's.
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    return config, {f"gnn.0.{k}" if k in _TABLES else k: x for k, x in state.items()}


def load_torch_ghn(path: str | Path) -> tuple[GHN, dict]:
    """Loads a checkpoint of the authors' code: GHN-1, GHN-2, MLP, GHN-3 or LoGAH.

    Strict: every tensor of the file is used and every shape is checked. PyTorch is not needed, and
    nothing in the file is executed. A GHN-2 sums over real edges among the virtual ones
    (`virtual_includes_real`), as these checkpoints were trained to.

    Returns:
      The module and its variables {'params': ...}.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not such a checkpoint, or tensors are missing, unknown or of another shape.
    """
    path = Path(path)
    config, state = _read(path)
    if config is None and not any(name.startswith(("gnn.", "decoder.")) for name in state):
        raise ValueError(
            f"{path} is no hypernetwork: its config has NoneType, and its tensors are "
            f"{describe(state)}"
        )
    ghn = ghn_of(config, state, path)
    tensors = torch_tensors(ghn)
    names = {name for t in tensors for name in (t.name, t.also) if name}
    missing, unknown = sorted(names - set(state)), sorted(set(state) - names)
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit its config: missing tensors: {', '.join(missing) or 'none'}; "
            f"unknown ones: {', '.join(unknown) or 'none'}"
        )
    wrong = []
    for name, expected in torch_shapes(ghn).items():
        # The code of GHN-3 has linear layers where that of GHN-2 has 1x1 convolutions.
        allowed = {expected, expected[:2]} if expected[2:] == (1, 1) else {expected}
        if state[name].shape not in allowed or not np.issubdtype(state[name].dtype, np.floating):
            wrong.append(f"{name} is {state[name].dtype}{state[name].shape}, expected {expected}")
    wrong += [
        f"{t.name} and {t.also}, which are one tensor, differ"
        for t in tensors
        if t.also and not wrong and not np.array_equal(state[t.name], state[t.also])
    ]
    if wrong:
        raise ValueError(f"{path} does not fit its config: {'; '.join(wrong)}")
    params: dict = {}
    for t in tensors:
        insert(params, t.path, jax.numpy.asarray(t.read(state[t.name]), np.float32))
    return ghn, {"params": params}


def torch_shapes(ghn: GHN) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a hypernetwork's tensors in the authors' code."""
    params = jax.eval_shape(lambda: ghn.init_variables(0))["params"]
    return {
        name: t.write(np.empty(_at(params, t.path).shape, np.bool_)).shape
        for t in torch_tensors(ghn)
        for name in (t.name, t.also)
        if name
    }


def _at(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def to_torch_tensors(ghn: GHN, variables) -> dict[str, np.ndarray]:
    """A hypernetwork's variables, or their gradients, under the authors' names and layouts."""
    return {
        name: np.array(t.write(np.asarray(_at(variables["params"], t.path))), order="C")
        for t in torch_tensors(ghn)
        for name in (t.name, t.also)
        if name
    }


def save_torch_ghn(ghn: GHN, variables, path: str | Path, *, epoch: int = 0) -> None:
    """Saves a hypernetwork so that the authors' code loads and runs it.

    Args:
      ghn: the module.
      variables: {'params': ...} of it.
      path: a file ending in .pt or .safetensors.
      epoch: stored beside the tensors.

    Raises:
      ValueError: the authors' code cannot express the module, or another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"cannot save to {path.name!r}; allowed suffixes: .pt, .safetensors")
    check_expressible(ghn)
    state, config = to_torch_tensors(ghn, variables), config_of(ghn)
    if path.suffix == ".pt":
        write_torch({"state_dict": state, "config": config, "epoch": epoch}, path)
    else:
        write_tensors(path, state, {"config": json.dumps(config), "epoch": str(epoch)})
