"""PyTorch's files without PyTorch, and what is exchanged in them."""

import functools
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ghn_jax import zoo
from ghn_jax.cli import convert
from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.hypernet.checkpoint import load_ghn, save_ghn
from ghn_jax.hypernet.ghn import GHN, ghn1, mlp_baseline
from ghn_jax.interop import torch_models
from ghn_jax.interop.torch_file import read_torch, write_torch
from ghn_jax.interop.torch_ghn import load_torch_ghn, save_torch_ghn, torch_shapes
from ghn_jax.interop.torch_network import from_torch, to_torch

SMALL = {"max_shape": (16, 8, 11, 11)}
DTYPES = ["f4", "f8", "f2", "i8", "i4", "i2", "i1", "u1", "?", ml_dtypes.bfloat16]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: np.asarray(x).dtype, a) == jax.tree.map(
        lambda x: np.asarray(x).dtype, b
    )


# --- Files ----------------------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "tensors": {str(d): rng.integers(0, 2, (3, 4)).astype(d) for d in DTYPES},
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "plain": [1, -5, 2.5, "text é", None, True, False, (1, (2,)), {}],
    }
    write_torch(tree, tmp_path / "a.pt")
    again = read_torch(tmp_path / "a.pt")
    assert again["plain"] == tree["plain"]
    for key in ("tensors", "scalar", "empty", "transposed"):
        same(again[key], tree[key])
    assert again["scalar"].shape == ()
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_pytorch_reads_it(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.int64(3), 1.5, "x", None]}
    write_torch(tree, tmp_path / "a.pt")
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    np.testing.assert_array_equal(again["a"].numpy(), tree["a"])
    assert again["b"][0].item() == 3
    assert again["b"][1:] == tree["b"][1:]


def test_what_pytorch_wrote_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tree = OrderedDict(
        view=base[1:3, ::2], transposed=base.T, shared=base, half=base.half(), bf16=base.bfloat16(),
        parameter=torch.nn.Parameter(base), size=base.size(), nested={"n": [1, (2.0, None)]},
    )  # fmt: skip
    module = torch.nn.BatchNorm1d(3).state_dict()  # carries metadata of its own
    torch.save({"tree": tree, "module": module}, tmp_path / "a.pt")
    again = read_torch(tmp_path / "a.pt")
    for key in ("view", "transposed", "shared", "half", "parameter"):
        np.testing.assert_array_equal(again["tree"][key], tree[key].detach().numpy())
    np.testing.assert_array_equal(
        again["tree"]["bf16"].astype(np.float32), tree["bf16"].float().numpy()
    )
    assert again["tree"]["size"] == (4, 6)
    assert again["tree"]["nested"] == {"n": [1, (2.0, None)]}
    assert again["module"]["running_var"].tolist() == [1.0, 1.0, 1.0]


class Stranger:
    """Unpickled, it would make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def archive(path, data, **files):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", data)
        for name, content in files.items():
            file.writestr(f"a/{name}", content)
    return path


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    path = archive(tmp_path / "a.pt", pickle.dumps({"x": Stranger(tmp_path / "run")}))
    with pytest.raises(ValueError, match="mkdir; allowed: tensors, dictionaries"):
        read_torch(path)
    assert not (tmp_path / "run").exists()


def tensor(size, stride, offset=0, count=4, storage="FloatStorage"):
    """A pickle of one tensor, as `write_torch` writes it but for the numbers."""
    out = io.BytesIO()
    out.write(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n")
    out.write(storage.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes([count]))
    out.write(b"tQK" + bytes([offset]))
    for numbers in (size, stride):
        out.write(b"(" + b"".join(b"K" + bytes([n]) for n in numbers) + b"t")
    out.write(b"\x89ccollections\nOrderedDict\n)RtR.")
    return out.getvalue()


DATA = np.arange(4, dtype="<f4").tobytes()


def test_the_hand_made_tensor_is_one(tmp_path):
    path = archive(tmp_path / "a.pt", tensor((2, 2), (2, 1)), **{"data/0": DATA})
    np.testing.assert_array_equal(read_torch(path), [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("data", "content", "message"),
    [
        (tensor((3, 2), (2, 1)), DATA, "larger than its 4 elements"),
        (tensor((2, 2), (2, 1), offset=1), DATA, "larger than its 4 elements"),
        (tensor((2, 2), (2,)), DATA, "with strides"),
        (tensor((200, 200, 200, 200), (0, 0, 0, 0)), DATA, "larger than its 4 elements"),
        (tensor((2, 2), (2, 1)), DATA[:8], "too few for 4 numbers"),
        (tensor((2,), (1,), storage="QInt8Storage"), DATA, "QInt8Storage"),
        (tensor((2,), (1,))[:-9], DATA, "cannot be read"),
        (b"\x80\x02]Q.", DATA, "cannot be read"),
        (pickle.dumps(print), DATA, "print; allowed"),
    ],
)
def test_damaged_files(tmp_path, data, content, message):
    path = archive(tmp_path / "a.pt", data, **{"data/0": content})
    with pytest.raises(ValueError, match=message) as error:
        read_torch(path)
    assert "\n" not in str(error.value)


def test_what_is_compressed_is_not_unpacked(tmp_path):
    path = archive(tmp_path / "a.pt", tensor((2, 2), (2, 1)))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data/0", DATA)
    with pytest.raises(ValueError, match="data/0 is compressed, as PyTorch never writes it"):
        read_torch(path)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_torch(path)
    write_torch({"x": np.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short, or no file of torch.save"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ValueError, match="damaged or cut short, or no file of torch.save"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no tensors here")
    with pytest.raises(ValueError, match="it holds no data.pkl"):
        read_torch(path)


# --- Hypernetworks --------------------------------------------------------------------------------

MODELS = [
    GHN(7, virtual_includes_real=True, **SMALL),
    GHN(virtual_includes_real=True, dummy_op=False, features=16, **SMALL),
    ghn1(dummy_op=False, **SMALL),
    mlp_baseline(virtual_includes_real=True, **SMALL),
    GHN(virtual_includes_real=True, decoder="mlp", **SMALL),
]


@functools.cache
def perturbed(ghn):
    leaves, tree = jax.tree.flatten(ghn.init_variables(0))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("ghn", MODELS, ids=["ghn2", "15 rows", "ghn1", "mlp", "mlp decoder"])
def test_a_hypernetwork_there_and_back(ghn, suffix, tmp_path):
    variables = perturbed(ghn)
    path = tmp_path / f"ghn{suffix}"
    save_torch_ghn(ghn, variables, path, epoch=3)
    again, loaded = load_torch_ghn(path)
    same(loaded, variables)
    arch = Architecture(VIT, 3, C=16, C_mult=1, preproc=False)
    same(again.predict(loaded, arch), ghn.predict(variables, arch))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint as a dictionary that a test may spoil, and where to write it."""
    save_torch_ghn(MODELS[0], perturbed(MODELS[0]), tmp_path / "ghn.pt")
    return read_torch(tmp_path / "ghn.pt"), tmp_path / "ghn.pt"


def test_the_format_is_the_authors(checkpoint):
    found, _ = checkpoint
    assert list(found) == ["state_dict", "config", "epoch"]
    assert found["config"] == {
        "max_shape": (16, 8, 11, 11), "num_classes": 7, "hypernet": "gatedgnn", "decoder": "conv",
        "weight_norm": True, "ve": True, "layernorm": True, "hid": 32,
    }  # fmt: skip
    shapes = {name: x.shape for name, x in found["state_dict"].items()}
    assert shapes == torch_shapes(MODELS[0])
    assert shapes["decoder.conv.2.weight"] == (16 * 8, 256, 1, 1)
    assert shapes["gnn.gru.weight_ih"] == (96, 32)


def drop(c):
    del c["state_dict"]["ln.weight"]


def add(c):
    c["state_dict"]["extra"] = np.zeros(3)


def reshape(c):
    c["state_dict"]["ln.bias"] = np.zeros(31, np.float32)


def integers(c):
    c["state_dict"]["ln.bias"] = np.zeros(32, np.int64)


def rows(c):
    c["state_dict"]["embed.weight"] = np.zeros((14, 32), np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, "missing tensors: ln.weight; unknown ones: none"),
        (add, "missing tensors: none; unknown ones: extra"),
        (reshape, r"ln.bias is float32\(31,\), expected \(32,\)"),
        (integers, r"ln.bias is int64\(32,\)"),
        (rows, r"embed.weight is float32\(14, 32\)"),
        (lambda c: c["config"].update(ve=False), "unknown ones: gnn.mlp_ve.fc.0.bias"),
        (lambda c: c["config"].update(hid=16), "expected"),
        (lambda c: c["config"].update(hid=0), "hid 0; allowed: 1 or more"),
        (lambda c: c["config"].update(decoder="rnn"), "decoder is 'rnn'"),
        (lambda c: c["config"].update(hypernet="gcn"), "hypernet 'gcn'"),
        (lambda c: c["config"].update(num_classes="ten"), "num_classes = 'ten'"),
        (lambda c: c["config"].update(max_shape=(1, 2)), r"max_shape is \(1, 2\)"),
        (lambda c: c["config"].pop("ve"), "expected .*'ve'"),
        (lambda c: c.pop("config"), "is no hypernetwork"),
        (lambda c: c.update(state_dict=3), "is not made of tensors"),
    ],
)
def test_checkpoints_that_do_not_fit(checkpoint, spoil, message):
    found, path = checkpoint
    spoil(found)
    write_torch(found, path)
    with pytest.raises(ValueError, match=message) as error:
        load_torch_ghn(path)
    assert "\n" not in str(error.value)


def test_names_of_several_gpus(checkpoint):
    found, path = checkpoint
    found["state_dict"] = {f"module.{k}": v for k, v in found["state_dict"].items()}
    write_torch(found, path)
    same(load_torch_ghn(path)[1], perturbed(MODELS[0]))


def test_safetensors_without_a_config(tmp_path):
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="its config has NoneType"):
        load_torch_ghn(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_torch_ghn(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "ghn", [GHN(**SMALL), GHN(virtual_edges=9, virtual_includes_real=True, **SMALL)]
)
def test_what_the_authors_code_would_compute_otherwise_is_not_saved(ghn, tmp_path):
    with pytest.raises(ValueError, match="embeddings would differ there"):
        save_torch_ghn(ghn, {}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="allowed suffixes: .pt, .safetensors"):
        save_torch_ghn(ghn, {}, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_the_papers_counts(shared):
    counts = {"ghn2_cifar10": 1_620_764, "ghn1_cifar10": 1_620_668, "mlp_cifar10": 1_614_396,
              "ghn2_imagenet": 2_319_720}  # fmt: skip
    for name, count in counts.items():
        ghn, variables = load_torch_ghn(shared / "golden" / f"random_{name}.pt")
        assert sum(x.size for x in jax.tree.leaves(variables)) == count
        assert not ghn.dummy_op


@pytest.mark.parametrize("name", ["ghn2_cifar10", "ghn1_cifar10", "mlp_cifar10", "ghn2_imagenet"])
def test_the_authors_files_are_written_as_they_were(shared, tmp_path, name):
    path = shared / "golden" / f"random_{name}.pt"
    save_torch_ghn(*load_torch_ghn(path), tmp_path / "again.pt")
    same(dict(read_torch(tmp_path / "again.pt")), {
        k: dict(v) if isinstance(v, dict) else v for k, v in read_torch(path).items()})  # fmt: skip


# --- Networks -------------------------------------------------------------------------------------

NETWORKS = {
    "darts": Architecture(DARTS, 4, C=8, fc_layers=2, fc_dim=12, glob_avg=False),
    "vit": Architecture(VIT, 3, C=8, C_mult=1, preproc=False),
    "generated": sample_architecture("train", 0, 4).replace(C=8),
}


def random_params(network, size=32):
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, size, size, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes["params"])


def assert_are_its_own(arrays):
    """Arrays that may be written to: views of JAX's memory may not."""
    assert all(array.flags.writeable and array.flags.c_contiguous for array in arrays.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_there_and_back(name):
    arch = NETWORKS[name]
    params = random_params(build_network(arch))
    arrays = to_torch(jax.tree.map(jnp.asarray, params), arch)
    assert_are_its_own(arrays)
    same(from_torch(arrays, arch), params)
    with_statistics = {**arrays, "stem.1.running_mean": np.zeros(3)}
    same(from_torch(with_statistics, arch), params)


def test_layouts_are_pytorchs():
    arch = NETWORKS["darts"]
    params = random_params(build_network(arch))
    arrays = to_torch(params, arch)
    kernel = params["cells_0"]["ops_0"]["op_1"]["kernel"]
    assert arrays["cells.0._ops.0.op.1.weight"].shape == (8, 1, 3, 3)
    assert arrays["cells.0._ops.0.op.1.weight"][5, 0, 1, 2] == kernel[1, 2, 0, 5]
    dense = params["classifier_3"]["kernel"]
    assert arrays["classifier.3.weight"].shape == (10, 12)
    assert arrays["classifier.3.weight"][4, 7] == dense[7, 4]


def test_parameters_of_another_network():
    params = random_params(build_network(NETWORKS["vit"]))
    with pytest.raises(ValueError, match="are not those of the architecture: missing .*cells_0"):
        to_torch(params, NETWORKS["darts"])
    arrays = to_torch(params, NETWORKS["vit"])
    with pytest.raises(ValueError, match=r"missing .*\(119 in all\), unknown .*ff.net.0.bias"):
        from_torch(arrays, NETWORKS["darts"])
    arrays["classifier.0.bias"] = np.zeros(11)
    with pytest.raises(ValueError, match=r"classifier.0.bias is \(11,\), expected \(10,\)"):
        from_torch(arrays, NETWORKS["vit"])


def as_leaves(torch, arrays):
    """Tensors as `dict(net.named_parameters())` has them."""
    return {name: torch.nn.Parameter(torch.tensor(x)) for name, x in arrays.items()}


def converted_back():
    """(arrays, architecture or model, its variables), of a network and of a model of the zoo."""
    arch = NETWORKS["vit"]
    params = random_params(build_network(arch))
    yield to_torch(params, arch), arch, params
    model = zoo.squeezenet1_1()
    variables = {"params": random_params(model)}
    yield to_torch(variables, model), model, variables


def test_tensors_of_a_net_in_training():
    """They require gradients; what is read from them is a copy, which training leaves alone."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for arrays, arch, variables in converted_back():
        tensors = as_leaves(torch, arrays)
        found = from_torch(tensors, arch)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        same(found, variables)


def test_tensors_of_bfloat16():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for arrays, arch, variables in converted_back():
        tensors = {name: x.bfloat16() for name, x in as_leaves(torch, arrays).items()}
        expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), variables)
        same(from_torch(tensors, arch), expected)


def test_tensors_without_an_array():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    for arrays, arch, _ in converted_back():
        name = next(name for name in arrays if name.endswith("bias"))
        for tensor in (torch.ones(3).to_sparse(), torch.ones(3, device="meta")):
            with pytest.raises(TypeError, match=f"{name} is a Tensor that NumPy cannot .*dense"):
                from_torch({**arrays, name: tensor}, arch)


# --- The program ----------------------------------------------------------------------------------


def run(*arguments):
    convert.main([str(a) for a in arguments])


def test_converting_hypernetworks(tmp_path):
    ghn = MODELS[1]
    save_ghn(tmp_path / "a", ghn, perturbed(ghn))
    run("ghn", tmp_path / "a", tmp_path / "b.pt")
    run("ghn", tmp_path / "b.pt", tmp_path / "c.safetensors")
    run("ghn", tmp_path / "c.safetensors", tmp_path / "d")
    again, variables = load_ghn(tmp_path / "d")
    assert again == ghn
    same(variables, perturbed(ghn))


def test_converting_networks(tmp_path):
    arch = NETWORKS["vit"]
    params = random_params(build_network(arch))
    (tmp_path / "arch.json").write_text(json.dumps(arch.to_dict()))
    net = ("network", tmp_path / "arch.json")
    write_torch(to_torch(params, arch), tmp_path / "a.pt")
    run(*net, tmp_path / "a.pt", tmp_path / "b")
    run(*net, tmp_path / "b", tmp_path / "c.safetensors")
    run(*net, tmp_path / "c.safetensors", tmp_path / "flax.safetensors", "--to", "flax")
    run(*net, tmp_path / "flax.safetensors", tmp_path / "d.pt")
    same(dict(read_torch(tmp_path / "d.pt")), to_torch(params, arch))


def test_converting_models_of_the_zoo(tmp_path):
    model = zoo.squeezenet1_1()
    write_torch(to_torch({"params": random_params(model)}, model), tmp_path / "a.pt")
    net = ("network", "squeezenet1_1")
    run(*net, tmp_path / "a.pt", tmp_path / "b")
    run(*net, tmp_path / "b", tmp_path / "c.safetensors")
    run(*net, tmp_path / "c.safetensors", tmp_path / "d.pt")
    same(dict(read_torch(tmp_path / "d.pt")), dict(read_torch(tmp_path / "a.pt")))


def test_running_statistics_are_converted(tmp_path):
    model = zoo.resnet18()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert_are_its_own(to_torch(variables, model))
    arrays = {
        t.name: np.zeros(t.shape, np.float32) + i for i, t in enumerate(torch_models.tensors(model))
    }
    write_torch(arrays, tmp_path / "a.pt")
    run("network", "resnet18", tmp_path / "a.pt", tmp_path / "b.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "b.safetensors")
    assert set(found) - set(arrays) == {n for n in found if n.endswith("num_batches_tracked")}
    same({name: found[name] for name in arrays}, arrays)


def test_nothing_is_converted_that_does_not_fit(tmp_path):
    write_torch({"x": np.zeros(3)}, tmp_path / "a.pt")
    (tmp_path / "arch.json").write_text('{"n_cells": 3}')
    for arguments, error, message in [
        (("ghn", tmp_path / "a.pt", tmp_path / "b"), ValueError, "is no hypernetwork"),
        (("ghn", tmp_path / "z.pt", tmp_path / "b"), FileNotFoundError, "does not exist"),
        (("ghn", tmp_path / "a.pt", tmp_path / "a.pt"), FileExistsError, "exists already"),
        (("network", "resnet50", tmp_path / "a.pt", tmp_path / "b"), ValueError, "not those of"),
        (("network", tmp_path / "arch.json", tmp_path / "a.pt", tmp_path / "b"), ValueError,
         "holds no architecture"),
        (("network", "nothing", tmp_path / "a.pt", tmp_path / "b"), FileNotFoundError,
         "nothing does not exist"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            run(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "arch.json"]


class NnxNet(nnx.Module):
    """Of layers that PyTorch has as well, under names as it gives them."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (5, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.BatchNorm(8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.token = nnx.Param(jnp.ones((1, 1, 6)))
        self.embed = nnx.Embed(4, 6, rngs=rngs)


def test_nnx_modules():
    module = NnxNet(nnx.Rngs(0))
    arrays = to_torch(module)
    assert {name: array.shape for name, array in arrays.items()} == {
        "token": (1, 1, 6),
        "conv.weight": (8, 3, 5, 3),
        "conv.bias": (8,),
        **{f"blocks.0.{name}": (8,) for name in ("weight", "bias", "running_mean", "running_var")},
        "blocks.1.weight": (6, 8),
        "blocks.1.bias": (6,),
        "attention.in_proj_weight": (18, 6),
        "attention.in_proj_bias": (18,),
        "attention.out_proj.weight": (6, 6),
        "attention.out_proj.bias": (6,),
        "embed.weight": (4, 6),
    }
    kernel = np.asarray(module.conv.kernel[...])
    np.testing.assert_array_equal(arrays["conv.weight"].transpose(2, 3, 1, 0), kernel)
    np.testing.assert_array_equal(arrays["blocks.1.weight"].T, module.blocks[1].kernel[...])
    value = np.asarray(module.attention.value.kernel[...])  # (in, heads, features)
    np.testing.assert_array_equal(arrays["attention.in_proj_weight"][12:].T, value.reshape(6, 6))
    out = np.asarray(module.attention.out.kernel[...])  # (heads, features, out)
    np.testing.assert_array_equal(arrays["attention.out_proj.weight"].T, out.reshape(6, 6))
    assert all(array.flags.writeable and array.flags.c_contiguous for array in arrays.values())
    with pytest.raises(TypeError, match="the module is a ConvTranspose, whose kernel has no form"):
        to_torch(nnx.ConvTranspose(3, 4, (2, 2), rngs=nnx.Rngs(0)))
    for options, message in (
        ({"normalize_qk": True}, "normalises queries and keys"),
        ({"qkv_features": 12}, "in_features 6, in_kv_features 6, qkv_features 12"),
        ({"in_kv_features": 4}, "in_kv_features 4"),
        ({"out_features": 8}, "out_features 8"),
    ):
        layer = nnx.MultiHeadAttention(2, 6, rngs=nnx.Rngs(0), **options)
        with pytest.raises(TypeError, match=f"the module is a MultiHeadAttention.*{message}"):
            to_torch(layer)


def test_layers_of_a_sequential_have_their_numbers_as_names():
    """At the top, under an attribute, in a list, and one in another; not another class's layers."""
    rngs = nnx.Rngs(0)

    def sequential(*layers):
        return nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=rngs), nnx.relu, *layers)

    class Net(nnx.Module):
        def __init__(self):
            self.features = sequential(sequential())
            self.layers = nnx.List([sequential()])

    assert set(to_torch(sequential())) == {"0.weight"}
    assert set(to_torch(Net())) == {
        "features.0.weight", "features.2.0.weight", "layers.0.0.weight"
    }  # fmt: skip
