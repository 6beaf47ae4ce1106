"""Well-known networks, and that they are torchvision's: in names, in layouts, in numbers."""

import functools
import importlib.util
import inspect
import json
import lzma

import flax.linen as nn
import freeze_torchvision as frozen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict

import ghn_jax
from ghn_jax import zoo
from ghn_jax.deepnets1m.names import parameter_path
from ghn_jax.interop import torch_models
from ghn_jax.zoo.pooling import adaptive_avg_pool, max_pool

# Parameters for 1000 classes and 224 pixels, and for 10 and 32.
COUNTS = {
    "resnet18": (11_689_512, 11_173_962),
    "resnet34": (21_797_672, 21_282_122),
    "resnet50": (25_557_032, 23_520_842),
    "resnet101": (44_549_160, 42_512_970),
    "wide_resnet50_2": (68_883_240, 66_847_050),
    "resnext50_32x4d": (25_028_904, 22_992_714),
    "vgg11_bn": (132_868_840, 128_812_810),
    "alexnet": (61_100_840, 57_044_810),
    "googlenet": (6_624_904, 5_610_154),
    "mobilenet_v2": (3_504_872, 2_236_682),
    "mobilenet_v3_small": (2_542_856, 1_528_106),
    "mobilenet_v3_large": (5_483_032, 4_214_842),
    "mnasnet0_5": (2_218_512, 950_322),
    "mnasnet1_0": (4_383_312, 3_115_122),
    "shufflenet_v2_x0_5": (1_366_792, 352_042),
    "shufflenet_v2_x1_0": (2_278_604, 1_263_854),
    "densenet121": (7_978_856, 6_956_426),
    "squeezenet1_1": (1_235_496, 727_626),
    "efficientnet_b0": (5_288_548, 4_020_358),
    "regnet_y_400mf": (4_344_144, 3_907_554),
    "regnet_y_8gf": (39_381_472, 37_384_642),
    "convnext_tiny": (28_589_128, 27_827_818),
    "convnext_small": (50_223_688, 49_462_378),
    "vit_s_16": (22_050_664, 21_342_346),
    "vit_b_16": (86_567_656, 85_152_010),
    "swin_t": (28_288_354, 27_527_044),
}
SIZES = {"imagenet": frozen.IMAGENET, "cifar10": frozen.CIFAR10}

every_model = pytest.mark.parametrize("name", zoo.MODELS)


@functools.cache
def expected() -> dict:
    return json.loads(lzma.decompress(frozen.PATH.read_bytes()))


def count_up(model):
    """Variables whose every number, of one byte, differs from its neighbours'."""
    found, block = {}, np.arange(251, dtype=np.uint8)
    for t in torch_models.tensors(model):
        for path, shape in zip(t.paths, t.shapes, strict=True):
            found[path] = np.resize(np.roll(block, len(found)), shape)
    return unflatten_dict(found)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- Always ---------------------------------------------------------------------------------------


def test_every_model_has_an_entry():
    public = {n for n in zoo.__all__ if inspect.isfunction(getattr(zoo, n))}
    assert public == set(zoo.MODELS) == set(COUNTS) == set(expected()) - {"timm"}


@every_model
def test_counts(name):
    for size, count in zip(SIZES.values(), COUNTS[name], strict=True):
        tensors = torch_models.tensors(zoo.MODELS[name](*size))
        assert sum(np.prod(t.shape) for t in tensors if t.paths[0][0] == "params") == count


def frozen_shapes(name, size):
    return {n: tuple(shape) for n, shape in expected()[name][size]["shapes"].items()}


@every_model
def test_names_and_shapes_of_imagenets_are_torchvisions(name):
    model = zoo.MODELS[name](*frozen.IMAGENET)
    buffers = {n: x.shape for n, x in torch_models.buffers(model).items()}
    tensors = {t.name: t.shape for t in torch_models.tensors(model)}
    assert tensors | buffers == frozen_shapes(name, "imagenet")


@every_model
def test_a_model_there_and_back(name):
    model = zoo.MODELS[name](*frozen.CIFAR10)
    variables = count_up(model)
    arrays = ghn_jax.to_torch(variables, model)
    assert {n: x.shape for n, x in arrays.items()} == frozen_shapes(name, "cifar10")
    assert all(x.flags.c_contiguous for x in arrays.values())
    same(ghn_jax.from_torch(arrays, model), variables)


def test_numbers_stay_as_they_are():
    model = zoo.squeezenet1_1()
    shapes = frozen_shapes("squeezenet1_1", "cifar10")
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    same(ghn_jax.to_torch(ghn_jax.from_torch(arrays, model), model), arrays)


@every_model
def test_names_follow_from_paths_by_the_rule_of_all_networks(name):
    for t in torch_models.tensors(zoo.MODELS[name](*frozen.CIFAR10)):
        modules = t.paths[0][1:-1]
        if "self_attention" in modules:
            modules = modules[: 1 + modules.index("self_attention")]
        official = t.name.replace("out_proj.", "")
        assert parameter_path(official) == modules


@pytest.mark.parametrize("name", frozen.FAMILIES)
def test_training_and_settings_of_norm_layers(name):
    model, found = zoo.MODELS[name](*frozen.CIFAR10), {}

    def note(call, args, kwargs, context):
        norm, path = context.module, ".".join(context.module.path)
        if isinstance(norm, nn.BatchNorm):
            assert context.method_name != "__call__" or not norm.use_running_average
            found[path] = [norm.epsilon, norm.momentum]
        elif isinstance(norm, nn.LayerNorm):
            found[path] = [norm.epsilon]
        return call(*args, **kwargs)

    def init(key):
        images = jnp.zeros((2, 32, 32, 3))
        return model.init_with_output({"params": key, "dropout": key}, images, train=True)

    with nn.intercept_methods(note):
        logits, _ = jax.eval_shape(init, jax.random.key(0))
    assert logits.shape == (2, 10)
    norms = expected()[name]["cifar10"]["norms"]
    assert found == {".".join(parameter_path(f"{n}.weight")): s for n, s in norms.items()}


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, frozen.CIFAR10) for name in frozen.FAMILIES), ("resnet18", frozen.LARGER)],
)
def test_logits_are_torchvisions(name, size):
    model = zoo.MODELS[name](*size)
    variables, images = frozen.random_variables(model), frozen.images(model.image_size)
    # Compiling takes longer than running; without optimisation, half as long.
    options = {"xla_backend_optimization_level": 0}
    logits = jax.jit(model.apply, compiler_options=options)(variables, images)
    want = np.array(expected()[name]["logits"][str(model.image_size)])
    assert frozen.difference(np.asarray(logits), want) < 1e-4


def test_layouts_are_pytorchs():
    model = zoo.vit_b_16()
    variables = count_up(model)
    arrays = ghn_jax.to_torch(variables, model)
    params = variables["params"]
    kernel = params["conv_proj"]["kernel"]
    assert arrays["conv_proj.weight"][5, 2, 1, 3] == kernel[1, 3, 2, 5]
    block, at = params["encoder"]["layers"]["encoder_layer_7"], "encoder.layers.encoder_layer_7."
    assert arrays[at + "mlp.0.weight"][9, 4] == block["mlp_0"]["kernel"][4, 9]
    attention, at = block["self_attention"], at + "self_attention."
    row = 2 * 64 + 9  # feature 9 of head 2
    for i, part in enumerate(("query", "key", "value")):
        weight, bias = (arrays[f"{at}in_proj_{leaf}"] for leaf in ("weight", "bias"))
        assert weight[i * 768 + row, 3] == attention[part]["kernel"][3, 2, 9]
        assert bias[i * 768 + row] == attention[part]["bias"][2, 9]
    assert arrays[at + "out_proj.weight"][3, row] == attention["out"]["kernel"][2, 9, 3]


@pytest.mark.parametrize("name", frozen.TIMM_VITS)
def test_names_of_timm(name):
    model = zoo.MODELS[name](*frozen.IMAGENET)
    variables = count_up(model)
    arrays = torch_models.to_timm(variables, model)
    assert {n: list(x.shape) for n, x in arrays.items()} == expected()["timm"][name]
    same(torch_models.from_timm(arrays, model), variables)
    official = ghn_jax.to_torch(variables, model)
    np.testing.assert_array_equal(
        arrays["blocks.3.attn.qkv.weight"],
        official["encoder.layers.encoder_layer_3.self_attention.in_proj_weight"],
    )


def test_predicted_parameters_have_no_statistics():
    model = zoo.mobilenet_v2()
    variables = count_up(model)
    params = {"params": variables["params"]}
    arrays = ghn_jax.to_torch(params, model)
    assert len(arrays) == len(jax.tree.leaves(params))
    same(ghn_jax.from_torch(arrays, model), params)
    with_statistics = ghn_jax.to_torch(variables, model)
    assert with_statistics["features.0.1.num_batches_tracked"].dtype == np.int64
    # As files of PyTorch before 0.4.1 have them.
    uncounted = {n: x for n, x in with_statistics.items() if "num_batches" not in n}
    same(ghn_jax.from_torch(uncounted, model), variables)


def test_variables_of_another_model():
    model = zoo.squeezenet1_1()
    variables = count_up(model)
    with pytest.raises(ValueError, match=r"unknown .*params/classifier_1/bias'.*\(52 in all\)"):
        ghn_jax.to_torch(variables, zoo.resnet18())
    with pytest.raises(ValueError, match="no 'params' but 'classifier_1', .* given as {'params':"):
        ghn_jax.to_torch(variables["params"], model)
    with pytest.raises(ValueError, match=r"classifier_1/bias is \(10,\), expected \(7,\)"):
        ghn_jax.to_torch(variables, zoo.squeezenet1_1(7))
    arrays = ghn_jax.to_torch(variables, model)
    with pytest.raises(ValueError, match=r"classifier.1.bias is \(10,\), expected \(7,\)"):
        ghn_jax.from_torch(arrays, zoo.squeezenet1_1(7))
    with pytest.raises(ValueError, match=r"missing \[\] \(0 in all\), unknown \['extra'\]"):
        ghn_jax.from_torch({**arrays, "extra": np.zeros(3)}, model)
    del arrays["features.0.bias"]
    with pytest.raises(ValueError, match=r"missing \['features.0.bias'\] \(1 in all\)"):
        ghn_jax.from_torch(arrays, model)
    half = ghn_jax.to_torch(count_up(zoo.mobilenet_v2()), zoo.mobilenet_v2())
    del half["features.0.1.running_var"]
    with pytest.raises(ValueError, match=r"missing \['features.0.1.running_var'\] \(1 in all\)"):
        ghn_jax.from_torch(half, zoo.mobilenet_v2())


def test_what_flax_has_none_of():
    """Places of relative positions are given and checked; auxiliary heads are an error."""
    model = zoo.swin_t()
    variables = count_up(model)
    arrays = ghn_jax.to_torch(variables, model)
    name = "features.1.0.attn.relative_position_index"
    rows = arrays[name].reshape(7, 7, 7, 7)
    assert rows.dtype == np.int64
    # From (6, 1) to (2, 4): four up and three to the right, in a table of 13 x 13.
    assert rows[6, 1, 2, 4] == (6 + 4) * 13 + 6 - 3
    table = variables["params"]["features_1_0"]["attn"]["relative_position_bias_table"]
    np.testing.assert_array_equal(arrays[name.replace("index", "bias_table")], table)
    same(ghn_jax.from_torch({n: x for n, x in arrays.items() if n != name}, model), variables)
    with pytest.raises(ValueError, match=f"{name} is not that of SwinTransformer; allowed"):
        ghn_jax.from_torch({**arrays, name: arrays[name][::-1]}, model)
    model = zoo.googlenet()
    arrays = ghn_jax.to_torch(count_up(model), model)
    heads = {"aux1.conv.conv.weight": np.zeros((128, 512, 1, 1)), "aux2.fc2.bias": np.zeros(10)}
    with pytest.raises(ValueError, match=r"2 of the tensors \(aux1.conv.*auxiliary heads.*leave"):
        ghn_jax.from_torch(arrays | heads, model)


def test_modules_that_are_not_converted():
    for convert in (ghn_jax.to_torch, ghn_jax.from_torch):
        with pytest.raises(TypeError, match="Dense are not converted; allowed: the models of"):
            convert({}, nn.Dense(3))
    for convert in (torch_models.to_timm, torch_models.from_timm):
        with pytest.raises(TypeError, match="not for ResNet; to_torch gives"):
            convert({}, zoo.resnet18())


def test_what_are_no_variables():
    model, vit = zoo.squeezenet1_1(), zoo.vit_s_16()
    hint = r"are a tuple; allowed: .*; predict_model returns \(variables, report\): give the first"
    for variables, message in (
        (({"params": {}}, None), hint),
        (None, "the variables are None; allowed: a Linen model's"),
        ([1], "the variables are a list; allowed"),
    ):
        with pytest.raises(TypeError, match=message):
            ghn_jax.to_torch(variables, model)
        with pytest.raises(TypeError, match=message):
            torch_models.to_timm(variables, vit)
    with pytest.raises(TypeError, match="the variables are an NNX module"):
        torch_models.to_timm(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), vit)
    with pytest.raises(TypeError, match="arrays is None; allowed: arrays under PyTorch's names"):
        torch_models.from_timm(None, vit)


def test_windows_of_pooling():
    x = np.arange(2 * 6 * 7 * 3, dtype=np.float32).reshape(2, 6, 7, 3)
    y = np.asarray(jax.jit(max_pool)(x))  # the last window of the six rows has two
    assert y.shape == (2, 3, 3, 3)
    np.testing.assert_array_equal(y[:, 2, 1], x[:, 4:, 2:5].max((1, 2)))
    pairs = np.asarray(max_pool(x, 2))  # the last window of the seven columns has one
    assert pairs.shape == (2, 3, 4, 3)
    np.testing.assert_array_equal(pairs[:, 1, 3], x[:, 2:4, 6].max(1))
    for size in (4, 7):
        windows = [[(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in (6, 7)]
        want = [[x[:, a:b, c:d].mean((1, 2)) for c, d in windows[1]] for a, b in windows[0]]
        want = np.moveaxis(np.array(want), 2, 0)
        found = jax.jit(adaptive_avg_pool, static_argnums=1)(x, size)
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_sizes_of_images():
    key = jax.random.key(0)

    def shape(model, size):
        return jax.eval_shape(model.init, key, jnp.zeros((1, size, size, 3)))["params"]

    assert shape(zoo.resnet18(10, 96), 96)["conv1"]["kernel"].shape == (3, 3, 3, 64)
    assert shape(zoo.resnet18(10, 97), 97)["conv1"]["kernel"].shape == (7, 7, 3, 64)
    with pytest.raises(ValueError, match="image_size is 31; allowed: 32 pixels or more"):
        shape(zoo.squeezenet1_1(10, 31), 31)
    with pytest.raises(ValueError, match="images are 40x40 and image_size is 32"):
        shape(zoo.vit_b_16(10, 32), 40)
    with pytest.raises(ValueError, match="allowed: the same multiple of 16 pixels"):
        shape(zoo.vit_b_16(10, 225), 225)


# --- With PyTorch's libraries ---------------------------------------------------------------------


@pytest.fixture
def torch():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torch, _ = frozen.import_torchvision()
    return torch


def compare(net, arrays, model, variables):
    """Loads a state dict strictly; logits agree in evaluation mode."""
    images = frozen.images(model.image_size)
    frozen.load(net, arrays)
    logits = np.asarray(jax.jit(model.apply)(variables, images))
    assert frozen.difference(logits, frozen.torch_logits(net.eval(), images)) < 1e-4


@pytest.mark.parametrize("size", SIZES)
@every_model
def test_torchvision_agrees(torch, name, size):
    model, net = zoo.MODELS[name](*SIZES[size]), frozen.reference(name, *SIZES[size])
    described = expected()[name][size]
    assert frozen.describe(net) == described
    variables = frozen.random_variables(model)
    compare(net, ghn_jax.to_torch(variables, model), model, variables)
    same(ghn_jax.from_torch(net.state_dict(), model), variables)


def test_torchvision_trains_alike(torch):
    model, net = zoo.resnet18(), frozen.reference("resnet18", *frozen.CIFAR10)
    variables, images = frozen.random_variables(model), frozen.images(32)
    frozen.load(net, ghn_jax.to_torch(variables, model))
    want = frozen.torch_logits(net.train(), images)
    logits, changed = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    assert frozen.difference(np.asarray(logits), want) < 1e-4
    arrays = ghn_jax.to_torch({**variables, **changed}, model)
    want = {n: x.numpy() for n, x in net.state_dict().items()}
    # PyTorch divides the first layer's variance by n - 1, Flax by n = 2 * 32 * 32.
    old = ghn_jax.to_torch(variables, model)["bn1.running_var"]
    unbiased = 0.9 * old + (arrays["bn1.running_var"] - 0.9 * old) * 2048 / 2047
    np.testing.assert_allclose(unbiased, want["bn1.running_var"], rtol=1e-5)
    np.testing.assert_allclose(
        arrays["bn1.running_mean"], want["bn1.running_mean"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        *frozen.TIMM_VITS.items(),
        ("resnet18", "resnet18"),
        ("resnet34", "resnet34"),
        ("resnet50", "resnet50"),
        ("resnet101", "resnet101"),
        ("wide_resnet50_2", "wide_resnet50_2"),
        ("resnext50_32x4d", "resnext50_32x4d"),
        ("densenet121", "densenet121"),
    ],
)
def test_timm_agrees(torch, name, timm_name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model, net = zoo.MODELS[name](*frozen.IMAGENET), timm.create_model(timm_name)
    variables = frozen.random_variables(model)
    convert = torch_models.to_timm if name in frozen.TIMM_VITS else ghn_jax.to_torch
    compare(net, convert(variables, model), model, variables)
