"""Every tensor of a hypernetwork: its name in the authors' code, and where and how it is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ghn_jax.hypernet.ghn import GHN


class TorchTensor(NamedTuple):
    """A tensor of the authors' code.

    Attributes:
      name: there.
      path: of the array here, which `read` makes from it, and `write` makes it from.
      also: another name there for the same tensor.
    """

    name: str
    path: tuple[str, ...]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    also: str = ""


def _same(x):
    return x


def _transpose(x):
    return x.T


def torch_tensors(ghn: GHN) -> list[TorchTensor]:
    """Every tensor of a hypernetwork."""
    tensors = []

    def add(name, path, read=_same, write=_same, also=""):
        tensors.append(TorchTensor(name, tuple(path.split(".")), read, write, also))

    def linear(name, path, kernel=(), also=""):
        # Dense layers of ours are 1x1 convolutions of theirs where `kernel` is (1, 1).
        add(
            f"{name}.weight",
            f"{path}.kernel",
            lambda w: w.reshape(w.shape[:2]).T,
            lambda w: w.T.reshape(*w.T.shape, *kernel),
            also and f"{also}.weight",
        )
        add(f"{name}.bias", f"{path}.bias", also=also and f"{also}.bias")

    add("embed.weight", "op_embedding")
    add("shape_enc.embed_spatial.weight", "shape_encoder.spatial")
    add("shape_enc.embed_channel.weight", "shape_encoder.channel")
    if ghn.layer_norm:
        add("ln.weight", "norm.scale")
        add("ln.bias", "norm.bias")
    if ghn.encoder == "graphormer":
        _graphormer(ghn, add, linear)
    elif ghn.encoder == "mlp":
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
    if ghn.decoder.startswith("lowrank"):
        _lowrank(ghn, linear)
        return tensors
    # Outputs are (out, in) channels of a kernel there, (in, out) here; of an MLP, with positions.
    out, in_, height, width = ghn.max_shape
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    if ghn.decoder == "mlp":
        linear("decoder.mlp.fc.0", "decoder.mlp_0")
        last, shape, inputs = ("decoder.mlp.fc.2", "decoder.mlp_1"), (height * width,), ()
    else:
        linear("decoder.fc.0", "decoder.fc")
        # Convolutions in GHN-2's code, linear layers in GHN-3's.
        inputs = () if ghn.encoder == "graphormer" else (1, 1)
        linear("decoder.conv.0", "decoder.conv_0", inputs)
        last, shape = ("decoder.conv.2", "decoder.conv_1"), (1,)
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


def _graphormer(ghn: GHN, add, linear) -> None:
    """The tensors of GHN-3's encoder."""
    for ours, theirs in (
        ("degree_in", "centrality_embed_in"),
        ("degree_out", "centrality_embed_out"),
        ("input_distance", "input_dist_embed"),
    ):
        add(f"gnn.0.{theirs}.weight", f"gnn.{ours}")
    add("gnn.0.attn.edge_embed.embed.weight", "gnn.edge_bias.table")
    linear("gnn.0.attn.proj_e.0", "gnn.edge_bias.mlp_0")
    linear("gnn.0.attn.proj_e.2", "gnn.edge_bias.mlp_1")
    for i in range(ghn.layers):
        theirs, ours = f"gnn.{i}", f"gnn.layer_{i}"
        for norm, name in (("ln1", "norm_attention"), ("ln2", "norm_mlp")):
            add(f"{theirs}.{norm}.weight", f"{ours}.{name}.scale")
            add(f"{theirs}.{norm}.bias", f"{ours}.{name}.bias")
        add(f"{theirs}.attn.to_qkv.weight", f"{ours}.qkv", _transpose, _transpose)
        linear(f"{theirs}.attn.to_out.0", f"{ours}.out")
        linear(f"{theirs}.ff.net.0", f"{ours}.mlp_0")
        linear(f"{theirs}.ff.net.3", f"{ours}.mlp_1")


def _lowrank(ghn: GHN, linear) -> None:
    """The tensors of LoGAH's decoder."""
    for i in range(3):
        linear(f"decoder.mlp.fc.{2 * i}", f"decoder.mlp_{i}")
    linear("decoder.l1", "decoder.unused_0")
    linear("decoder.l2", "decoder.expand", also="decoder.seq.1")
    if ghn.decoder == "lowrank":
        linear("decoder_1d.0", "decoder.unused_1")
        linear("bias_class.1", "decoder.unused_2")
    else:
        linear("decoder_1d.fc.0", "decoder.vector_0")
        linear("decoder_1d.fc.2", "decoder.vector_1")
        linear("bias_class.1", "decoder.class_bias")
