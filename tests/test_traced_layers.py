"""Graphs of single layers and of small models: nodes, what is left, notes, and errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.tracing.model_graph import model_graph, trace

FEATURES = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32)


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


def multiplied_out(m, x):
    inverse, c = jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5), x.shape[-1]
    scale = param(m, "scale", (c,))
    whole = x * inverse * scale - x.mean((0, 1, 2)) * inverse * scale
    return whole + param(m, "bias", (c,))


def divided_by_its_mean(m, x):
    return x * (1 / jnp.abs(x).mean(-1, keepdims=True)) * param(m, "scale", (x.shape[-1],))


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
    "batch norm, multiplied out": (multiplied_out, BN),
    "norm by a reciprocal": (divided_by_its_mean, [("ln", (8,))]),
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
    "a scale of pooled features": (
        lambda m, x: x.mean((1, 2)) * param(m, "scale", (8,)),
        {"scale": "a scale without a norm in Layer"},
    ),
    "a temperature": (
        lambda m, x: x.mean((1, 2)) / jnp.exp(param(m, "t", ())), {"t": "a number in Layer"},
    ),
    "added up with weights": (
        lambda m, x: param(m, "a", (8,)) * x.mean((1, 2)) + nn.Dense(8)(x.mean((1, 2))),
        {"a": "a scale without a norm in Layer"},
    ),
    "a scale after a gate": (
        lambda m, x: x * nn.sigmoid(x.mean((1, 2), keepdims=True)) * param(m, "scale", (8,)),
        {"scale": "a scale without a norm in Layer"},
    ),
    "a scale after a gate of pooled features": (
        lambda m, x: (lambda y: y * nn.sigmoid(y.mean(-1, keepdims=True)))(x.mean((1, 2)))
        * param(m, "scale", (8,)),
        {"scale": "a scale without a norm in Layer"},
    ),
    "a scale after a product with the mean": (
        lambda m, x: x * x.mean((1, 2), keepdims=True) * param(m, "scale", (8,)),
        {"scale": "a scale without a norm in Layer"},
    ),
    "a scale after a gate over space": (
        lambda m, x: x / (1 + jnp.exp(-x.mean(-1, keepdims=True))) * param(m, "scale", (8,)),
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
        lambda m, x: x @ param(m, "w", (3, 4, 8)).reshape(12, 8)[:8],
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
    assert not any("is taken for" in note for note in traced.reading.notes)
    reasons = {traced.paths[leaf]: why for leaf, why in traced.reading.reasons.items()}
    assert set(reasons) == set(expected)
    for path, part in expected.items():
        assert part in reasons[path]


@pytest.mark.parametrize("axis", [1, 2])
def test_parameters_joined_to_activations_come_first_or_last(axis):
    """Class tokens, registers, mask tokens; or channels that are learned."""

    def joined(order):
        def layer(m, x):
            x = nn.Conv(8, (2, 2), 2)(x).reshape(2, 64, 8)
            token = jnp.broadcast_to(param(m, "token", (1, 1, 8) if axis == 1 else (1, 64, 1)),
                                     (2, 1, 8) if axis == 1 else (2, 64, 1))  # fmt: skip
            x = jnp.concatenate([token, x][::order], axis)
            x = nn.LayerNorm()(x + param(m, "position", (1, *x.shape[1:])))
            return nn.Dense(5)(x.mean(1))

        return model_graph(one_layer(layer), FEATURES)

    first, last = joined(1), joined(-1)
    names = [PRIMITIVES[p] for p in last.primitives]
    assert names == ["input", "conv", "bias", "pos_enc", "sum", "ln", "glob_avg", "conv", "bias"]
    np.testing.assert_array_equal(last.edges, first.edges)


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
    w = param(m, "w", (8, 8))
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)


BAD = {
    "a loop": (looped, r"a `while` in Layer with parameters in it \(w\).* fixed number of turns"),
    "a branch": (
        lambda m, x: nn.cond(x.sum() > 0, *[lambda m, x: nn.Dense(3, name="a")(x)] * 2, m, x),
        "decide a branch in Python",
    ),
    "two outputs": (lambda m, x: (nn.Dense(3)(x), nn.Dense(2)(x)), "2 arrays .*allowed: one"),
    "no parameters": (lambda m, x: nn.relu(x), "has no parameters"),
    "no input": (lambda m, x: nn.Dense(3)(jnp.ones((2, 2))), "does not depend on its input"),
    "no primitive": (lambda m, x: x * param(m, "scale", (8,)), "no parameter of the model belongs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_models(name):
    function, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        model_graph(one_layer(function), FEATURES)
