"""Hypernetworks in the format of the authors' released checkpoints, read and written.

A file is a dictionary of `state_dict`, `config` (max_shape, num_classes, hypernet, decoder,
weight_norm, ve, layernorm, hid) and `epoch`, as `.pt`; or the tensors as `.safetensors`, with the
config as JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.deepnets1m.names import insert
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.torch_file import read_torch, write_torch

_CONFIG: dict[str, type | tuple[type, ...]] = {
    "max_shape": (tuple, list),
    "num_classes": int,
    "hypernet": str,
    "decoder": str,
    "weight_norm": bool,
    "ve": bool,
    "layernorm": bool,
    "hid": int,
}
_ENCODERS, _DECODERS = ("gatedgnn", "mlp"), ("conv", "mlp")  # that the authors' code has
# Fields of which the authors' code, as released, has one value only.
_ONLY = {"fan": "in", "shape_encoding": True, "stack": 1, "rounds": 1, "forward_only": False}
VIRTUAL_EDGES = 50  # s^(max) of every released checkpoint; their config only says whether


class _Tensor(NamedTuple):
    """A tensor of the authors', and where and how it is kept here."""

    name: str
    path: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def _same(x):
    return x


def _transpose(x):
    return x.T


def _tensors(ghn: GHN) -> list[_Tensor]:
    """Every tensor of a hypernetwork."""
    tensors = []

    def add(name, path, read=_same, write=_same):
        tensors.append(_Tensor(name, tuple(path.split(".")), read, write))

    def linear(name, path, kernel=()):
        # Dense layers of ours are 1x1 convolutions of theirs where `kernel` is (1, 1).
        add(
            f"{name}.weight",
            f"{path}.kernel",
            lambda w: w.reshape(w.shape[:2]).T,
            lambda w: w.T.reshape(*w.T.shape, *kernel),
        )
        add(f"{name}.bias", f"{path}.bias")

    add("embed.weight", "op_embedding")
    add("shape_enc.embed_spatial.weight", "shape_encoder.spatial")
    add("shape_enc.embed_channel.weight", "shape_encoder.channel")
    if ghn.layer_norm:
        add("ln.weight", "norm.scale")
        add("ln.bias", "norm.bias")
    if ghn.encoder == "mlp":
        linear("gnn.fc.0", "gnn.mlp_0")
        linear("gnn.fc.2", "gnn.mlp_1")
    else:
        linear("gnn.mlp.fc.0", "gnn.mlp_0")
        linear("gnn.mlp.fc.2", "gnn.mlp_1")
        if ghn.virtual_edges > 1:
            linear("gnn.mlp_ve.fc.0", "gnn.mlp_virtual_0")
            linear("gnn.mlp_ve.fc.2", "gnn.mlp_virtual_1")
        for ours, theirs in (("gru_input", "ih"), ("gru_hidden", "hh")):
            add(f"gnn.gru.weight_{theirs}", f"gnn.{ours}.kernel", _transpose, _transpose)
            add(f"gnn.gru.bias_{theirs}", f"gnn.{ours}.bias")
    # Outputs are (out, in) channels of a kernel there, (in, out) here; of an MLP, with positions.
    out, in_, height, width = ghn.max_shape
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    if ghn.decoder == "mlp":
        linear("decoder.mlp.fc.0", "decoder.mlp_0")
        last, shape, inputs = ("decoder.mlp.fc.2", "decoder.mlp_1"), (height * width,), ()
    else:
        linear("decoder.fc.0", "decoder.fc")
        linear("decoder.conv.0", "decoder.conv_0", (1, 1))
        last, shape, inputs = ("decoder.conv.2", "decoder.conv_1"), (1,), (1, 1)
    add(
        f"{last[0]}.weight",
        f"{last[1]}.kernel",
        lambda w: w.reshape(out, in_, *shape, -1).transpose(3, 1, 0, 2).reshape(w.shape[1], -1),
        lambda w: (
            w.reshape(-1, in_, out, *shape).transpose(2, 1, 3, 0).reshape(-1, len(w), *inputs)
        ),
    )
    add(
        f"{last[0]}.bias",
        f"{last[1]}.bias",
        lambda b: b.reshape(out, in_, *shape).transpose(1, 0, 2).reshape(-1),
        lambda b: b.reshape(in_, out, *shape).transpose(1, 0, 2).reshape(-1),
    )
    linear("decoder.class_layer_predictor.1", "decoder.class_kernel", inputs)
    linear("decoder_1d.fc.0", "decoder.vector_0")
    linear("decoder_1d.fc.2", "decoder.vector_1")
    linear("bias_class.1", "decoder.class_bias")
    return tensors


def _ghn_of(config: Mapping, state: Mapping[str, np.ndarray], path: Path) -> GHN:
    """The module that a config describes."""
    if not isinstance(config, Mapping) or set(config) != set(_CONFIG):
        given = sorted(config) if isinstance(config, Mapping) else type(config).__name__
        raise ValueError(f"{path}: its config has {given}; expected {sorted(_CONFIG)}")
    for key, kind in _CONFIG.items():
        if not isinstance(config[key], kind) or (kind is int and isinstance(config[key], bool)):
            raise ValueError(f"{path}: its config says {key} = {config[key]!r}")
    shape = tuple(config["max_shape"])
    if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{path}: max_shape is {shape}; expected four whole numbers")
    if min(config["num_classes"], config["hid"]) < 1:
        raise ValueError(
            f"{path}: num_classes is {config['num_classes']} and hid {config['hid']}; allowed: 1 "
            "or more"
        )
    if config["decoder"] not in _DECODERS or config["hypernet"] not in _ENCODERS:
        raise ValueError(
            f"{path}: decoder is {config['decoder']!r} and hypernet {config['hypernet']!r}; "
            "allowed: 'conv' or 'mlp', and 'gatedgnn' or 'mlp'"
        )
    embedding = state.get("embed.weight", np.empty(0))
    return GHN(
        config["num_classes"],
        shape,
        config["hypernet"],
        config["decoder"],
        virtual_edges=VIRTUAL_EDGES if config["ve"] else 1,
        virtual_includes_real=config["ve"],
        normalise=config["weight_norm"],
        layer_norm=config["layernorm"],
        features=config["hid"],
        dummy_op=len(embedding) != len(PRIMITIVES),
    )


def _read(path: Path) -> tuple[Mapping, Mapping[str, np.ndarray]]:
    """The config and the tensors of a file."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                config = json.loads((file.metadata() or {}).get("config", "null"))
                return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not {"state_dict", "config"} <= set(checkpoint):
        found = sorted(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} is no hypernetwork: it holds {found}, expected state_dict, config and epoch"
        )
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(x, np.ndarray) for x in state.values()):
        raise ValueError(f"{path} is no hypernetwork: its state_dict is not made of tensors")
    # Wrapped for several GPUs, names begin with the wrapper's.
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): x for name, x in state.items()}
    return checkpoint["config"], state


def load_torch_ghn(path: str | Path) -> tuple[GHN, dict]:
    """Loads a checkpoint of the authors' code: GHN-1, GHN-2 or MLP, `.pt` or `.safetensors`.

    Strict: every tensor of the file is used and every shape is checked. PyTorch is not needed, and
    nothing in the file is executed. The module sums over real edges among the virtual ones
    (`virtual_includes_real`), as these checkpoints were trained to.

    Returns:
      The module and its variables {'params': ...}.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not such a checkpoint, or tensors are missing, unknown or of another shape.
    """
    path = Path(path)
    config, state = _read(path)
    ghn = _ghn_of(config, state, path)
    tensors = _tensors(ghn)
    names = {t.name for t in tensors}
    missing, unknown = sorted(names - set(state)), sorted(set(state) - names)
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit its config: missing tensors: {', '.join(missing) or 'none'}; "
            f"unknown ones: {', '.join(unknown) or 'none'}"
        )
    wrong = []
    for name, expected in torch_shapes(ghn).items():
        if state[name].shape != expected or not np.issubdtype(state[name].dtype, np.floating):
            wrong.append(f"{name} is {state[name].dtype}{state[name].shape}, expected {expected}")
    if wrong:
        raise ValueError(f"{path} does not fit its config: {'; '.join(wrong)}")
    params: dict = {}
    for t in tensors:
        insert(params, t.path, jax.numpy.asarray(t.read(state[t.name]), np.float32))
    return ghn, {"params": params}


def torch_shapes(ghn: GHN) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a hypernetwork's tensors in the authors' code."""
    params = jax.eval_shape(lambda: ghn.init_variables(0))["params"]
    return {t.name: t.write(np.empty(_at(params, t.path).shape, np.bool_)).shape
            for t in _tensors(ghn)}  # fmt: skip


def _at(tree, path):
    for part in path:
        tree = tree[part]
    return tree


def to_torch_tensors(ghn: GHN, variables) -> dict[str, np.ndarray]:
    """A hypernetwork's variables, or their gradients, under the authors' names and layouts."""
    return {
        t.name: np.array(t.write(np.asarray(_at(variables["params"], t.path))), order="C")
        for t in _tensors(ghn)
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
    ablated = {f: getattr(ghn, f) for f, value in _ONLY.items() if getattr(ghn, f) != value}
    if ablated:
        raise ValueError(f"the authors' code has no hypernetwork with {ablated}; allowed: {_ONLY}")
    if ghn.encoder not in _ENCODERS or ghn.decoder not in _DECODERS:
        raise ValueError(
            f"the authors' code has no encoder {ghn.encoder!r} with a decoder {ghn.decoder!r}; "
            f"allowed: {', '.join(_ENCODERS)}; and {', '.join(_DECODERS)}"
        )
    virtual = ghn.encoder == "gatedgnn" and ghn.virtual_edges > 1
    if virtual and (ghn.virtual_edges != VIRTUAL_EDGES or not ghn.virtual_includes_real):
        raise ValueError(
            f"the authors' code sums over virtual edges of 1 to {VIRTUAL_EDGES} steps, this "
            f"hypernetwork over {1 if ghn.virtual_includes_real else 2} to {ghn.virtual_edges}: "
            "its embeddings would differ there. Train with virtual_includes_real=True "
            "(--virtual-includes-real) to exchange weights"
        )
    state = to_torch_tensors(ghn, variables)
    config = {
        "max_shape": tuple(ghn.max_shape),
        "num_classes": ghn.num_classes,
        "hypernet": ghn.encoder,
        "decoder": ghn.decoder,
        "weight_norm": ghn.normalise,
        "ve": ghn.virtual_edges > 1,
        "layernorm": ghn.layer_norm,
        "hid": ghn.features,
    }
    if path.suffix == ".pt":
        write_torch({"state_dict": state, "config": config, "epoch": epoch}, path)
    else:
        metadata = {"config": json.dumps(config), "epoch": str(epoch)}
        part = path.with_name(path.name + ".part")
        safetensors.numpy.save_file(state, part, metadata)
        part.replace(path)
