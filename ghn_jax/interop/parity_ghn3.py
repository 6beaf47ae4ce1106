"""Outputs of GHN-3 and LoGAH that those of GHN-2 have no like of.

`{net}_{ghn}_layers.npz` has the encoder's states of a network of `index.json` on their way;
`decoder_{ghn}.npz` tensors decoded from given embeddings; `gradient_{net}_{ghn}.npz` one training
step on one network, with label smoothing and the penalty of predicted parameters' norms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVE_ID, Graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.engine.compilation import single_run_options
from ghn_jax.hypernet.decoder import table_rows
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.graphormer import EdgeBias, Graphormer, GraphormerLayer
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.hypernet.tiling import node_tensors
from ghn_jax.interop.comparison import match_nodes, relative_error
from ghn_jax.interop.torch_ghn import to_torch_tensors
from ghn_jax.interop.torch_tensors import torch_tensors
from ghn_jax.training.meta_batch import make_meta_batch
from ghn_jax.training.meta_loss import cross_entropy, meta_loss
from ghn_jax.training.update import MetaStep

SMOOTHING, NORM_PENALTY = 0.1, 3e-5  # of the training steps

Load = Callable[[str], tuple[GHN, dict]]


def checks(
    folder: Path, entries: Sequence[Mapping], load: Load, images: jax.Array | None
) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """The names of a folder's files, and what computes their errors.

    Args:
      folder: of the authors' outputs.
      entries: of its `index.json`.
      load: the name of a hypernetwork -> the module and its variables.
      images: that networks were run on.
    """
    names = {entry["ghn"] for entry in entries}
    nets = {entry["file"].removesuffix(f"_{entry['ghn']}.npz"): entry for entry in entries}
    by_file = {entry["file"]: entry for entry in entries}

    def parts(path: Path) -> tuple[str, str]:
        """The network and the hypernetwork of a gradient's file."""
        stem = path.stem.removeprefix("gradient_")
        fitting = [name for name in names if stem.endswith(f"_{name}")]
        if not fitting:
            raise KeyError(f"the hypernetwork of {path.name}")
        name = max(fitting, key=len)
        return stem.removesuffix(f"_{name}"), name

    for path in sorted(folder.glob("*_layers.npz")):

        def layers(path=path):
            entry = by_file[path.name.replace("_layers", "")]
            with np.load(folder / entry["file"]) as network, np.load(path) as file:
                return check_layers(entry, dict(network), dict(file), *load(entry["ghn"]))

        yield path.name, layers
    for path in sorted(folder.glob("decoder_*.npz")):

        def decoder(path=path):
            with np.load(path) as file:
                return check_decoder(dict(file), *load(path.stem.removeprefix("decoder_")))

        yield path.name, decoder
    for path in sorted(folder.glob("gradient_*.npz")):
        if path.with_name(path.stem + "_nets.json").is_file():
            continue  # of GHN-2
        for way, gradient in (("engine", _engine_gradient), ("definition", _gradient)):

            def step(path=path, gradient=gradient):
                net, name = parts(path)
                arch = Architecture.from_dict(nets[net]["net"])
                with np.load(path) as file:
                    return check_step(dict(file), arch, *load(name), images, gradient)

            yield f"{path.name} ({way})", step


def encoder_states(ghn: GHN, variables, graph: Graph) -> dict[str, np.ndarray]:
    """The states of a Graphormer on their way, under the files' names and for padded nodes.

    Returns:
      (n, d) node states, (n, n, heads) edge biases [query, key], (heads, n, n) attention.
    """
    padded = pad_graphs([graph])
    shown = {
        Graphormer: ("node_states",), EdgeBias: ("__call__",),
        GraphormerLayer: ("__call__", "attended"), GHN: ("initial_states",),
    }  # fmt: skip

    def run(variables):
        final, found = ghn.apply(
            variables,
            padded,
            capture_intermediates=lambda module, name: name in shown.get(type(module), ()),
        )
        of = found["intermediates"]
        gnn = of["gnn"]
        bias = gnn["edge_bias"]["__call__"][0]
        real = jnp.arange(bias.shape[-1]) < len(graph)
        states = {
            "node_and_shape": of["initial_states"][0], "input": gnn["node_states"][0][0],
            "edge_bias": bias[0].transpose(1, 2, 0), "embedding": final,
        }  # fmt: skip
        for i in range(ghn.layers):
            layer = gnn[f"layer_{i}"]
            q, k, _ = layer["attended"][0]
            states[f"layer{i + 1}"] = layer["__call__"][0][0]
            states[f"attention{i + 1}"] = _attention(q, k, bias, real)[0]
        return states

    states = jax.jit(run, compiler_options=single_run_options())(variables)
    return {name: np.asarray(x) for name, x in states.items()}


def check_layers(
    entry: Mapping, network: Mapping, file: Mapping, ghn: GHN, variables
) -> dict[str, float]:
    """Errors of the encoder's states, from the initial embeddings on."""
    arch = Architecture.from_dict(entry["net"])
    graph = ghn.graph(arch, image_size=224 if entry.get("imagenet") else 32)
    wrong, order = match_nodes(entry, network, graph)
    rows = table_rows(pad_graphs([graph]).nodes["shape"], ghn.num_classes, ghn.max_shape[2])
    wrong += int((np.stack(rows, 1)[order] != file["shape_index"]).sum())
    errors = {}
    for name, states in encoder_states(ghn, variables, graph).items():
        if name.startswith("attention"):
            states = states[:, order][..., order]
        elif name == "edge_bias":
            states = states[order][:, order]
        else:
            states = states[order]
        errors[name] = relative_error(states, file[name])
    embedding = errors.pop("embedding")
    return {"graph": float(wrong), "states": max(errors.values()), "embedding": embedding}


def _attention(q: jax.Array, k: jax.Array, bias: jax.Array, real: jax.Array) -> jax.Array:
    """(B, heads, M, M) attention: it gives its weights where values are rows of the identity."""
    count, size = q.shape[1], q.shape[-1]
    one = jnp.broadcast_to(jnp.eye(count)[None, :, None], (*q.shape[:3], count))
    parts = [
        jax.nn.dot_product_attention(q, k, one[..., i : i + size], bias, real[None, None, None])
        for i in range(0, count, size)
    ]
    return jnp.concatenate(parts, -1).swapaxes(1, 2)


_PRIMITIVES = {
    "weight": "conv", "class_weight": "conv", "class_bias": "bias", "norm_weight": "bn",
    "norm_bias": "bn", "bias": "bias", "layer_scale": "conv",
}  # fmt: skip


def _graph_of(kind: str, shape: tuple[int, ...]) -> Graph:
    """A graph whose node 1 has a parameter of a kind that a file names."""
    primitive = "pos_enc" if len(shape) == 4 and shape[0] == 1 else _PRIMITIVES[kind]
    return Graph(
        np.array([PRIMITIVE_ID["input"], PRIMITIVE_ID[primitive]], np.int32),
        np.zeros((0, 3), np.int32),
        [None, shape],
        ["input", "x.weight"],
        np.zeros(2, np.int32),
        {"class_weight": (1,), "class_bias": (0, 1)}.get(kind, ()),
    )


def check_decoder(file: Mapping, ghn: GHN, variables) -> dict[str, float]:
    """Errors of tensors decoded from given embeddings, before and after normalisation."""
    given = [
        (str(kind), tuple(json.loads(str(text))))
        for kind, text in zip(file["kinds"], file["shapes"], strict=True)
    ]
    graphs = [_graph_of(*of) for of in given]

    def decode(variables):
        kinds = [ghn.tile_kind(graph, 1) for graph in graphs]
        return [
            ghn.apply(variables, jnp.asarray(file["x"][i : i + 1]), kind, method="decode")[0]
            for i, kind in enumerate(kinds)
        ]

    for _, shape in given:
        reason = ghn.undecodable(shape)
        if reason:
            raise ValueError(f"no decoder makes the shape {shape}: {reason}")
    tiles = jax.jit(decode, compiler_options=single_run_options())(variables)
    errors = []
    for i, ((kind, shape), graph, tile) in enumerate(zip(given, graphs, tiles, strict=True)):
        leaf = "bias" if kind in ("norm_bias", "bias", "class_bias") else None
        for name, normalise in (("raw", False), ("param", ghn.normalise)):
            tensors = node_tensors(graph, 1, np.asarray(tile), normalise, np)
            tensor = np.asarray(tensors[leaf or next(iter(tensors))])
            if tensor.ndim == 3:  # a positional encoding
                tensor = tensor.transpose(2, 0, 1)
            elif tensor.ndim > 1:
                tensor = np.moveaxis(tensor, (-1, -2), (0, 1))
            errors.append(relative_error(tensor.reshape(shape), file[f"{name}/{i:02d}"]))
    return {"parameters": max(errors)}


def _gradient(ghn: GHN, variables, arch: Architecture, images, labels):
    """Gradient of a training step's loss by its definition."""

    def loss(variables):
        return meta_loss(
            ghn, variables["params"], [arch], images, labels, smoothing=SMOOTHING,
            norm_penalty=NORM_PENALTY,
        )  # fmt: skip

    return jax.jit(jax.grad(loss), compiler_options=single_run_options())(variables)


def _engine_gradient(ghn: GHN, variables, arch: Architecture, images, labels):
    """The same as training computes it."""
    step = MetaStep(ghn, optax.identity(), smoothing=SMOOTHING, norm_penalty=NORM_PENALTY)
    try:
        update = step.prepare(make_meta_batch(ghn, [arch], image_size=images.shape[1]), len(images))
        params = variables["params"]
        _, gradient = step.gradient(params, update, images, labels, np.int32(0))
        return {"params": ravel_pytree(params)[1](gradient)}
    finally:
        step.close()


def check_step(
    file: Mapping, arch: Architecture, ghn: GHN, variables, images, gradient
) -> dict[str, float]:
    """Errors of one training step: logits, losses and gradient."""
    if images is None:
        raise ValueError("there is no images.npy here, nor in a folder beside it")
    labels = jnp.asarray(file["labels"], jnp.int32)
    params = ghn.predict(variables, arch)
    network = build_network(arch, ghn.num_classes)
    options = single_run_options()
    logits = jax.jit(network.apply, compiler_options=options)({"params": params}, images)
    norms = sum(float(jnp.linalg.norm(w.ravel())) for w in jax.tree.leaves(params))
    smooth = float(cross_entropy(logits, labels, SMOOTHING))
    losses = {
        "loss_plain": float(cross_entropy(logits, labels)),
        "loss_smooth": smooth,
        "sum_of_norms": norms,
        "loss": smooth + NORM_PENALTY * norms,
    }
    found = gradient(ghn, variables, arch, images, labels)
    theirs = {name.removeprefix("grad/"): x for name, x in file.items() if name.startswith("grad/")}
    scale = float(file["grad_norm"])
    ours = to_torch_tensors(ghn, found)
    # PyTorch gives a tensor of two names one gradient, under one of them.
    other = {a: b for t in torch_tensors(ghn) if t.also
             for a, b in ((t.name, t.also), (t.also, t.name))}  # fmt: skip
    worst = abs(float(optax.global_norm(found)) / scale - 1)
    for name, x in ours.items():
        # A tensor's gradient may be nothing but rounding, so errors are of the whole gradient.
        expected = theirs.get(name, theirs.get(other.get(name, ""), np.zeros(x.shape)))
        if x.shape != expected.shape:
            return {"gradient": float("inf")}
        worst = max(worst, float(np.linalg.norm(x - expected)) / scale)
    unknown = sorted(set(theirs) - set(ours))
    if unknown:
        raise ValueError(f"no tensors {', '.join(unknown)} here")
    return {
        "logits": relative_error(logits, file["logits"]),
        "loss": max(relative_error(value, file[name]) for name, value in losses.items()),
        "gradient": worst,
    }
