"""Layers whose parameters are stacked: scanned, mapped, indexed. Each is nodes of its own."""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ghn_jax
from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.tracing.model_graph import trace

FEATURES = jax.ShapeDtypeStruct((2, 4, 8), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
DEPTH = 3


@pytest.fixture(scope="module")
def ghn():
    model = ghn_jax.GHN(max_shape=(16, 16, 3, 3), features=8)
    return model, model.init_variables(0)


class Block(nn.Module):
    """Of a vision transformer; returns what `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="mlp")(nn.gelu(nn.Dense(12, name="hidden")(x))), None


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x, _ = Block(name=f"block_{i}")(x)
        return nn.Dense(10, name="head")(x.mean(1))


class Scanned(nn.Module):
    """As large transformers are written.

    Attributes:
      axis: that parameters are stacked along.
      remat: compute values again on the way back.
    """

    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        axes, keys = {"params": self.axis}, {"params": True}
        blocks = nn.scan(block, variable_axes=axes, split_rngs=keys, length=DEPTH)
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(10, name="head")(x.mean(1))


def assert_same_graph(model, other, sample=FEATURES):
    ours, theirs = (trace(m, sample, 50, call={}).reading for m in (model, other))
    assert not ours.reasons
    np.testing.assert_array_equal(ours.graph.primitives, theirs.graph.primitives)
    np.testing.assert_array_equal(ours.graph.edges, theirs.graph.edges)
    assert ours.graph.param_shapes == theirs.graph.param_shapes
    assert ours.graph.classifier == theirs.graph.classifier
    assert ours.notes == theirs.notes
    return ours


@pytest.mark.parametrize("options", [{}, {"axis": 1}, {"remat": True}])
def test_scanned_layers_get_what_unrolled_ones_get(ghn, options):
    model = Scanned(**options)
    reading = assert_same_graph(model, Unrolled())
    assert "blocks/mlp/kernel[2]" in reading.graph.names
    predicted, report = ghn_jax.predict_model(*ghn, model, FEATURES, strict=True)
    expected, other = ghn_jax.predict_model(*ghn, Unrolled(), FEATURES)
    layers = [expected["params"][f"block_{i}"] for i in range(DEPTH)]
    stacked = jax.tree.map(lambda *x: np.stack(x, options.get("axis", 0)), *layers)
    jax.tree.map(np.testing.assert_array_equal, predicted["params"]["blocks"], stacked)
    assert sum(p.size for p in report.predicted) == sum(p.size for p in other.predicted)
    (row,) = [p for p in report.parameters if p.path == "blocks/mlp/kernel"]
    he = [p.he_norm for p in other.parameters if p.path.endswith("mlp/kernel")]
    assert row.he_norm == pytest.approx(np.linalg.norm(he))
    shapes = jax.eval_shape(model.init, jax.random.key(0), FEATURES)
    assert jax.tree.map(jnp.shape, predicted["params"]) == jax.tree.map(jnp.shape, shapes["params"])


# --- Other ways to stack --------------------------------------------------------------------------


class Stacks(nn.Module):
    """Three dense layers in one tensor, used in some way, or (`how` is '') as they are."""

    how: str = ""

    @nn.compact
    def __call__(self, x):
        x = x.mean(1)
        if self.how:
            w = self.param("w", nn.initializers.normal(), (DEPTH, 8, 8))
        else:
            w = [self.param(f"w{i}", nn.initializers.normal(), (8, 8)) for i in range(DEPTH)]
        if self.how == "a loop":
            x = jax.lax.fori_loop(0, DEPTH, lambda i, x: nn.relu(x @ w[i]), x)
        elif self.how == "a loop down":
            x = jax.lax.fori_loop(0, DEPTH, lambda i, x: nn.relu(x @ w[DEPTH - 1 - i]), x)
        elif self.how == "a scan backwards":
            x, _ = jax.lax.scan(lambda x, w: (nn.relu(x @ w), None), x, w, reverse=True)
        elif self.how == "nested":
            w = w.reshape(DEPTH, 1, 8, 8)
            inner = lambda x, w: (nn.relu(x @ w), None)  # noqa: E731
            x, _ = jax.lax.scan(lambda x, w: (jax.lax.scan(inner, x, w)[0], None), x, w)
        elif self.how == "taken":
            for i in range(DEPTH):
                x = nn.relu(x @ jnp.take(w, i, axis=0))
        elif self.how == "unstacked":
            for layer in jnp.unstack(w):
                x = nn.relu(x @ layer)
        elif self.how == "split":
            for layer in jnp.split(w, DEPTH):
                x = nn.relu(x @ layer[0])
        elif self.how == "a branch":

            def turn(i, x):
                return jax.lax.cond(
                    i % 2 == 0, lambda: nn.relu(x @ w[i]), lambda: jnp.tanh(x @ w[i])
                )

            x = jax.lax.fori_loop(0, DEPTH, turn, x)
        else:
            for i in range(DEPTH):
                x = nn.relu(x @ w[i])
        return nn.Dense(10)(x)


WAYS = [
    "indexed", "a loop", "a loop down", "a scan backwards", "nested", "taken", "unstacked", "split",
    "a branch",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_layers_in_one_tensor(how):
    reading = assert_same_graph(Stacks(how), Stacks())
    order = [2, 1, 0] if how in ("a scan backwards", "a loop down") else [0, 1, 2]
    (places,) = [p for p in reading.placements.values() if len(p) > 1]
    assert [place.part for place in places] == [((0, i),) for i in range(DEPTH)]
    nodes = [place.node for place in places]
    assert np.argsort(np.argsort(nodes)).tolist() == order


def test_scans_within_scans(ghn):
    class Nested(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.remat_scan(nn.Dense, lengths=(2, 3))
            return nn.Dense(10)(layer(8, name="layers")(x.mean(1)))

    predicted, report = ghn_jax.predict_model(*ghn, Nested(), FEATURES, strict=True)
    kernels = predicted["params"]["layers"]["kernel"]
    assert kernels.shape == (2, 3, 8, 8)
    assert report.nodes == 2 + 2 * 6 + 2
    assert len({np.asarray(k).tobytes() for k in kernels.reshape(6, 8, 8)}) == 6


def test_a_layer_of_a_stack_that_is_not_used_is_left(ghn):
    class Some(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.constant(0.5), (3, 8, 8))
            return nn.Dense(10)(nn.relu(x.mean(1) @ w[0]) @ w[2])

    predicted, report = ghn_jax.predict_model(*ghn, Some(), FEATURES, predict_constants=True)
    w = np.asarray(predicted["params"]["w"])
    np.testing.assert_array_equal(w[1], 0.5)
    assert np.all(w[0] != 0.5) and np.all(w[2] != 0.5)
    assert report.parameters[-1].note.startswith("1 of 3 layers stacked in it are left")


def test_a_stack_that_is_indexed_by_values(ghn):
    class Routed(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (3, 8, 8))
            x = x.mean(1)
            return nn.Dense(10)(x @ w[jnp.argmax(x[0, :3])])

    reading = trace(Routed(), FEATURES, 1, call={}).reading
    assert len(reading.reasons) == 1
    assert "w" not in reading.graph.names


def test_long_loops_are_refused():
    class Long(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (8, 8))
            return jax.lax.fori_loop(0, 10**6, lambda i, x: x @ w, x)

    with pytest.raises(ValueError, match="a `scan` in Long of 1000000 turns .* allowed: up to"):
        trace(Long(), FEATURES, 1, call={})


# --- NNX ------------------------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + nnx.gelu(self.dense(self.norm(x)))


class NnxNet(nnx.Module):
    def __init__(self, rngs, scanned):
        self.scanned = scanned
        if scanned:
            make = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NnxBlock))
            self.blocks = make(rngs)
        else:
            self.blocks = nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        if self.scanned:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x.mean(1))


def test_scanned_nnx_modules(ghn):
    scanned, unrolled = (NnxNet(nnx.Rngs(0), way) for way in (True, False))
    assert_same_graph(scanned, unrolled)
    found, _ = ghn_jax.predict_model(*ghn, scanned, FEATURES, strict=True)
    expected, _ = ghn_jax.predict_model(*ghn, unrolled, FEATURES)
    kernels = [block.dense.kernel[...] for block in expected.blocks]
    np.testing.assert_array_equal(found.blocks.dense.kernel[...], np.stack(kernels))
    assert found(jnp.ones(FEATURES.shape)).shape == (2, 10)


# --- Layers side by side --------------------------------------------------------------------------


class Member(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False)(x))
        x = nn.LayerNorm()(nn.Conv(4, (1, 1))(x))
        return nn.Dense(10)(nn.relu(nn.Dense(6)(x.mean((1, 2)))))


class Ensemble(nn.Module):
    members: int

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        nets = nn.vmap(
            Member, variable_axes=axes, split_rngs={"params": True}, in_axes=None,
            axis_size=self.members,
        )  # fmt: skip
        return nets()(x).mean(0)


def test_an_ensemble_by_vmap_has_nodes_for_each_member(ghn):
    alone = trace(Member(), IMAGES, 1, call={}).reading
    reading = trace(Ensemble(3), IMAGES, 1, call={}).reading
    assert not reading.reasons
    count = Counter(PRIMITIVES[p] for p in reading.graph.primitives)
    once = Counter(PRIMITIVES[p] for p in alone.graph.primitives)
    for primitive in ("conv", "sep_conv", "bias", "bn", "ln"):
        assert count[primitive] == 3 * once[primitive], primitive
    assert set(reading.graph.param_shapes) == set(alone.graph.param_shapes)
    assert len(reading.graph.classifier) == 6
    # Each layer reads that of its own network; the pooling is of all.
    sources = Counter(int(target) for _, target, length in reading.graph.edges if length == 1)
    assert sorted(Counter(sources.values()).items()) == [(1, len(reading.graph) - 2), (3, 1)]
    predicted, _ = ghn_jax.predict_model(*ghn, Ensemble(3), IMAGES, strict=True)
    shapes = jax.eval_shape(Ensemble(3).init, jax.random.key(0), IMAGES)
    assert jax.tree.map(jnp.shape, predicted["params"]) == jax.tree.map(jnp.shape, shapes["params"])
