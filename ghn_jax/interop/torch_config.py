"""Configurations of the authors' hypernetworks: read, inferred from tensors, and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.hypernet.decoder import spatial_table
from ghn_jax.hypernet.ghn import GHN, check_choices

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
# What GHN-3's code and LoGAH's have beside these, and what it is where a config does not say.
_MORE: dict[str, Any] = {
    "hypernet": "gatedgnn",  # of which the code of GHN-3 reads nothing
    "decoder": "conv",
    "layers": 3,
    "heads": 8,
    "is_ghn2": False,
    "lora": False,
    "lora_r": 16,
    "max_ck_lora": 32,
    "use_1d_decoder": True,
    "act_layer": "gelu",
    "pretrained": False,
    "debug_level": 0,
}
_ENCODERS, _DECODERS = ("gatedgnn", "mlp"), ("conv", "mlp")  # that the code of GHN-2 has
# Fields of which the authors' code, as released, has one value only.
_ONLY = {"fan": "in", "shape_encoding": True, "stack": 1, "rounds": 1, "forward_only": False}
VIRTUAL_EDGES = 50  # s^(max) of every released checkpoint; their config only says whether

Tensors = Mapping[str, np.ndarray]


def _check_types(config: Mapping, types: Mapping[str, Any], path: Path) -> None:
    for key, kind in types.items():
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


def ghn_of(config: Any, state: Tensors, path: Path) -> GHN:
    """The module that a file's config describes.

    Args:
      config: of the file; None where it has none, and it has to be inferred.
      state: the file's tensors.
      path: of the file, for errors.

    Raises:
      ValueError: it describes none.
    """
    if config is None:
        config = infer(state, path)
    if isinstance(config, Mapping) and config.get("is_ghn2"):  # written by the code of GHN-3
        config = {key: value for key, value in config.items() if key in _CONFIG}
    newer = isinstance(config, Mapping) and not set(config) <= set(_CONFIG)
    expected = set(_CONFIG) | (set(_MORE) if newer else set())
    if newer:
        config = {**_MORE, **config}
    if not isinstance(config, Mapping) or set(config) != expected:
        given = sorted(config) if isinstance(config, Mapping) else type(config).__name__
        raise ValueError(f"{path}: its config has {given}; expected {sorted(expected)}")
    types = _CONFIG | ({key: type(value) for key, value in _MORE.items()} if newer else {})
    _check_types(config, types, path)
    if config["decoder"] not in _DECODERS or config["hypernet"] not in _ENCODERS:
        raise ValueError(
            f"{path}: decoder is {config['decoder']!r} and hypernet {config['hypernet']!r}; "
            "allowed: 'conv' or 'mlp', and 'gatedgnn' or 'mlp'"
        )
    embedding = state.get("embed.weight", np.empty(0))
    choices = {"encoder": config["hypernet"], "decoder": config["decoder"]}
    if newer:
        if config["act_layer"] != "gelu":
            raise ValueError(f"{path}: act_layer is {config['act_layer']!r}; allowed: 'gelu'")
        choices = {"encoder": "graphormer", "decoder": "conv"}
        choices |= {"layers": config["layers"], "heads": config["heads"]}
        if config["lora"]:
            choices["decoder"] = "lowrank_1d" if config["use_1d_decoder"] else "lowrank"
            choices |= {"rank": config["lora_r"], "factor_size": config["max_ck_lora"]}
    ghn = GHN(
        config["num_classes"],
        tuple(config["max_shape"]),
        virtual_edges=VIRTUAL_EDGES if config["ve"] else 1,
        virtual_includes_real=config["ve"] and not newer,
        normalise=config["weight_norm"],
        layer_norm=config["layernorm"],
        features=config["hid"],
        dummy_op=len(embedding) != len(PRIMITIVES),
        **choices,
    )
    try:
        check_choices(ghn)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return ghn


def infer(state: Tensors, path: Path) -> dict[str, Any]:
    """The config of a released file of GHN-2 or GHN-3, which has tensors and nothing else.

    Raises:
      ValueError: they do not say it.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].ndim < 2:
            raise ValueError(
                f"{path} is no hypernetwork: it has no config, and no matrix {name}; it has "
                f"{describe(state)}"
            )
        return state[name].shape

    if "decoder.l2.weight" in state:
        raise ValueError(
            f"{path} is a hypernetwork with a low-rank decoder, whose tensors do not say its "
            "max_shape; give a file with its config"
        )
    channels = round(shape("decoder.conv.2.weight")[0] ** 0.5)
    positions = shape("decoder.fc.0.weight")[0] // shape("decoder.conv.0.weight")[1]
    size = round(positions**0.5)
    if len(spatial_table(size)) + 1 != shape("shape_enc.embed_spatial.weight")[0]:
        raise ValueError(f"{path}: tables and decoder are for tiles of different sizes")
    config = {
        "max_shape": (channels, channels, size, size),
        "num_classes": shape("decoder.class_layer_predictor.1.weight")[0],
        "hypernet": "gatedgnn",
        "decoder": "conv",
        "weight_norm": True,
        "ve": True,
        "layernorm": "ln.weight" in state,
        "hid": shape("embed.weight")[1],
    }
    if "gnn.gru.weight_ih" in state:
        return config
    layers = sum(name.startswith("gnn.") and name.endswith(".ln1.weight") for name in state)
    heads = shape("gnn.0.attn.proj_e.2.weight")[0]
    return config | {"layers": layers, "heads": heads}


def describe(state: Mapping) -> str:
    """The first few names of what a file holds."""
    names = [str(name) for name in state]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def config_of(ghn: GHN) -> dict[str, Any]:
    """The config with which the authors' code makes a hypernetwork."""
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
    if ghn.encoder == "graphormer":
        config |= {"hypernet": "gatedgnn", "decoder": "conv", "is_ghn2": False}
        config |= {"layers": ghn.layers, "heads": ghn.heads}
        if ghn.decoder != "conv":
            size = ghn.factor_size or max(ghn.max_shape[i] * ghn.max_shape[i + 2] for i in range(2))
            config |= {"lora": True, "lora_r": ghn.rank, "max_ck_lora": size}
            config["use_1d_decoder"] = ghn.decoder == "lowrank_1d"
    return config


def check_expressible(ghn: GHN) -> None:
    """Raises ValueError where the authors' code cannot express a hypernetwork."""
    ablated = {f: getattr(ghn, f) for f, value in _ONLY.items() if getattr(ghn, f) != value}
    if ablated:
        raise ValueError(f"the authors' code has no hypernetwork with {ablated}; allowed: {_ONLY}")
    encoders, decoders = _ENCODERS, _DECODERS
    if ghn.encoder == "graphormer":
        encoders, decoders = ("graphormer",), ("conv", "lowrank", "lowrank_1d")
    if ghn.encoder not in encoders or ghn.decoder not in decoders:
        raise ValueError(
            f"the authors' code has no encoder {ghn.encoder!r} with a decoder {ghn.decoder!r}; "
            f"allowed: {', '.join(encoders)}; and {', '.join(decoders)}"
        )
    virtual = ghn.encoder != "mlp" and ghn.virtual_edges > 1
    sums = ghn.encoder == "gatedgnn"
    if virtual and sums and (ghn.virtual_edges != VIRTUAL_EDGES or not ghn.virtual_includes_real):
        raise ValueError(
            f"the authors' code sums over virtual edges of 1 to {VIRTUAL_EDGES} steps, this "
            f"hypernetwork over {1 if ghn.virtual_includes_real else 2} to {ghn.virtual_edges}: "
            "its embeddings would differ there. Train with virtual_includes_real=True "
            "(--virtual-includes-real) to exchange weights"
        )
    if virtual and ghn.virtual_edges != VIRTUAL_EDGES:
        raise ValueError(
            f"the authors' code has virtual edges of up to {VIRTUAL_EDGES} steps, this "
            f"hypernetwork of up to {ghn.virtual_edges}; allowed: {VIRTUAL_EDGES}, or 1 for none"
        )
