"""Graphs traced from Flax modules: the design space's, the zoo's; and what is no model."""

import inspect
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
from ghn_jax.deepnets1m import network
from ghn_jax.deepnets1m.architecture import OPERATIONS
from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.deepnets1m.wiring import is_connected, wire
from ghn_jax.interop.comparison import compare_graphs, labels
from ghn_jax.interop.torch_network import abstract_params
from ghn_jax.tracing.jaxpr_graph import read_graph
from ghn_jax.tracing.model_graph import model_graph, trace

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
FEATURES = jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32)


def labelled(graph):
    return labels([PRIMITIVES[p] for p in graph.primitives], graph.param_shapes), graph.edges


def assert_same(traced, built):
    """The graphs are equal up to the order of their nodes, and have the same classifier."""
    wrong, order = compare_graphs(labelled(traced), labelled(built))
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
    monkeypatch.setitem(network._INITIALISERS, "kernel", nn.initializers.zeros)


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


def test_the_predefined_vit(cheap_init):
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
    "resnext50_32x4d": {"sum": 16, "glob_avg": 1, "bn": 53, "sep_conv": 16},
    "vgg11_bn": {"max_pool": 3, "glob_avg": 1, "bn": 8, "bias": 11},
    "alexnet": {"max_pool": 2, "glob_avg": 1, "bn": 0, "bias": 8},
    "googlenet": {"concat": 9, "max_pool": 12, "glob_avg": 1, "bn": 57},
    "mobilenet_v2": {"sum": 10, "glob_avg": 1, "sep_conv": 17, "bn": 52},
    "mobilenet_v3_small": {"cse": 9, "sum": 6, "glob_avg": 1, "sep_conv": 11, "bn": 34},
    "mobilenet_v3_large": {"cse": 8, "sum": 10, "glob_avg": 1, "sep_conv": 15, "bn": 46},
    "mnasnet0_5": {"sum": 10, "glob_avg": 1, "sep_conv": 17, "bn": 52},
    "mnasnet1_0": {"sum": 10, "glob_avg": 1, "sep_conv": 17, "bn": 52},
    "shufflenet_v2_x0_5": {"concat": 16, "glob_avg": 1, "sep_conv": 19, "bn": 56},
    "shufflenet_v2_x1_0": {"concat": 16, "glob_avg": 1, "sep_conv": 19, "bn": 56},
    "densenet121": {"concat": 58, "avg_pool": 3, "glob_avg": 1, "bn": 121},
    "squeezenet1_1": {"concat": 8, "max_pool": 3, "glob_avg": 1, "bias": 26},
    "efficientnet_b0": {"cse": 16, "sum": 9, "glob_avg": 1, "sep_conv": 16},
    "regnet_y_400mf": {"cse": 16, "sum": 16, "glob_avg": 1, "sep_conv": 16, "bn": 53},
    "regnet_y_8gf": {"cse": 17, "sum": 17, "glob_avg": 1, "sep_conv": 17, "bn": 56},
    "convnext_tiny": {"sum": 18, "glob_avg": 1, "sep_conv": 18, "ln": 23},
    "convnext_small": {"sum": 36, "glob_avg": 1, "sep_conv": 36, "ln": 41},
    "vit_s_16": {"msa": 12, "sum": 25, "pos_enc": 1, "ln": 25},
    "vit_b_16": {"msa": 12, "sum": 25, "pos_enc": 1, "ln": 25},
    "swin_t": {"msa": 12, "sum": 24, "glob_avg": 1, "concat": 0, "pos_enc": 0, "ln": 29},
}
# What no node makes, by family.
LEFT = {
    "convnext": {"layer_scale"},
    "vit": {"class_token"},
    "swin": {"relative_position_bias_table"},
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
    assert left == LEFT.get(name.split("_")[0], set())
    assert not any("no primitive" in note for note in traced.reading.notes)


def test_dense_concatenations_are_torchvisions():
    # Each layer reads all before it.
    graph = model_graph(ghn_jax.zoo.densenet121(), IMAGES, 1)
    concats = np.flatnonzero(graph.primitives == PRIMITIVES.index("concat"))
    degrees = [int((graph.edges[:, 1] == node).sum()) for node in concats]
    assert degrees == [n for layers in (6, 12, 24, 16) for n in range(2, layers + 2)]


class Shaped:
    """Something with a shape and a type."""

    def __init__(self, shape, dtype=np.float32):
        self.shape, self.dtype = shape, dtype


# --- What is given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1, 2], "is no array; allowed: one array"),
        (jnp.zeros(3), r"is of shape \(3,\); allowed"),
        (jax.ShapeDtypeStruct((0, 8, 8, 3), jnp.float32), "is empty"),
        ({"image": jnp.zeros((1, 2))}, r"is no array; .* give a Linen model method=.*an NNX model"),
        (Shaped((None, 8, 8, 3)), r"shape \(None, 8, 8, 3\); allowed: .*such as 1 for a batch"),
        (Shaped((-1, 8, 8, 3)), r"shape \(-1, 8, 8, 3\); allowed: .*such as 1 for a batch"),
        (Shaped((1, 8, 8, 3), None), "is no array"),
        (np.ndarray, "is no array"),
    ],
)
def test_bad_samples(sample, message):
    for model in (nn.Dense(3), nnx.Linear(3, 3, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=message):
            model_graph(model, sample)


@pytest.mark.parametrize(
    ("sample", "named"),
    [
        (np.array([["a"]]), "<U1"),
        (np.array([[None, 1]], object), "object"),
        (np.zeros((1, 8, 8, 3), "datetime64[s]"), "datetime64.s."),
        (np.zeros((1, 8, 8, 3), [("red", "f4")]), "red"),
        (jax.random.split(jax.random.key(0), (2, 3)), "key<"),
    ],
)
def test_samples_that_are_no_numbers(sample, named):
    for model in (nn.Dense(3), nnx.Linear(3, 3, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match=f"of type .*{named}.*, not of numbers; allowed"):
            model_graph(model, sample)


def test_samples_of_other_libraries():
    torch = pytest.importorskip("torch")
    expected = model_graph(nn.Dense(3), np.zeros((2, 4), np.float32))
    for sample in (
        torch.zeros((2, 4), requires_grad=True),
        torch.zeros((2, 4), dtype=torch.bfloat16),
        Shaped([2, 4], "float32"),
        np.ones((2, 4), bool),
    ):
        assert model_graph(nn.Dense(3), sample).param_shapes == expected.param_shapes


class Small(nn.Module):
    """Takes images of 32 pixels and more."""

    @nn.compact
    def __call__(self, x):
        for channels in (6, 16):
            x = nn.avg_pool(nn.Conv(channels, (5, 5), padding="VALID")(x), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(-1, 32 * 32 * 3))


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (lambda: Small(), (1, 8, 8, 3), "division by zero"),
        (lambda: Fixed(), (1, 17, 17, 3), "reshape"),
        (lambda: nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), (1, 3, 16, 16), "feature"),
    ],
)
def test_shapes_that_a_model_cannot_be_called_with(model, shape, said):
    named = "of shape " + str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"{named}.*{said}.*; images are .B, H, W, C.") as error:
        model_graph(model(), jnp.zeros(shape))
    assert str(error.value).count("\n") == 0
    assert said in str(error.value.__cause__)


def test_models_that_take_a_dict():
    class Named(nn.Module):
        how: str = "item"

        @nn.compact
        def __call__(self, batch):
            image = batch["image"] if self.how == "item" else dict(batch.items())["image"]
            return nn.Dense(10)(image.mean((1, 2)))

    for how in ("item", "items"):
        with pytest.raises(TypeError, match=r"takes something else.*method=lambda m, x: m\(\{"):
            model_graph(Named(how), IMAGES)
    assert len(model_graph(Named(), IMAGES, method=lambda m, x: m({"image": x})))


def test_faults_of_a_model_are_its_own():
    class Unset(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(x) * self.options.get("scale")

        options = None

    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'get'"):
        model_graph(Unset(), IMAGES)

    class Strict(nn.Module):
        @nn.compact
        def __call__(self, x):
            raise ValueError("channels are not what I take")

    with pytest.raises(ValueError, match="^channels are not what I take"):
        model_graph(Strict(), IMAGES)


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
        "2 times: the group or instance norm in first, second",
        "the transposed convolution in up",
    ]


def test_a_sample_in_double_precision():
    # NumPy's default type; warnings are errors here.
    graph = model_graph(nn.Dense(3), np.zeros((2, 4)))
    assert graph.param_shapes == [None, (3, 4), (3,)]


def test_a_model_of_another_library():
    with pytest.raises(TypeError, match=r"the model is a function; allowed: an instance"):
        model_graph(lambda x: x, IMAGES)
    with pytest.raises(TypeError, match=r"the model is the class Dense; allowed: an instance"):
        model_graph(nn.Dense, IMAGES)


def test_draw_is_exported(monkeypatch):
    from ghn_jax.plot import drawing

    signatures = [inspect.signature(f) for f in (ghn_jax.draw, drawing.draw_graph)]
    assert signatures[0].parameters.keys() == signatures[1].parameters.keys()
    monkeypatch.setattr(drawing, "draw_graph", lambda *args, **options: (args, options))
    drawn = ghn_jax.draw("graph", "a.png", title="A", legend=False)
    assert drawn == (("graph", "a.png"), {"title": "A", "legend": False})
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
