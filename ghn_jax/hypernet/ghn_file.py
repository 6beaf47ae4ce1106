"""A hypernetwork in one file: safetensors, with its configuration in the metadata.

For passing on what is trained: half the size in half precision, readable by anything that reads
safetensors, and nothing in it is executed. Training keeps folders of checkpoints instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ghn_jax.files.json_file import parse_json
from ghn_jax.files.tensors import read_tensors, write_tensors
from ghn_jax.hypernet.checkpoint import ghn_config, ghn_from_config
from ghn_jax.hypernet.ghn import GHN

_GHN, _ABOUT = "ghn", "about"  # keys of the metadata
_LARGEST = float(np.finfo(np.float16).max)


def tree_name(path) -> str:
    """The name of a leaf in a file: its keys, joined by slashes."""
    return "/".join(str(key.key) for key in path)


def write_ghn_file(
    path: str | Path,
    ghn: GHN,
    variables: Mapping[str, Any],
    *,
    half: bool = False,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a hypernetwork to a file.

    Args:
      path: of the file.
      ghn: the module.
      variables: {'params': ...} of it.
      half: in half precision (float16).
      about: what it was trained on and how, JSON-ready.

    Raises:
      FileExistsError: there is a file of that name; it is left as it is.
      ValueError: a parameter is not finite, or too large for half precision.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; give a new name")
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    arrays = {tree_name(place): np.asarray(leaf) for place, leaf in leaves}
    for name, array in arrays.items():
        largest = float(np.abs(array).max(initial=0))
        if not largest <= (_LARGEST if half else np.inf) or not np.isfinite(array).all():
            kind = "half precision" if half else "a file: it is not finite"
            raise ValueError(f"{name} has a number of size {largest:.3g}, which is not for {kind}")
    if half:
        arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    metadata = {_GHN: json.dumps(ghn_config(ghn)), _ABOUT: json.dumps(dict(about or {}))}
    write_tensors(path, arrays, metadata)


def is_ghn_file(path: Path) -> bool:
    """Whether a file of safetensors has the configuration of one of our hypernetworks."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return _GHN in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError):
        return False


def _parsed(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        found = parse_json(metadata.get(key, "{}"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: its {key!r} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: its {key!r} is no dictionary")
    return found


def read_ghn_file(path: str | Path) -> tuple[GHN, dict]:
    """Reads what `write_ghn_file` has written; the numbers become float32.

    Returns:
      The module and its variables {'params': ...}.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, holds no hypernetwork, or tensors are not those of its module.
    """
    path = Path(path)
    arrays, metadata = read_tensors(path)
    if _GHN not in metadata:
        raise ValueError(f"{path} holds no hypernetwork: its metadata have no {_GHN!r}")
    ghn = ghn_from_config(_parsed(path, metadata, _GHN), path)
    expected = jax.eval_shape(lambda: ghn.init_variables(0))["params"]
    leaves, tree = jax.tree_util.tree_flatten_with_path(expected)
    shapes = {tree_name(place): leaf.shape for place, leaf in leaves}
    found = {name: array.shape for name, array in arrays.items()}
    if shapes != found:
        wrong = sorted(set(shapes.items()) ^ set(found.items()))
        raise ValueError(
            f"{path} does not fit the hypernetwork that it describes: {wrong[0][0]} and "
            f"{len(wrong) - 1} others are missing, unknown or of another shape"
        )
    params = [jnp.asarray(arrays[tree_name(place)], jnp.float32) for place, _ in leaves]
    return ghn, {"params": jax.tree.unflatten(tree, params)}


def read_about(path: str | Path) -> dict[str, Any]:
    """What a file says about its hypernetwork: see `write_ghn_file`.

    Raises:
      FileNotFoundError, ValueError: as `read_ghn_file`.
    """
    return _parsed(Path(path), read_tensors(path)[1], _ABOUT)
