"""Target networks as Flax modules; that they compute what the reference does is in test_ghn.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import unit_by_unit

from ghn_jax.deepnets1m.architecture import DARTS, OPERATIONS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.wiring import DisconnectedError
from ghn_jax.evaluation.accuracy import random_parameters

# One state in the concat, so that cells can do without 1x1 convolutions at their inputs.
PLAIN = Genotype(
    (("conv_3x3", 0), ("skip_connect", 1)), (2,), (("max_pool_3x3", 0), ("skip_connect", 1)), (2,)
)


def every_operation() -> Genotype:
    """A node for each operation but attention; it reads one of the cell's inputs and a state."""
    edges, names = [], [name for name in OPERATIONS if name not in ("msa", "none")]
    for i, name in enumerate(names):
        edges += [(name, i % 2), (name, min(i + 1, 2))]
    concat = tuple(range(2, len(names) + 2))
    return Genotype(tuple(edges), concat, tuple(edges), concat)


@functools.cache
def shapes(arch, num_classes=10, image_size=32, train=False):
    """Shapes of the parameters and of the logits for two images, without computing them."""
    network = build_network(arch, num_classes, image_size)
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    rngs = dict(zip(("params", "dropout"), jax.random.split(jax.random.key(0)), strict=True))
    with unit_by_unit():  # units that were traced before are not traced again
        logits, variables = jax.eval_shape(
            functools.partial(network.init_with_output, train=train), rngs, images
        )
    assert set(variables) == {"params"}
    return jax.tree.map(lambda x: x.shape, variables["params"]), logits.shape


def names(params) -> set[str]:
    """Dotted names of all modules."""
    paths = [path[:-1] for path, _ in jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, tuple))[0]]  # fmt: skip
    return {".".join(part.key for part in path) for path in paths}


ARCHITECTURES = {
    "darts": Architecture(DARTS, 4, C=8),
    "narrow": Architecture(DARTS, 4, C=8, C_mult=1),
    "no norm": Architecture(DARTS, 4, C=8, norm=None),
    "imagenet stem": Architecture(DARTS, 4, C=8, stem_type=1, ks=5),
    "imagenet stem, no norm": Architecture(DARTS, 4, C=8, stem_type=1, norm=None),
    "pool": Architecture(DARTS, 4, C=8, stem_pool=True, ks=7),
    "flat head": Architecture(DARTS, 4, C=8, glob_avg=False, fc_layers=2, fc_dim=12),
    "three layers": Architecture(DARTS, 4, C=8, fc_layers=3, fc_dim=12),
    "no preproc": Architecture(PLAIN, 4, C=8, C_mult=1, preproc=False),
    "no preproc, imagenet stem": Architecture(PLAIN, 4, 8, 1, stem_type=1, preproc=False),
    "one cell": Architecture(DARTS, 1, C=8),
    "two cells": Architecture(DARTS, 2, C=8),
    "vit": Architecture(VIT, 4, C=8),
    "vit, no preproc": Architecture(VIT, 4, C=8, C_mult=1, preproc=False),
    "every operation": Architecture(every_operation(), 4, C=8),
}


@pytest.mark.parametrize("image_size", [16, 32, 224])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes(name, image_size):
    """Any network maps images to logits; its parameters are those of its graph's nodes."""
    arch = ARCHITECTURES[name]
    params, logits = shapes(arch, 7, image_size)
    assert logits == (2, 7)
    sizes = [np.prod(s, dtype=int) for s in jax.tree.leaves(params, is_leaf=_is_shape)]
    graph = build_graph(arch, 1, num_classes=7, image_size=image_size)
    nodes = zip(graph.names, graph.param_shapes, strict=True)
    expected = [np.prod(s, dtype=int) for n, s in nodes if "." in n]
    norms = sum(s[0] for s in jax.tree.leaves(_scales(params), is_leaf=_is_shape))
    assert sum(sizes) == sum(expected) + norms  # a norm layer's bias has no node


def _is_shape(x) -> bool:
    return isinstance(x, tuple)


def _scales(params):
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_shape)[0]
    return [shape for path, shape in flat if path[-1].key == "scale"]


@pytest.mark.parametrize(
    "name", ["no norm", "imagenet stem", "pool", "flat head", "vit", "every operation"]
)
def test_logits(name):
    """The networks compute finite numbers that depend on each of their parameters."""
    arch = ARCHITECTURES[name]
    network = build_network(arch, image_size=16)
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 3), dtype=np.float32)
    params = random_parameters(network, 16, seed=0)
    with unit_by_unit():
        gradients = jax.grad(lambda p: jnp.square(network.apply({"params": p}, images)).sum())(
            params
        )
    flat = jax.tree_util.tree_flatten_with_path(gradients)[0]
    for path, gradient in flat:
        assert np.isfinite(gradient).all() and np.any(gradient), jax.tree_util.keystr(path)


def test_norm():
    with_norm, without = (shapes(ARCHITECTURES[n])[0] for n in ("darts", "no norm"))
    assert _scales(with_norm) and not _scales(without)
    assert names(without) < names(with_norm)


def test_stems():
    def stem(name, size=32):
        params = shapes(ARCHITECTURES[name], image_size=size)[0]
        return {k: v for k, v in params.items() if k.startswith(("stem", "pos_enc"))}

    def norm(c):
        return {"scale": (c,), "bias": (c,)}

    # Three times as wide before 1x1 convolutions, for small images only.
    assert stem("pool") == {"stem_0": {"kernel": (7, 7, 3, 24)}, "stem_1": norm(24)}
    assert stem("pool", 224)["stem_0"] == {"kernel": (7, 7, 3, 8)}
    assert stem("no preproc")["stem_0"] == {"kernel": (3, 3, 3, 8)}
    assert stem("imagenet stem") == {
        "stem0_0": {"kernel": (5, 5, 3, 4)},
        "stem0_1": norm(4),
        "stem0_3": {"kernel": (3, 3, 4, 8)},
        "stem0_4": norm(8),
        "stem1_1": {"kernel": (3, 3, 8, 8)},
        "stem1_2": norm(8),
    }
    assert stem("vit") == {"stem0": {"kernel": (3, 3, 3, 8)}, "pos_enc": {"embedding": (11, 11, 8)}}
    assert stem("vit", 224) == {
        "stem0": {"kernel": (16, 16, 3, 8)},
        "pos_enc": {"embedding": (14, 14, 8)},
    }


def test_heads():
    def head(name, size=32):
        params = shapes(ARCHITECTURES[name], image_size=size)[0]
        return {k: v["kernel"] for k, v in params.items() if k.startswith("classifier")}

    wide = 4 * 8 * 4  # states in the concat, channels, two reductions
    assert head("darts") == {"classifier_0": (wide, 10)}
    assert head("narrow") == {"classifier_0": (32, 10)}
    assert head("flat head") == {"classifier_0": (wide * 8 * 8, 12), "classifier_3": (12, 10)}
    assert head("flat head", 16)["classifier_0"] == (wide * 4 * 4, 12)
    assert list(head("three layers").values()) == [(wide, 12), (12, 12), (12, 10)]


def test_flat_head_is_in_pytorch_order():
    """Features are flattened channel by channel, so that the authors' weights fit."""
    copies = Genotype(*2 * ((("skip_connect", 1), ("none", 0)), (2,)))
    arch = Architecture(copies, 1, C=8, C_mult=1, preproc=False, norm=None, glob_avg=False)
    network = build_network(arch, image_size=8)
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3), dtype=np.float32)
    params = network.init(jax.random.key(0), images)["params"]
    # The stem copies the colours to the first channels.
    stem = np.zeros((3, 3, 3, 8), np.float32)
    stem[1, 1, range(3), range(3)] = 1
    params = {**params, "stem_0": {"kernel": stem}}
    flat = np.zeros((2, 8, 8, 8), np.float32)
    flat[:, :3] = images.transpose(0, 3, 1, 2)
    weights = params["classifier_0"]
    expected = flat.reshape(2, -1) @ weights["kernel"] + weights["bias"]
    np.testing.assert_allclose(network.apply({"params": params}, images), expected, atol=1e-4)


def test_dropout_in_training_only():
    arch = Architecture(PLAIN, 3, C=8, fc_layers=2, fc_dim=64)
    network = build_network(arch, image_size=16)
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 3), dtype=np.float32)
    variables = {"params": random_parameters(network, 16, seed=0)}
    evaluate = jax.jit(network.apply)
    train = jax.jit(functools.partial(network.apply, train=True))
    first = train(variables, images, rngs={"dropout": jax.random.key(1)})
    second = train(variables, images, rngs={"dropout": jax.random.key(2)})
    expected = evaluate(variables, images)
    assert not np.allclose(first, second) and not np.allclose(first, expected)
    again = evaluate(variables, images, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(expected, again)
    # Right on average: what is kept is doubled.
    keys = jax.random.split(jax.random.key(3), 2000)
    many = jax.jit(jax.vmap(lambda k: network.apply(
        variables, images, train=True, rngs={"dropout": k})))(keys)  # fmt: skip
    np.testing.assert_allclose(
        many.mean(0), expected, atol=6 * float(many.std(0).max()) / 2000**0.5
    )


def test_one_layer_has_no_dropout():
    network = build_network(Architecture(PLAIN, 3, C=8), image_size=16)
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), dtype=np.float32)
    variables = {"params": random_parameters(network, 16, seed=0)}
    trained = network.apply(variables, images, train=True)  # needs no random numbers
    np.testing.assert_array_equal(trained, network.apply(variables, images))


def test_unused_operations_have_no_parameters():
    # Node 2 is outside the concat and nothing reads it; of node 3, one edge is `none`.
    edges = (("conv_3x3", 0), ("conv_5x5", 1), ("conv_1x1", 1), ("none", 0))
    arch = Architecture(Genotype(edges, (3,), edges, (3,)), 3, C=8)
    params = shapes(arch)[0]
    for cell in range(3):
        assert set(params[f"cells_{cell}"]) == {"ops_2", "preprocess1"}
    # The official count has them, and the first input's 1x1 convolution.
    used = sum(np.prod(s, dtype=int) for s in jax.tree.leaves(params, is_leaf=_is_shape))
    assert count_parameters(arch) > used


def test_errors():
    nothing = (("none", 0), ("none", 1))
    with pytest.raises(DisconnectedError, match="no path"):
        build_network(Architecture(Genotype(nothing, (2,), nothing, (2,)), 3))
    with pytest.raises(ValueError, match="num_classes is 1; allowed: 2 or more"):
        build_network(ARCHITECTURES["darts"], num_classes=1)
    with pytest.raises(ValueError, match="image_size is 4; allowed: 8 or more"):
        build_network(ARCHITECTURES["darts"], image_size=4)
