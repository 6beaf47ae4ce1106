"""Graphs traced from Flax modules: the design space's, the zoo's, and one layer at a time."""

import itertools
import time
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ghn_jax
from ghn_jax import network
from ghn_jax.architecture import OPERATIONS
from ghn_jax.graph import PRIMITIVES
from ghn_jax.jaxpr_graph import read_graph
from ghn_jax.parity import _compare_graphs, _labels
from ghn_jax.resnet import ResNet50, resnet50_graph
from ghn_jax.torch_network import abstract_params
from ghn_jax.tracing import model_graph, trace
from ghn_jax.wiring import is_connected, wire

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
FEATURES = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32)


def labelled(graph):
    return _labels([PRIMITIVES[p] for p in graph.primitives], graph.param_shapes), graph.edges


def assert_same(traced, built):
    """The graphs are equal up to the order of their nodes, and have the same classifier."""
    wrong, order = _compare_graphs(labelled(traced), labelled(built))
    assert wrong == 0
    assert len(traced.edges) == len(built.edges)
    expected = [order[i] for i in built.classifier]
    assert [i % len(traced) for i in traced.classifier] == expected


def read(module, params, virtual_edges=1):
    """Without `init`, which takes as long as the rest."""
    names = [str(i) for i in range(len(jax.tree.leaves(params)))]
    return read_graph(
        lambda p, _, x: module.apply({"params": p}, x), params, {}, IMAGES, names, virtual_edges
    )


# --- The design space -----------------------------------------------------------------------------


@pytest.fixture
def cheap_init(monkeypatch):
    """Flax computes the shape of each parameter's initial value; of zeros that is soon done."""
    monkeypatch.setattr(network, "he_init", nn.initializers.zeros)


COUNT = 25  # of each split
SPLITS = ("train", "val", "test", "wide", "deep", "dense", "bnfree", "search")


def sampled(split):
    """Short and narrow ones: a normal cell and two reduction cells."""
    found = 0
    for i in itertools.count():
        arch = ghn_jax.sample_architecture(split, 7, i).replace(C=16, fc_dim=16, n_cells=3)
        if is_connected(arch):
            found += 1
            yield arch
        if found == COUNT:
            return


@pytest.mark.parametrize("split", SPLITS)
def test_traced_networks_have_their_architectures_graphs(split, cheap_init):
    for arch in sampled(split):
        built = ghn_jax.build_graph(arch, 1)
        traced = read(ghn_jax.build_network(arch), abstract_params(built))
        assert_same(traced.graph, built)
        assert not traced.reasons
        assert not traced.notes


def test_the_sampled_architectures_have_every_operation():
    architectures = [arch for split in SPLITS for arch in sampled(split)]
    assert len(architectures) >= 200
    kinds = {op.kind for arch in architectures for op in wire(arch).operations}
    assert kinds >= set(OPERATIONS) - {"none"}
    assert kinds >= {"preprocess", "factorized_reduce"}
    assert kinds >= {"stem_conv", "stem_pool", "stem_imagenet", "stem_reduce", "stem_vit"}
    assert any("none" in arch.genotype.operations for arch in architectures)
    assert {arch.glob_avg for arch in architectures} == {True, False}
    assert {arch.norm is None for arch in architectures} == {True, False}


def test_subsampled_inputs(cheap_init):
    # No split has convolutional networks without preprocessing.
    edges = (("conv_3x3", 0), ("skip_connect", 1))
    genotype = ghn_jax.Genotype(edges, (2,), edges, (2,))
    arch = ghn_jax.Architecture(genotype, C=16, n_cells=4, C_mult=1, preproc=False, stem_type=1)
    assert "subsample" in {op.kind for op in wire(arch).operations}
    built = ghn_jax.build_graph(arch, 1)
    assert_same(read(ghn_jax.build_network(arch), abstract_params(built)).graph, built)


@pytest.mark.parametrize("index", [0, 1])
def test_virtual_edges_are_the_same(index, cheap_init):
    arch = ghn_jax.evaluation_set("deep")[index].replace(n_cells=12, C=16)
    built = ghn_jax.build_graph(arch)
    traced = read(ghn_jax.build_network(arch), abstract_params(built), 50)
    assert_same(traced.graph, built)


def test_predefined_networks(cheap_init):
    assert_same(model_graph(ResNet50(), IMAGES), resnet50_graph())
    (vit,) = [a for a in ghn_jax.evaluation_set("predefined") if a != "resnet50"]
    built = ghn_jax.build_graph(vit)
    traced = read(ghn_jax.build_network(vit), abstract_params(built), 50).graph
    assert len(traced) == 129
    assert_same(traced, built)


def test_large_images():
    arch = ghn_jax.evaluation_set("test")[0].replace(n_cells=4, C=16)
    sample = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    built = ghn_jax.build_graph(arch, num_classes=1000, image_size=224)
    traced = model_graph(ghn_jax.build_network(arch, 1000, 224), sample)
    assert_same(traced, built)


# --- The zoo --------------------------------------------------------------------------------------

# Nodes of each primitive that has no parameters, and of those that are easily mistaken.
ZOO = {
    "resnet18": {"sum": 8, "glob_avg": 1, "bn": 20},
    "resnet34": {"sum": 16, "glob_avg": 1, "bn": 36},
    "resnet50": {"sum": 16, "glob_avg": 1, "bn": 53},
    "resnet101": {"sum": 33, "glob_avg": 1, "bn": 104},
    "wide_resnet50_2": {"sum": 16, "glob_avg": 1, "bn": 53},
    "vgg11_bn": {"max_pool": 3, "glob_avg": 1, "bn": 8, "bias": 11},
    "mobilenet_v2": {"sum": 10, "glob_avg": 1, "sep_conv": 17, "bn": 52},
    "densenet121": {"concat": 58, "avg_pool": 3, "glob_avg": 1, "bn": 121},
    "squeezenet1_1": {"concat": 8, "max_pool": 2, "glob_avg": 1, "bias": 26},
    "efficientnet_b0": {"cse": 16, "sum": 9, "glob_avg": 1, "sep_conv": 16},
    "convnext_tiny": {"sum": 18, "glob_avg": 1, "sep_conv": 18, "ln": 23},
    "vit_b_16": {"msa": 12, "sum": 25, "pos_enc": 1, "ln": 25},
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    assert set(ZOO) == set(ghn_jax.zoo.MODELS)
    traced = trace(ghn_jax.zoo.MODELS[name](), IMAGES, 1, call={})
    graph = traced.reading.graph
    counts = Counter(PRIMITIVES[p] for p in graph.primitives)
    assert {p: counts[p] for p in ZOO[name]} == ZOO[name]
    weight, bias = graph.classifier
    assert graph.param_shapes[weight][0] == graph.param_shapes[bias][0] == 10
    left = {traced.paths[leaf].split("/")[-1] for leaf in traced.reading.reasons}
    expected = {"convnext_tiny": {"layer_scale"}, "vit_b_16": {"class_token"}}
    assert left == expected.get(name, set())


def test_dense_concatenations_are_torchvisions():
    # Each layer reads all before it.
    graph = model_graph(ghn_jax.zoo.densenet121(), IMAGES, 1)
    concats = np.flatnonzero(graph.primitives == PRIMITIVES.index("concat"))
    degrees = [int((graph.edges[:, 1] == node).sum()) for node in concats]
    assert degrees == [n for layers in (6, 12, 24, 16) for n in range(2, layers + 2)]


# --- One layer at a time --------------------------------------------------------------------------


def param(module, name, shape):
    return module.param(name, nn.initializers.ones, shape)


def convolve(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO",
                                        "NHWC"))  # fmt: skip


def hand_layer_norm(m, x):
    c = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    return centred / (x.std(-1, keepdims=True) + 1e-6) * param(m, "a", (c,)) + param(m, "b", (c,))


def folded_batch_norm(m, x):
    c = x.shape[-1]
    factor = param(m, "scale", (c,)) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5)
    return x * factor + (param(m, "bias", (c,)) - x.mean((0, 1, 2)) * factor)


def excite(m, x):
    gate = nn.Dense(8)(nn.relu(nn.Dense(2)(x.mean((1, 2)))))
    return x * nn.sigmoid(gate)[:, None, None]


def fused_attention(m, x):
    q, k, v = jnp.split(nn.DenseGeneral((2, 12))(x.reshape(2, 256, 8)), 3, -1)
    return nn.Dense(4)(jax.nn.dot_product_attention(q, k, v))


def tokens(m, x):
    token = jnp.broadcast_to(param(m, "token", (1, 1, 8)), (2, 1, 8))
    x = jnp.concatenate([token, x.reshape(2, 256, 8)], 1)
    return x + param(m, "position", (1, 257, 8))


def tiled_tokens(m, x):
    token = jnp.tile(param(m, "token", (1, 1, 8)), (2, 1, 1))
    x = jnp.concatenate([token, x.reshape(2, 256, 8)], 1)
    return x + jnp.tile(param(m, "position", (1, 257, 8)), (2, 1, 1))


def unstacked_attention(m, x):
    q, k, v = jnp.unstack(nn.DenseGeneral((3, 2, 4))(x.reshape(2, 256, 8)), axis=2)
    return nn.Dense(4)(jax.nn.dot_product_attention(nn.LayerNorm()(q), k, v).reshape(2, 256, 8))


def learned_query(m, x):
    query = jnp.broadcast_to(param(m, "query", (1, 1, 8)), (2, 1, 8))
    return nn.MultiHeadDotProductAttention(2)(query, x.reshape(2, 256, 8))


def upsampled(m, x):
    x = nn.Conv(8, (1, 1), use_bias=False)(x).reshape(2, 16, 16, 2, 2, 2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, 32, 2).mean((1, 2))


def shuffled(m, x):
    a, b = jnp.split(x, 2, -1)
    x = jnp.concatenate([a, nn.Conv(4, (1, 1), use_bias=False)(b)], -1)
    return x.reshape(2, 16, 16, 2, 4).swapaxes(-1, -2).reshape(2, 16, 16, 8)


def repeated(m, x):
    dense = nn.Dense(8)
    return dense(nn.relu(dense(x)))


DENSE = [("conv", (3, 8)), ("bias", (3,))]
BN, LN = [("bn", (8,))], [("ln", (8,))]
POOLED = [("glob_avg", None)]

# (what it does, its nodes but the input in order, notes)
LAYERS = {
    "convolution": (
        lambda m, x: nn.Conv(4, (3, 5), 2)(x),
        [("conv", (4, 8, 3, 5)), ("bias", (4,))],
    ),
    "depthwise": (
        lambda m, x: nn.Conv(16, (3, 3), feature_group_count=8, use_bias=False)(x),
        [("sep_conv", (16, 1, 3, 3))],
    ),
    "dilated depthwise": (
        lambda m, x: nn.Conv(
            8, (3, 3), feature_group_count=8, kernel_dilation=2, use_bias=False
        )(x),
        [("dil_conv", (8, 1, 3, 3))],
    ),
    "dilated": (
        lambda m, x: nn.Conv(8, (3, 3), kernel_dilation=2, use_bias=False)(x),
        [("conv", (8, 8, 3, 3))],
    ),
    "grouped": (
        lambda m, x: nn.Conv(16, (3, 3), feature_group_count=4, use_bias=False)(x),
        [("sep_conv", (16, 2, 3, 3))],
    ),
    "transposed": (
        lambda m, x: nn.ConvTranspose(16, (3, 3), (2, 2), use_bias=False)(x),
        [("conv", (16, 8, 3, 3))],
    ),
    "transposed kernel": (
        lambda m, x: nn.ConvTranspose(
            16, (3, 3), (2, 2), use_bias=False, transpose_kernel=True
        )(x),
        [("conv", (16, 8, 3, 3))],
    ),
    "dense general": (
        lambda m, x: nn.DenseGeneral((2, 3), axis=(-2, -1))(x),
        [("conv", (6, 128)), ("bias", (6,))],
    ),
    "einsum": (
        lambda m, x: nn.Einsum((8, 2, 5), "bhwc,cde->bhwde")(x),
        [("conv", (10, 8)), ("bias", (10,))],
    ),
    "batch norm, running": (lambda m, x: nn.BatchNorm(use_running_average=True)(x), BN),
    "batch norm, of the batch": (lambda m, x: nn.BatchNorm(use_running_average=False)(x), BN),
    "batch norm, folded": (folded_batch_norm, BN),
    "batch norm, no scale": (
        lambda m, x: nn.BatchNorm(use_running_average=True, use_scale=False)(x),
        [("bias", (8,))],
    ),
    "layer norm": (lambda m, x: nn.LayerNorm()(x), LN),
    "layer norm by hand": (hand_layer_norm, LN),
    "rms norm": (lambda m, x: nn.RMSNorm()(x), LN),
    "group norm": (lambda m, x: nn.GroupNorm(4)(x), BN),
    "group norm of one group": (lambda m, x: nn.GroupNorm(1)(x), LN),
    "instance norm": (lambda m, x: nn.InstanceNorm()(x), BN),
    "layer norm, pooled": (lambda m, x: nn.LayerNorm()(x.mean((1, 2))), POOLED + LN),
    "layer norm by hand, pooled": (lambda m, x: hand_layer_norm(m, x.mean((1, 2))), POOLED + LN),
    "batch norm, pooled": (
        lambda m, x: nn.BatchNorm(use_running_average=True)(x.mean((1, 2))),
        POOLED + BN,
    ),
    "batch norm of the batch, pooled": (
        lambda m, x: nn.BatchNorm(use_running_average=False)(x.mean((1, 2))),
        POOLED + BN,
    ),
    "squeeze and excite": (
        excite,
        [("conv", (2, 8)), ("bias", (2,)), ("conv", (8, 2)), ("bias", (8,)), ("cse", None)],
    ),
    "attention": (
        lambda m, x: nn.MultiHeadDotProductAttention(2)(x.reshape(2, 256, 8)),
        [("conv", (8, 8)), ("bias", (8,))] * 3 + [("msa", None), ("conv", (8, 8)), ("bias", (8,))],
    ),
    "fused attention": (
        fused_attention,
        [("conv", (24, 8)), ("bias", (24,)), ("msa", None), ("conv", (4, 4)), ("bias", (4,))],
    ),
    "unstacked attention": (
        unstacked_attention,
        [("conv", (24, 8)), ("bias", (24,)), ("ln", (4,)), ("msa", None), ("conv", (4, 8)),
         ("bias", (4,))],
    ),
    "learned query": (
        learned_query,
        [("conv", (8, 8)), ("bias", (8,))] * 2 + [("msa", None), ("conv", (8, 8)), ("bias", (8,))],
    ),
    "positions": (
        lambda m, x: x + param(m, "position", (16, 16, 8)),
        [("pos_enc", (1, 8, 16, 16)), ("sum", None)],
    ),
    "positions of rows": (
        lambda m, x: x + param(m, "position", (16, 1, 8)),
        [("pos_enc", (1, 8, 16, 1)), ("sum", None)],
    ),
    "positions of tokens": (tokens, [("pos_enc", (1, 8, 16, 16)), ("sum", None)]),
    "tiled positions of tokens": (tiled_tokens, [("pos_enc", (1, 8, 16, 16)), ("sum", None)]),
    "pooling": (
        lambda m, x: nn.avg_pool(nn.max_pool(x, (2, 2), (2, 2)), (3, 3), (2, 2)),
        [("max_pool", (1, 1, 2, 2)), ("avg_pool", (1, 1, 3, 3))],
    ),
    "a window as large as the image": (
        lambda m, x: nn.Dense(3)(nn.avg_pool(x, (16, 16)).reshape(2, -1)),
        POOLED + DENSE,
    ),
    "maximum": (lambda m, x: x.max((1, 2)), POOLED),
    "mean and maximum": (
        lambda m, x: jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1), POOLED,
    ),
    "pooled pixel shuffle": (upsampled, [("conv", (8, 8, 1, 1)), *POOLED]),
    "one channel": (
        lambda m, x: nn.BatchNorm(use_running_average=True)(nn.Conv(1, (3, 3))(x)),
        [("conv", (1, 8, 3, 3)), ("bias", (1,)), ("bn", (1,))],
    ),
    "a sum of three": (
        lambda m, x: x + nn.Dense(8, use_bias=False)(x) + nn.max_pool(x, (3, 3), padding="SAME"),
        [("conv", (8, 8)), ("sum", None), ("max_pool", (1, 1, 3, 3)), ("sum", None)],
    ),
    "a sum of one": (lambda m, x: x + nn.relu(x), []),
    "shuffled channels": (shuffled, [("conv", (4, 4, 1, 1)), ("concat", None)]),
    "shared": (repeated, [("conv", (8, 8)), ("bias", (8,))] * 2),
    "remat": (lambda m, x: nn.remat(nn.Dense)(3)(x), DENSE),
    "jit": (lambda m, x: nn.jit(nn.Dense)(3)(x), DENSE),
    "dropout": (lambda m, x: nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x)), DENSE),
    "activations": (
        lambda m, x: nn.Dense(3)(nn.glu(nn.hard_swish(nn.gelu(nn.softmax(nn.silu(x)))), 3)),
        [("conv", (3, 4)), ("bias", (3,))],
    ),
}  # fmt: skip


ATTENTION = "MultiHeadDotProductAttention_0"
LEFT_OF = {
    "positions of tokens": {"token"},
    "tiled positions of tokens": {"token"},
    "learned query": {"query", f"{ATTENTION}/query/kernel", f"{ATTENTION}/query/bias"},
}


def one_layer(function):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(self, x)

    return Layer()


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    function, expected = LAYERS[name]

    def whole(m, x):
        return nn.Dense(5, name="last")(function(m, x))

    traced = trace(one_layer(whole), FEATURES, 1, call={})
    graph = traced.reading.graph
    nodes = [
        (PRIMITIVES[p], shape)
        for p, shape in zip(graph.primitives, graph.param_shapes, strict=True)
    ]
    assert nodes[0] == ("input", None)
    assert nodes[1:-2] == expected
    assert nodes[-1] == ("bias", (5,))
    assert len(graph.classifier) == 2
    left = {traced.paths[leaf] for leaf in traced.reading.reasons}
    assert left == LEFT_OF.get(name, set())


def sources_of(graph, primitive):
    (node,) = np.flatnonzero(graph.primitives == PRIMITIVES.index(primitive))
    return sorted(int(s) for s, t, _ in graph.edges if t == node)


def test_edges_of_attention_and_excitation():
    graph = trace(one_layer(LAYERS["attention"][0]), FEATURES, 1, call={}).reading.graph
    assert sources_of(graph, "msa") == [2, 4, 6]  # the biases of query, key and value
    graph = trace(one_layer(learned_query), FEATURES, 1, call={}).reading.graph
    assert sources_of(graph, "msa") == [2, 4]
    graph = trace(one_layer(excite), FEATURES, 1, call={}).reading.graph
    assert sources_of(graph, "cse") == [0, 4]
    graph = trace(one_layer(lambda m, x: shuffled(m, x)), FEATURES, 1, call={}).reading.graph
    assert sources_of(graph, "concat") == [0, 1]


def standardised(m, x):
    w = param(m, "kernel", (3, 3, 8, 4))
    w = (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5) * param(m, "gain", (4,))
    return convolve(x, w)


def unused(m, x):
    nn.Dense(7)(x)
    return nn.Dense(3)(x)


def two_positions(m, x):
    return nn.Dense(3)(
        x.reshape(2, 128, 16) + (param(m, "p", (128, 16)) + param(m, "q", (128, 16)))
    )


def zero_centred(m, x):
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True)) * (1 + param(m, "scale", (8,)))


# (what it does, parameter -> a part of the reason why it is left)
LEFT = {
    "a scale": (
        lambda m, x: nn.Dense(8)(x) * param(m, "scale", (8,)),
        {"scale": "a scale without a norm in Layer"},
    ),
    "a slope": (lambda m, x: nn.Dense(3)(nn.PReLU()(x)), {"PReLU_0/negative_slope": "a number"}),
    "unused": (unused, {"Dense_0/kernel": "does not reach", "Dense_0/bias": "does not reach"}),
    "a gain": (standardised, {"gain": "combined with kernel"}),
    "one is added": (
        lambda m, x: nn.Dense(3)(zero_centred(m, x)),
        {"scale": "the model applies add to it"},
    ),
    "combined": (two_positions, {"p": "are no square grid", "q": "combined with p"}),
    "a learned query": (
        learned_query,
        {
            "query": "combined with",
            f"{ATTENTION}/query/kernel": "multiplied image by image in Layer",
            f"{ATTENTION}/query/bias": "combined with",
        },
    ),
    "one number": (lambda m, x: x + param(m, "p", (1,)), {"p": "a number added"}),
    "no grid": (
        lambda m, x: nn.Dense(3)(x.reshape(2, 128, 16) + param(m, "p", (1, 128, 16))),
        {"p": "128 positions in Layer are no square grid"},
    ),
    "a part at a time": (
        lambda m, x: x @ param(m, "w", (2, 8, 8))[0] @ m.get_variable("params", "w")[1],
        {"w": "only a part of it is used"},
    ),
    "scores": (
        lambda m, x: nn.Dense(3)(
            nn.softmax(jnp.einsum("bic,bjc->bij", *[nn.Dense(8)(x[:, 0])] * 2)
                       + param(m, "bias", (16, 16))) @ x[:, 0]
        ),
        {"bias": "added to attention's scores"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_a_reason(name):
    function, expected = LEFT[name]

    def whole(m, x):
        return nn.Dense(5, name="last")(function(m, x))

    traced = trace(one_layer(whole), FEATURES, 1, call={})
    reasons = {traced.paths[leaf]: why for leaf, why in traced.reading.reasons.items()}
    assert set(reasons) == set(expected)
    for path, part in expected.items():
        assert part in reasons[path]


NOTES = {
    "transposed": "the transposed convolution in Layer/ConvTranspose_0",
    "group norm": "the group or instance norm in Layer/GroupNorm_0",
    "group norm of one group": "the norm in Layer/GroupNorm_0 is taken for layer norm",
    "instance norm": "the group or instance norm in Layer/InstanceNorm_0",
    "transposed kernel": "the transposed convolution in Layer/ConvTranspose_0",
    "shared": "Dense_0/kernel is shared",
    "unstacked attention": "the norm in Layer/LayerNorm_0 is taken for layer norm",
    "maximum": "global pooling by reduce_max in Layer is taken for an average",
    "mean and maximum": "global pooling by reduce_max in Layer is taken for an average",
}


@pytest.mark.parametrize("name", LAYERS)
def test_nearest_primitives_are_told(name):
    def whole(m, x):
        return nn.Dense(5, name="last")(LAYERS[name][0](m, x))

    notes = trace(one_layer(whole), FEATURES, 1, call={}).reading.notes
    if name in NOTES:
        assert any(NOTES[name] in note for note in notes)
    else:
        assert not notes


def test_other_inputs():
    vectors = jax.ShapeDtypeStruct((4, 12), jnp.float32)
    traced = trace(one_layer(lambda m, x: nn.Dense(3)(x)), vectors, 1, call={})
    assert traced.reading.graph.param_shapes == [None, (3, 12), (3,)]
    words = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    model = one_layer(lambda m, x: nn.Dense(3)(nn.Embed(10, 4)(x).mean(1)))
    traced = trace(model, words, 1, call={})
    ((leaf, why),) = traced.reading.reasons.items()
    assert traced.paths[leaf] == "Embed_0/embedding"
    assert "a table that is indexed in Layer/Embed_0" in why
    words = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    model = one_layer(lambda m, x: nn.Dense(3)(nn.Embed(10, 4)(x) + param(m, "p", (1, 9, 4))))
    assert trace(model, words, 1, call={}).reading.graph.param_shapes[1] == (1, 4, 3, 3)
    volumes = jax.ShapeDtypeStruct((2, 8, 8, 8, 2), jnp.float32)
    model = one_layer(lambda m, x: nn.Dense(5)(nn.Conv(6, (3, 3, 3))(x).mean((1, 2, 3))))
    traced = trace(model, volumes, 1, call={})
    assert list(traced.reading.reasons.values()) == [
        "a kernel of 3 dimensions; decoded are up to 2"
    ]


def test_loops_without_parameters_are_told():
    model = one_layer(lambda m, x: nn.Dense(3)(jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x)))
    reading = trace(model, FEATURES, 1, call={}).reading
    assert any("is not followed" in note for note in reading.notes)
    assert not reading.reasons


def looped(m, x):
    layers = nn.scan(
        lambda m, x, _: (nn.Dense(8)(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )
    return layers(m, x, None)[0]


BAD = {
    "a loop": (looped, r"a `scan` in Layer with parameters in it \(Dense_0/bias, Dense_0/kernel\)"),
    "a branch": (
        lambda m, x: nn.cond(x.sum() > 0, *[lambda m, x: nn.Dense(3, name="a")(x)] * 2, m, x),
        "decide a branch in Python",
    ),
    "two outputs": (lambda m, x: (nn.Dense(3)(x), nn.Dense(2)(x)), "returns 2 arrays; allowed"),
    "no parameters": (lambda m, x: nn.relu(x), "has no parameters"),
    "no input": (lambda m, x: nn.Dense(3)(jnp.ones((2, 2))), "does not depend on its input"),
    "no primitive": (lambda m, x: x * param(m, "scale", (8,)), "no parameter of the model belongs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name):
    function, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        model_graph(one_layer(function), FEATURES)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1, 2], "is no array; allowed: one array"),
        (jnp.zeros(3), r"is of shape \(3,\); allowed"),
        (jax.ShapeDtypeStruct((0, 8, 8, 3), jnp.float32), "is empty"),
    ],
)
def test_bad_samples(sample, message):
    with pytest.raises(ValueError, match=message):
        model_graph(one_layer(lambda m, x: nn.Dense(3)(x)), sample)


def test_notes_of_nnx_modules_say_where():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
            self.up = nnx.ConvTranspose(8, 4, (3, 3), strides=(2, 2), rngs=rngs)
            self.second = nnx.GroupNorm(4, num_groups=2, rngs=rngs)

        def __call__(self, x):
            return self.second(self.up(self.first(x)))

    notes = trace(Net(nnx.Rngs(0)), FEATURES, 1, call={}).reading.notes
    assert [note.split(" is taken")[0] for note in notes] == [
        "the group or instance norm in first",
        "the transposed convolution in up",
        "the group or instance norm in second",
    ]


def test_a_sample_in_double_precision():
    # NumPy's default type; warnings are errors here.
    graph = model_graph(one_layer(lambda m, x: nn.Dense(3)(x)), np.zeros((2, 4)))
    assert graph.param_shapes == [None, (3, 4), (3,)]


def test_a_model_of_another_library():
    with pytest.raises(TypeError, match=r"the model is function; allowed: an instance"):
        model_graph(lambda x: x, IMAGES)
    with pytest.raises(TypeError, match=r"the model is the class Dense; allowed: an instance"):
        model_graph(nn.Dense, IMAGES)


def test_draw_is_exported():
    from ghn_jax.drawing import draw_graph

    assert ghn_jax.draw is draw_graph
    with pytest.raises(AttributeError, match="no attribute 'drawn'"):
        _ = ghn_jax.drawn


def test_a_billion_parameters_take_seconds():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(8):
                x = nn.relu(nn.Dense(12_000)(x))
            return nn.Dense(10)(x)

    start = time.perf_counter()
    traced = trace(Wide(), jax.ShapeDtypeStruct((1, 12_000), jnp.float32), 50, call={})
    assert sum(leaf.size for leaf in traced.leaves) > 1e9
    assert time.perf_counter() - start < 10
