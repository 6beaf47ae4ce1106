"""GHN-3's encoder and decoder, LoGAH's, and their files; and the authors' numbers."""

import argparse
import bz2
import collections
import dataclasses
import functools
import gzip
import io
import json
import lzma
import pickle
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from ghn_jax.deepnets1m.architecture import VIT, Architecture, Genotype
from ghn_jax.engine.engine import Engine
from ghn_jax.hypernet import graphormer
from ghn_jax.hypernet.checkpoint import load_ghn, save_ghn
from ghn_jax.hypernet.ghn import GHN, free_decoder
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.hypernet.presets import PRESETS, preset
from ghn_jax.hypernet.sharding import param_shardings
from ghn_jax.hypernet.tiling import TileKind
from ghn_jax.interop import parity, parity_ghn3
from ghn_jax.interop.joblib_file import read_joblib
from ghn_jax.interop.torch_ghn import load_torch_ghn, save_torch_ghn, to_torch_tensors
from ghn_jax.training.meta_batch import make_meta_batch
from ghn_jax.training.meta_loss import meta_loss
from ghn_jax.training.update import MetaStep

EDGES = (("conv_1x1", 0), ("sep_conv_3x3", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), 3, C=8)
GRAPHORMER = {"encoder": "graphormer", "features": 16, "layers": 2, "heads": 4, "dummy_op": False}
GHN3 = GHN(max_shape=(16, 16, 11, 11), **GRAPHORMER)
LOGAH = GHN(max_shape=(16, 16, 11, 11), decoder="lowrank", rank=3, **GRAPHORMER)
LOGAH_1D = dataclasses.replace(LOGAH, decoder="lowrank_1d", factor_size=200)


@functools.cache
def perturbed(ghn: GHN) -> dict:
    """Random variables without zero biases or layer norms that do nothing."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: ghn.init_variables(0)))
    rng = np.random.default_rng(0)
    noise = [0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(x) for x in noise])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ghn3-t", 6_906_632),
        ("ghn3-s", 35_810_368),
        ("ghn3-l", 214_668_960),
        ("ghn3-xl", 654_365_184),
        ("logah-tiny", 2_540_380),  # 2.5M and 21.4M in its paper
        ("logah-small", 21_412_794),
    ],
)
def test_published_numbers_of_parameters(name, count):
    ghn = preset(name)
    variables = jax.eval_shape(lambda: ghn.init_variables(0))
    assert sum(x.size for x in jax.tree.leaves(variables)) == count
    assert set(PRESETS) == {*(f"ghn3-{s}" for s in ("t", "s", "l", "xl")), "logah-tiny",
                            "logah-small"}  # fmt: skip


def test_presets_for_small_images():
    ghn = preset("ghn3-t", 10, remat=True)
    variables = jax.eval_shape(lambda: ghn.init_variables(0))
    assert sum(x.size for x in jax.tree.leaves(variables)) == 4_531_500
    assert ghn.max_shape == (64, 64, 11, 11) and ghn.remat
    with pytest.raises(ValueError, match="no hypernetwork is called 'ghn4'; allowed: ghn3-t"):
        preset("ghn4")


@pytest.fixture(scope="module")
def graphs():
    return [GHN3.graph(arch) for arch in (SMALL, SMALL.replace(n_cells=5))]


def test_a_batch_is_its_members_and_padding_changes_nothing(graphs):
    variables, count = perturbed(GHN3), sum(map(len, graphs))
    apply = jax.jit(lambda graph: GHN3.apply(variables, graph))
    together = apply(pad_graphs(graphs))
    largest = max(map(len, graphs))
    apart = apply(pad_graphs(graphs, largest=largest))
    np.testing.assert_allclose(apart[:count], together[:count], rtol=1e-5, atol=1e-5)
    start = 0
    for graph in graphs:
        n = len(graph)
        alone = GHN3.apply(variables, pad_graphs([graph], n_node=n + 1, n_edge=len(graph.edges)))
        padded = GHN3.embed(variables, graph)
        np.testing.assert_allclose(apart[start : start + n], alone[:n], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(padded, alone[:n], rtol=1e-5, atol=1e-5)
        start += n
    with pytest.raises(ValueError, match=f"more than largest={largest - 1}; raise it"):
        pad_graphs(graphs, largest=largest - 1)


def test_graphs_side_by_side_are_vmapped(graphs):
    variables = perturbed(GHN3)
    padded = [pad_graphs([g], n_node=128, n_edge=4096, n_step=128) for g in graphs]
    stacked = jax.tree.map(lambda *x: np.stack(x), *padded)
    together = jax.jit(jax.vmap(lambda graph: GHN3.apply(variables, graph)))(stacked)
    for states, graph in zip(together, graphs, strict=True):
        expected = GHN3.embed(variables, graph)
        np.testing.assert_allclose(states[: len(graph)], expected, rtol=1e-5, atol=1e-5)


def edge_by_edge(params, lengths):
    """The bias as it is defined: an MLP of both embeddings for each pair of nodes."""
    table, first, second = params["table"], params["mlp_0"], params["mlp_1"]
    pairs = np.concatenate([table[lengths + 2], table[lengths.T + 2]], -1)
    hidden = np.maximum(pairs @ first["kernel"] + first["bias"], 0)
    return (hidden @ second["kernel"] + second["bias"]).transpose(2, 0, 1)


def test_the_bias_of_a_pair_is_of_both_paths(graphs):
    params = perturbed(GHN3)["params"]["gnn"]["edge_bias"]
    graph = pad_graphs(graphs[:1])
    lengths = graphormer.path_lengths(graph, graphormer.nodes_apart(graph))
    bias = graphormer.EdgeBias(16, 4).apply({"params": params}, lengths)
    expected = edge_by_edge(params, np.asarray(lengths)[0])
    np.testing.assert_allclose(bias[0], expected, rtol=1e-5, atol=1e-5)


def test_remat_and_bfloat16(graphs):
    """The one changes nothing, the other little."""
    small = dataclasses.replace(GHN3, layers=1)
    variables, graph = perturbed(small), pad_graphs(graphs[:1])

    def loss(ghn):
        def of(variables):
            return (ghn.apply(variables, graph)[: len(graphs[0])] ** 3).sum()

        return jax.device_get(jax.jit(jax.value_and_grad(of))(variables))

    value, gradient = loss(small)
    again, same = loss(dataclasses.replace(small, remat=True))
    near, roughly = loss(dataclasses.replace(small, bfloat16=True))
    flat, same, roughly = (ravel_pytree(tree)[0] for tree in (gradient, same, roughly))
    norm = jnp.linalg.norm(flat)
    assert abs(again - value) < 1e-5 * abs(value)
    assert jnp.linalg.norm(same - flat) < 1e-5 * norm
    assert abs(near - value) < 0.05 * abs(value)
    assert 1e-4 * norm < jnp.linalg.norm(roughly - flat) < 0.2 * norm


@pytest.mark.parametrize("height,width", [(1, 1), (2, 2), (3, 3), (1, 7), (4, 6), (11, 11)])
def test_kernels_are_the_centres_of_tiles(height, width):
    variables = perturbed(GHN3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16), np.float32))
    whole = GHN3.apply(variables, x, TileKind("kernel", 11, 11), method="decode")
    part = GHN3.apply(variables, x, TileKind("kernel", height, width), method="decode")
    top, left = 5 - height // 2, 5 - width // 2
    expected = whole.reshape(2, 11, 11, 16, 16)[:, top : top + height, left : left + width]
    np.testing.assert_allclose(part, expected.reshape(part.shape), rtol=1e-5, atol=1e-5)


def test_shapes_that_decoders_make():
    assert GHN3.undecodable((8, 3, 16, 16)) is None
    assert "up to 11x11" in GHN3.undecodable((8, 3, 16, 3))
    assert LOGAH.undecodable((8, 3, 16, 16)) is None
    assert "176 rows, fewer than 16 channels of 16 positions" in LOGAH.undecodable((40, 3, 16, 16))
    assert "layer scales" in LOGAH.undecodable((4, 5, 6))
    assert LOGAH.undecodable((4, 1, 1)) is None


def test_a_low_rank_weight_is_the_product_of_its_factors():
    """The whole factors, and then what of them a kernel reads."""
    params, r, size = perturbed(LOGAH)["params"]["decoder"], 3, 176
    x = np.random.default_rng(0).standard_normal((1, 16), np.float32)
    y = x
    for i in range(3):
        y = (np.maximum(y, 0) if i else y) @ params[f"mlp_{i}"]["kernel"] + params[f"mlp_{i}"][
            "bias"
        ]
    y = np.maximum(y.reshape(2 * r, r), 0) @ params["expand"]["kernel"] + params["expand"]["bias"]
    rows, columns = y.reshape(2, size, r)
    kind = LOGAH.tile_kind(graph_of((10, 6, 3, 5)), 0)
    assert kind == TileKind("kernel", 3, 5, 16, 8)
    weight = LOGAH.apply({"params": perturbed(LOGAH)["params"]}, x, kind, method="decode")
    product = (rows[: 16 * 3] @ columns[: 8 * 5].T).reshape(16, 3, 8, 5)
    expected = product.transpose(1, 3, 2, 0).reshape(weight.shape)
    np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-4)


def graph_of(shape):
    graph = GHN3.graph(SMALL)
    place = next(i for i, s in enumerate(graph.param_shapes) if s and len(s) == len(shape))
    order = [place, *(i for i in range(len(graph)) if i != place)]
    shapes = [shape, *(graph.param_shapes[i] for i in order[1:])]
    return dataclasses.replace(graph, primitives=graph.primitives[order], param_shapes=shapes)


@pytest.mark.parametrize("size", [(3, 3), (1, 7), (14, 12)])
def test_the_part_of_the_parameters_that_a_kernel_reads(size):
    """From it come the same tiles and gradients as from all of them."""
    params, decoder = perturbed(GHN3)["params"]["decoder"], free_decoder(GHN3)
    kind = TileKind("kernel", *size)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16), np.float32))

    @jax.jit
    def both(params):
        part = decoder.part(params, kind)
        tiles, vjp = jax.vjp(lambda part: decoder.decode_part(params, part, x, kind), part)
        own = tiles, decoder.add_part(params, vjp(tiles)[0], kind)  # to some sums so far
        expected, vjp = jax.vjp(lambda params: decoder.apply({"params": params}, x, kind), params)
        return own, (expected, jax.tree.map(jnp.add, params, vjp(expected)[0]))

    for a, b in zip(*map(jax.tree.leaves, both(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_an_updates_gradient_is_that_of_the_definition():
    ghn = dataclasses.replace(LOGAH, layers=1)
    architectures = [Architecture(VIT, 1, C=24, C_mult=1, preproc=False)]
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((4, 16, 16, 3), np.float32))
    labels = jnp.asarray(rng.integers(0, 10, 4), jnp.int32)
    variables = perturbed(ghn)
    options = {"smoothing": 0.1, "norm_penalty": 1e-3}
    step = MetaStep(ghn, optax.identity(), **options)
    update = step.prepare(make_meta_batch(ghn, architectures, image_size=16), len(images))
    params = variables["params"]
    _, found = step.gradient(params, update, images, labels, np.int32(0))
    step.close()

    def loss(params):
        return meta_loss(ghn, params, architectures, images, labels, **options)

    expected = ravel_pytree(jax.jit(jax.grad(loss))(params))[0]
    assert jnp.linalg.norm(found - expected) < 1e-4 * jnp.linalg.norm(expected)


def test_parameters_are_sharded_where_they_are_large():
    ghn = dataclasses.replace(GHN3, features=32)
    shapes = jax.eval_shape(lambda: ghn.init_variables(0))["params"]
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    shardings = param_shardings(shapes, mesh, "model", least=1024)
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    qkv = shardings["gnn"]["layer_0"]["qkv"]
    assert qkv.shard_shape((32, 96)) == (32, 48)
    assert shardings["norm"]["scale"].is_fully_replicated
    params = perturbed(ghn)["params"]
    graph = pad_graphs([ghn.graph(SMALL)])
    apply = jax.jit(lambda params: ghn.apply({"params": params}, graph))
    states = apply(jax.device_put(params, shardings))
    np.testing.assert_allclose(states, apply(params), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no axis 'data'; allowed: model"):
        param_shardings(shapes, mesh, "data")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "heads that divide the features"),
        ({"layers": 0}, "one layer or more"),
        ({"decoder": "lowrank", "rank": 0}, "rank is 0"),
        ({"encoder": "transformer"}, "allowed: 'gatedgnn', 'graphormer', 'mlp'"),
    ],
)
def test_choices_that_there_are_not(fields, message):
    ghn = dataclasses.replace(GHN3, **fields)
    with pytest.raises(ValueError, match=message):
        ghn.init_variables(0)


# --- Files ----------------------------------------------------------------------------------------


class Named:
    """Pickles as a class or function of a library that is not here."""

    def __init__(self, module, name, *arguments):
        self.arguments = arguments
        self.named = type(name, (), {"__module__": module, "__qualname__": name})


class Pickler(pickle._Pickler):
    """Writes `Named` objects, and `persistent` tuples as persistent ids."""

    def persistent_id(self, obj):
        return obj[1] if isinstance(obj, tuple) and obj[:1] == ("persistent",) else None

    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Named):
            return super().save(obj, save_persistent_id)
        self.write(f"c{obj.named.__module__}\n{obj.named.__qualname__}\n".encode())
        if obj.arguments:
            super().save(obj.arguments[0])
            self.write(pickle.REDUCE)
        return None


def pickled(*objects, protocol=4):
    """Pickles one after another, as joblib does; PyTorch's older format has protocol 2."""
    stream = io.BytesIO()
    for obj in objects:
        Pickler(stream, protocol=protocol).dump(obj)
    return stream.getvalue()


def joblib_dump(state):
    """A state dict as `joblib.dump` writes it, without compression."""

    def tensor(x):
        kind = Named("torch", "FloatStorage")
        storage = pickled(
            0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True},
            ("persistent", ("storage", kind, "1", "cpu", x.size, None)), ["1"], protocol=2,
        ) + struct.pack("<q", x.size) + x.astype("<f4").tobytes()  # fmt: skip
        strides = tuple(s // 4 for s in np.empty(x.shape, "<f4").strides)
        arguments = (
            Named("torch.storage", "_load_from_bytes", (storage,)), 0, x.shape, strides, False,
            collections.OrderedDict(),
        )  # fmt: skip
        return Named("torch._utils", "_rebuild_tensor_v2", arguments)

    return pickled(collections.OrderedDict((k, tensor(v)) for k, v in state.items()))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("ghn", [GHN3, LOGAH, LOGAH_1D], ids=["ghn3", "logah", "logah 1d"])
def test_there_and_back(ghn, suffix, tmp_path):
    save_torch_ghn(ghn, perturbed(ghn), tmp_path / f"a{suffix}")
    again, loaded = GHN.from_pretrained(tmp_path)
    assert again == dataclasses.replace(ghn, factor_size=again.factor_size)
    assert_same(loaded, perturbed(ghn))


@pytest.mark.parametrize(
    "compress", [bytes, zlib.compress, gzip.compress, bz2.compress, lzma.compress]
)
def test_released_files_are_read_without_a_config(compress, tmp_path):
    state = to_torch_tensors(GHN3, perturbed(GHN3))
    released = {k.removeprefix("gnn.0.") if "gnn.0.c" in k or "input_dist" in k else k: v
                for k, v in state.items()}  # fmt: skip
    assert "centrality_embed_in.weight" in released and "input_dist_embed.weight" in released
    (tmp_path / "ghn3.pt").write_bytes(compress(joblib_dump(released)))
    ghn, variables = GHN.from_pretrained(tmp_path / "ghn3.pt")
    assert ghn == GHN3
    assert_same(variables, perturbed(GHN3))


def test_a_released_ghn2_is_read_too(tmp_path):
    ghn = GHN(max_shape=(8, 8, 11, 11), virtual_includes_real=True, dummy_op=False, features=8)
    state = to_torch_tensors(ghn, perturbed(ghn))
    (tmp_path / "ghn2.pt").write_bytes(joblib_dump(state))
    again, variables = GHN.from_pretrained(tmp_path / "ghn2.pt")
    assert again == ghn
    assert_same(variables, perturbed(ghn))


def test_training_checkpoints_hold_options_and_an_optimizer(tmp_path):
    """`argparse.Namespace` is read as plain data, and nothing else is made of it."""
    save_torch_ghn(GHN3, perturbed(GHN3), tmp_path / "a.pt")
    from ghn_jax.interop import torch_file

    tree = torch_file.read_torch(tmp_path / "a.pt")
    data = pickle.dumps(argparse.Namespace(lr=0.1, name="x"), 2)
    options = torch_file._Reader(io.BytesIO(data), None, "").load()
    assert vars(options) == {"lr": 0.1, "name": "x"} and type(options) is torch_file.Options
    torch_file.write_torch({**tree, "optimizer": {"state": {}}, "step": 3}, tmp_path / "b.pt")
    assert_same(load_torch_ghn(tmp_path / "b.pt")[1], perturbed(GHN3))


def test_nothing_of_a_file_is_executed(tmp_path):
    path = tmp_path / "a.pt"
    for evil in (
        Named("os", "system", ("true",)),
        Named("builtins", "eval", ("1",)),
        Named("joblib.numpy_pickle", "NumpyArrayWrapper"),
        Named("torch.storage", "_load_from_bytes", (pickled(Named("os", "system", ("true",))),)),
    ):
        path.write_bytes(pickled({"x": evil}))
        with pytest.raises(ValueError, match="it holds a (os|builtins|joblib)"):
            read_joblib(path)


def test_a_tensor_that_is_cut_short(tmp_path):
    whole = joblib_dump({"x": np.zeros(100)})
    for size in (50, 200, len(whole) - 30):
        (tmp_path / "a.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot be read"):
            read_joblib(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'{"ghn": {}}', "give its folder"),
        (b"\x89HDF\r\n", "DeepNets-1M"),
        (b"", "an empty file"),
        (b"hello", "nothing that is known"),
        (pickled(0x1950A86A20F9469CFC6C, protocol=2), "PyTorch before 1.6"),
        (joblib_dump({"conv1.weight": np.zeros(3)}), "is no hypernetwork: .* conv1.weight"),
        (pickled({"state_dict": {}, "norm": 1}), "is no hypernetwork: it holds state_dict, norm"),
    ],
)
def test_files_that_hold_no_hypernetwork(content, message, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        GHN.from_pretrained(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GHN.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="no hypernetwork, but nothing"):
        GHN.from_pretrained(tmp_path)
    save_ghn(tmp_path / "ours", LOGAH, perturbed(LOGAH))
    for load in (GHN.from_pretrained, load_ghn):
        ghn, variables = load(tmp_path / "ours")
        assert ghn == LOGAH
        assert_same(variables, perturbed(LOGAH))


def test_what_cannot_be_loaded_or_saved(tmp_path):
    with pytest.raises(ValueError, match="no encoder 'graphormer' with a decoder 'mlp'"):
        save_torch_ghn(dataclasses.replace(GHN3, decoder="mlp"), {}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="virtual edges of up to 50 steps"):
        save_torch_ghn(dataclasses.replace(GHN3, virtual_edges=9), {}, tmp_path / "a.pt")
    state = to_torch_tensors(LOGAH, perturbed(LOGAH))
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(state, path)
    with pytest.raises(ValueError, match="do not say its max_shape"):
        load_torch_ghn(path)
    save_torch_ghn(LOGAH, perturbed(LOGAH), path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "digest"}
    state["decoder.seq.1.weight"] = state["decoder.seq.1.weight"] + 1
    safetensors.numpy.save_file(state, path, metadata)
    with pytest.raises(ValueError, match="which are one tensor, differ"):
        load_torch_ghn(path)
    config = json.loads(metadata["config"])
    for change, message in (
        ({"heads": 5}, "heads that divide"),
        ({"lora_r": "3"}, "lora_r = '3'"),
        ({"lora_r": 4}, "expected"),
        ({"act_layer": "relu"}, "act_layer is 'relu'"),
    ):
        changed = {**metadata, "config": json.dumps({**config, **change})}
        safetensors.numpy.save_file(state, path, changed)
        with pytest.raises(ValueError, match=message):
            load_torch_ghn(path)


# --- The authors' numbers -------------------------------------------------------------------------

NETWORKS = ("vit_small_ghn3_imagenet", "arch04_logah_1d")


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden3"
    if not folder.is_dir():
        pytest.skip(f"no golden files at {folder}")
    return folder


def graph_in(entry, ghn):
    arch = Architecture.from_dict(entry["net"])
    return ghn.graph(arch, image_size=224 if entry["imagenet"] else 32)


@pytest.mark.parametrize("name", NETWORKS)
def test_embeddings_and_parameters(golden, name, monkeypatch):
    entry = next(e for e in json.loads((golden / "index.json").read_text())
                 if e["file"] == f"{name}.npz")  # fmt: skip
    file = {k: v for k, v in np.load(golden / entry["file"]).items() if k != "logits"}
    ghn, variables = load_torch_ghn(golden / f"random_{entry['ghn']}.safetensors")
    report = parity.Report(name, parity.check_network(entry, file, ghn, variables, None, Engine()))
    assert report.passed, report
    assert report.errors["embedding"] < 1e-5
    layers = golden / f"{name}_layers.npz"
    if layers.is_file():
        states = dict(np.load(layers))
        found = parity_ghn3.encoder_states(ghn, variables, graph_in(entry, ghn))
        monkeypatch.setattr(parity_ghn3, "encoder_states", lambda *_: found)
        errors = parity_ghn3.check_layers(entry, file, states, ghn, variables)
        assert parity.Report(name, errors).passed, errors
        for spoilt in ("attention2", "edge_bias", "layer1", "input", "shape_index"):
            spoiled = {**states, spoilt: states[spoilt] + 1}
            errors = parity_ghn3.check_layers(entry, file, spoiled, ghn, variables)
            assert not parity.Report(name, errors).passed


@pytest.mark.parametrize("name", ["ghn3", "logah"])
def test_decoders_and_counts(golden, name):
    ghn, variables = load_torch_ghn(golden / f"random_{name}.safetensors")
    count = json.loads((golden / f"random_{name}.json").read_text())["parameters"]
    assert sum(x.size for x in jax.tree.leaves(variables)) == count
    file = dict(np.load(golden / f"decoder_{name}.npz"))
    errors = parity_ghn3.check_decoder(file, ghn, variables)
    assert errors["parameters"] < 1e-5
    file["param/05"] = file["param/05"] * 1.001
    assert parity_ghn3.check_decoder(file, ghn, variables)["parameters"] > 5e-4


def test_gradient_of_a_training_step(golden, shared):
    """LoGAH's: its code knows one of its layers by two names, and a gradient by one of them."""
    entries = json.loads((golden / "index.json").read_text())
    arch = Architecture.from_dict(next(e["net"] for e in entries if e["file"] == "arch10_ghn3.npz"))
    images = jnp.asarray(np.load(shared / "golden" / "images.npy").transpose(0, 2, 3, 1))
    ghn, variables = load_torch_ghn(golden / "random_logah.safetensors")
    file = dict(np.load(golden / "gradient_arch10_logah.npz"))
    labels = jnp.asarray(file["labels"], jnp.int32)
    found = parity_ghn3._engine_gradient(ghn, variables, arch, images, labels)

    def errors(file):
        return parity_ghn3.check_step(file, arch, ghn, variables, images, lambda *_: found)

    assert parity.Report("step", errors(file)).passed and errors(file)["gradient"] < 1e-4
    for name in ("grad/decoder.l2.weight", "grad/gnn.0.attn.to_qkv.weight"):
        spoiled = {**file, name: file[name] * 1.1}
        assert not parity.Report("step", errors(spoiled)).passed, name
    other = {k.replace("decoder.l2", "decoder.seq.1"): x for k, x in file.items()}
    assert parity.Report("step", errors(other)).passed
