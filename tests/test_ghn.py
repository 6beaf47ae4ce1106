"""The hypernetworks by their invariants; that they compute what the authors' do is in
test_parity.py.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghn_jax.deepnets1m.architecture import VIT, Architecture
from ghn_jax.deepnets1m.graph import Graph, build_graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import RULES, sample_architecture
from ghn_jax.hypernet import gatedgnn
from ghn_jax.hypernet.ghn import GHN, ghn1, mlp_baseline
from ghn_jax.hypernet.padding import pad_graphs

IMAGENET = (64, 64, 16, 16)
SMALL = {"max_shape": (16, 16, 11, 11)}
ARCHITECTURES = [
    *(sample_architecture("train", 3, i) for i in range(4)),
    Architecture(VIT, 3, C=16, C_mult=1, preproc=False),
]


@functools.cache
def perturbed(ghn: GHN, seed: int = 0) -> dict:
    """Random variables without zero biases or layer norms that do nothing."""
    leaves, tree = jax.tree.flatten(ghn.init_variables(seed))
    rng = np.random.default_rng(seed)
    noise = [0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(tree, [x + n for x, n in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize(
    ("ghn", "count"),
    [
        (GHN(), 1_620_796),
        (GHN(dummy_op=False), 1_620_764),
        (GHN(1000, IMAGENET), 2_319_752),  # as the paper prints it (B.2.1)
        (GHN(1000, IMAGENET, dummy_op=False), 2_319_720),
        (ghn1(dummy_op=False), 1_620_668),
        (mlp_baseline(dummy_op=False), 1_614_396),
    ],
)
def test_number_of_parameters(ghn, count):
    variables = jax.eval_shape(lambda: ghn.init_variables(0))
    assert sum(x.size for x in jax.tree.leaves(variables)) == count


def test_the_same_seed_gives_the_same_variables():
    ghn = GHN(**SMALL)
    a, b, c = (jax.tree.leaves(ghn.init_variables(seed)) for seed in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert any((x != y).any() for x, y in zip(a, c, strict=True))


MODELS = {
    "ghn2": GHN(**SMALL),
    "released": GHN(virtual_includes_real=True, **SMALL),
    "ghn1": ghn1(**SMALL),
    "mlp": mlp_baseline(**SMALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_members_and_padding_changes_nothing(name):
    ghn = MODELS[name]
    variables = perturbed(ghn)
    graphs = [ghn.graph(arch) for arch in ARCHITECTURES]
    apply = jax.jit(lambda graph: ghn.apply(variables, graph))
    together = apply(pad_graphs(graphs))
    start = 0
    for graph in graphs:
        n = len(graph)
        alone = apply(pad_graphs([graph], n_node=n + 1, n_edge=max(len(graph.edges), 1)))[:n]
        padded = ghn.embed(variables, graph)
        np.testing.assert_allclose(together[start : start + n], alone, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(padded, alone, rtol=1e-5, atol=1e-5)
        start += n


def test_every_node_hears_of_every_other():
    """Both sweeps: a change at the end reaches the start, and the other way round."""
    ghn = MODELS["ghn2"]
    variables, graph = perturbed(ghn), ghn.graph(ARCHITECTURES[0])
    states = ghn.embed(variables, graph)
    for node in (0, len(graph) - 1):
        shapes = list(graph.param_shapes)
        shapes[node] = (40, 40, 3, 3)
        other = ghn.embed(variables, dataclasses.replace(graph, param_shapes=shapes))
        assert (jnp.abs(other - states).max(1) > 0).all()


def gru(params, message, hidden):
    """PyTorch's cell, gate by gate."""
    given, held = (
        jnp.split(gatedgnn.dense(params[name], v), 3, -1)
        for name, v in (("input", message), ("hidden", hidden))
    )
    reset, update = (nn.sigmoid(a + b) for a, b in zip(given[:2], held[:2], strict=True))
    return (1 - update) * jnp.tanh(given[2] + reset * held[2]) + update * hidden


def node_after_node(layers, x, graph, virtual_includes_real):
    """Eqs. 3 and 4 as they are written: one node, then the next."""
    mlps = [[layers[f"{n}_{i}"] for i in range(2)] for n in ("mlp", "mlp_virtual")]
    cell = {name: layers[f"gru_{name}"] for name in ("input", "hidden")}
    distance = np.zeros((len(x), len(x)))
    distance[graph.receivers, graph.senders] = graph.edges["distance"]
    for sweep, hears in (("forward", distance), ("backward", distance.T)):
        real = jnp.asarray(hears == 1, jnp.float32)
        virtual = jnp.asarray(np.where(hears > 1 - virtual_includes_real, 1 / (hears + 1e-9), 0))

        def update(x, v, real=real, virtual=virtual):
            said = [gatedgnn.mlp(p, x) for p in mlps]
            message = real[v] @ said[0] + virtual[v] @ said[1]
            return x.at[v].set(gru(cell, message, x[v])), None

        nodes = np.asarray(graph.globals[sweep]).ravel()
        x, _ = jax.lax.scan(update, x, nodes[nodes < len(x)])
    return x


@pytest.mark.parametrize("name", ["ghn2", "released"])
def test_the_sweeps_and_their_gradient(name):
    """Of parameters and of initial states; two graphs of which one is shorter, and padding."""
    ghn = MODELS[name]
    graphs = [chain((0, 1, 1), (1, 2, 1), (0, 2, 2)), ghn.graph(ARCHITECTURES[0])]
    graph = pad_graphs(graphs)
    layers = perturbed(ghn)["params"]["gnn"]
    gnn = gatedgnn.GatedGNN(layers["mlp_0"]["kernel"].shape[0],
                            virtual_includes_real=ghn.virtual_includes_real)  # fmt: skip
    n = len(graph.nodes["primitive"])
    x, g = jnp.asarray(np.random.default_rng(0).standard_normal((2, n, gnn.features), np.float32))
    expected, vjp = jax.vjp(
        lambda p, x: node_after_node(p, x, graph, ghn.virtual_includes_real), layers, x
    )
    actual, own = jax.vjp(lambda p, x: gnn.apply({"params": p}, x, graph), layers, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(own(g)), jax.tree.leaves(vjp(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_the_mlp_hears_of_nobody():
    ghn = MODELS["mlp"]
    variables, graph = perturbed(ghn), ghn.graph(ARCHITECTURES[0])
    shapes = [(40, 40, 3, 3), *graph.param_shapes[1:]]
    changed = ghn.embed(variables, dataclasses.replace(graph, param_shapes=shapes))
    assert (jnp.abs(changed - ghn.embed(variables, graph)).max(1) > 0).tolist() == [
        True, *[False] * (len(graph) - 1)
    ]  # fmt: skip


def chain(*distances_1: tuple[int, int, int]) -> Graph:
    return Graph(
        np.array([9, 4, 7], np.int32),
        np.array(distances_1, np.int32).reshape(-1, 3),
        [None, (8, 3, 3, 3), None],
        ["input", "a.weight", "sum"],
        np.zeros(3, np.int32),
    )


def test_which_edges_are_virtual():
    """Eq. 4 sums over 1 < s; the released weights were trained with s = 1 too (reference.md)."""
    real = [(0, 1, 1), (1, 2, 1)]
    silent = jax.tree.map(jnp.asarray, perturbed(MODELS["ghn2"]))
    # Without messages over real edges, what is left are those over virtual ones.
    for name in ("mlp_0", "mlp_1"):
        silent["params"]["gnn"][name] = jax.tree.map(jnp.zeros_like, silent["params"]["gnn"][name])
    lonely = MODELS["ghn2"].embed(silent, chain())
    np.testing.assert_array_equal(MODELS["ghn2"].embed(silent, chain(*real)), lonely)
    assert (MODELS["released"].embed(silent, chain(*real)) != lonely).any(1).all()
    with_virtual = MODELS["ghn2"].embed(silent, chain(*real, (0, 2, 2)))
    assert (with_virtual != lonely).any(1).tolist() == [True, False, True]


def test_predicted_parameters_fit_their_network():
    ghn = GHN(**SMALL)
    variables = ghn.init_variables(0)
    for arch in ARCHITECTURES:
        params = ghn.predict(variables, arch)
        network = build_network(arch)
        expected = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected["params"])


def test_predicting_for_other_images_and_classes():
    ghn = GHN(7, (16, 16, 16, 16))
    arch = Architecture(VIT, 3, C=16, C_mult=1, preproc=False)
    params = ghn.predict(ghn.init_variables(0), arch, image_size=224)
    assert params["stem0"]["kernel"].shape == (16, 16, 3, 16)
    assert params["classifier_0"]["kernel"].shape == (16, 7)


def test_normalisation_is_that_of_table_2():
    options = {"max_shape": (64, 64, 11, 11)}
    with_, without = GHN(**options), GHN(normalise=False, **options)
    variables = perturbed(with_)
    rules = dataclasses.replace(RULES["train"], widths=(32,))
    arch = next(
        a for a in (sample_architecture("train", 0, i, rules=rules) for i in range(99))
        if any(op == "conv_7x1_1x7" for op, _ in a.genotype.normal)
        and any(op == "dil_conv_3x3" for op, _ in a.genotype.normal)
        and a.norm is not None and a.has_attention
    )  # fmt: skip
    a, b = with_.predict(variables, arch), without.predict(variables, arch)
    seen = set()
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b),
                            strict=True):  # fmt: skip
        leaf = path[-1].key
        if leaf == "kernel":
            fan_in = np.prod(y.shape[:-1])
            depthwise = y.ndim == 4 and y.shape[2] == 1
            row = y.ndim == 4 and y.shape[0] < y.shape[1]
            beta = 1 if depthwise or row else 2
            seen.add(("depthwise", "row", "other")[0 if depthwise else 1 if row else 2])
            expected = y * np.sqrt(beta / fan_in)
        elif leaf == "scale":
            expected = 2 * jax.nn.sigmoid(y / 2)
        elif leaf == "embedding":
            expected = y
        else:
            expected = jnp.tanh(y / 5)
        seen.add(leaf)
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-7)
    assert seen == {"kernel", "scale", "bias", "embedding", "depthwise", "row", "other"}


def test_large_kernels_repeat_the_tile_along_channels():
    small = GHN(max_shape=(16, 8, 11, 11), normalise=False)
    variables = perturbed(small)
    arch = Architecture(VIT, 3, C=32, C_mult=1, preproc=False)
    kernel = small.predict(variables, arch)["cells_0"]["ops_1"]["to_qkv"]["kernel"]
    assert kernel.shape == (32, 96)
    np.testing.assert_array_equal(kernel, np.tile(kernel[:8, :16], (4, 6)))


def test_prediction_is_differentiable():
    ghn = GHN(**SMALL)
    variables = perturbed(ghn)
    arch = ARCHITECTURES[-1]

    def norm(v):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(ghn.predict(v, arch)))

    value, grads = jax.value_and_grad(norm)(variables)
    direction = perturbed(ghn, seed=5)
    step = 1e-3
    there, back = (
        norm(jax.tree.map(lambda x, d, s=s: x + s * step * d, variables, direction))
        for s in (1, -1)
    )
    slope = sum(jnp.vdot(g, d) for g, d in zip(
        jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))  # fmt: skip
    assert float(slope) == pytest.approx(float(there - back) / (2 * step), rel=2e-2)
    assert jnp.isfinite(value)


def test_prediction_compiles_nothing_for_another_architecture_of_its_size():
    from ghn_jax.hypernet import ghn as module

    ghn = GHN(**SMALL)
    variables = ghn.init_variables(0)
    graphs = [build_graph(sample_architecture("train", 9, i)) for i in range(60)]
    before = module._encode._cache_size()
    for graph in graphs:
        ghn.embed(variables, graph)
    # Powers of two in nodes, edges and steps, not one program for each of 60 architectures.
    assert module._encode._cache_size() - before <= 25


# --- Bad input ------------------------------------------------------------------------------------


def test_a_kernel_no_decoder_makes():
    arch = Architecture(VIT, 3, C=16, C_mult=1, preproc=False)
    with pytest.raises(ValueError, match=r"no decoder makes the shape \(16, 3, 16, 16\)"):
        GHN(**SMALL).graph(arch, image_size=224)


def test_unknown_encoders_and_decoders():
    with pytest.raises(
        ValueError, match="encoder is 'gcn'; allowed: 'gatedgnn', 'graphormer', 'mlp'"
    ):
        GHN(encoder="gcn", **SMALL).init_variables(0)
    with pytest.raises(ValueError, match="decoder is 'rnn'; allowed: 'conv', 'lowrank', "):
        GHN(decoder="rnn", **SMALL).init_variables(0)
