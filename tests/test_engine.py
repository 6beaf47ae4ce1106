"""The engine gives the logits and the gradients of the Flax modules, for any architecture.

The modules run unit by unit: what two architectures have in common is compiled once, as it is for
the engine. Architectures are chosen such that much is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import (
    ALL,
    BATCH,
    IMAGES,
    SMALL,
    TILED,
    WANTED,
    Case,
    assert_close,
    assert_is_module,
    check,
    check_tiles,
    error,
    features,
    params_of,
    random,
    random_tiles,
    walk,
)
from jax.flatten_util import ravel_pytree

from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.layers import concatenate
from ghn_jax.deepnets1m.network import Network
from ghn_jax.deepnets1m.sampling import SPLITS, sample_architecture
from ghn_jax.deepnets1m.units import NormSum
from ghn_jax.engine.compilation import program_options
from ghn_jax.engine.engine import Engine, array_operations, tree_of, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.engine.programs import Programs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.hypernet.tiling import squash, tile_kind
from ghn_jax.training.decoding import TilePrograms, Tiles, make_chunks


@pytest.fixture(scope="module")
def engine():
    """Its programs are compiled as in training."""
    programs = Programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ghn_jax.engine.engine.program_options", program_options)
        made = Engine(programs=programs)
    yield made
    programs.close()


def test_architectures_cover_the_design_space():
    assert len({case.arch for case in ALL}) == len(ALL) >= 60
    missing = WANTED.difference(*map(features, ALL))
    assert not missing, f"no architecture tests: {sorted(missing)}"


# --- Equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_engine_equals_module(case, engine):
    check(case, engine)


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_with_tiles(case, engine):
    check_tiles(case, engine)


EXCITE = Genotype(
    (("cse", 0), ("sep_conv_3x3", 1)), (2,), (("conv_7x1_1x7", 0), ("skip_connect", 1)), (2,)
)


def test_parameters_of_ghn1_are_not_scaled(engine):
    arch = Architecture(EXCITE, 3, C=8, ks=7, glob_avg=False, fc_layers=2, fc_dim=24)
    # Small enough that unscaled networks do not overflow.
    ghn = GHN(max_shape=SMALL.max_shape, normalise=False, virtual_edges=1, layer_norm=False)
    check_tiles(Case.of(arch), engine, ghn, scale=0.3)


@pytest.mark.parametrize(
    "arch",
    [
        Architecture(VIT, 1, C=8),
        Architecture(EXCITE, 1, C=8, stem_type=1, ks=5),
        Architecture(EXCITE, 1, C=8, stem_pool=True, ks=7),
    ],
    ids=["vit", "half", "full"],
)
def test_large_images_have_other_stems(arch, engine):
    check(Case.of(arch, size=128), engine, random(2, 128, 128, 3))


@pytest.mark.parametrize(
    "arch",
    [
        Architecture(EXCITE, 1, C=12),
        Architecture(DARTS, 2, C=8),
        Architecture(EXCITE, 3, C=8, fc_layers=3, fc_dim=24),
        Architecture(EXCITE, 1, C=8, ks=9),
        Architecture(EXCITE, 1, C=8, ks=11),
        Architecture(EXCITE, 1, C=8, fc_layers=2, fc_dim=1000),
    ],
    ids=["12 channels, one cell", "two cells", "three layers", "9x9", "11x11", "1000 hidden units"],
)
def test_what_one_program_for_many_could_not_run(arch, engine):
    check(Case.of(arch), engine)


def test_dropout(engine, monkeypatch):
    """The engine's seed is a key; with that key the module drops the same units."""
    case = Case.of(Architecture(EXCITE, 3, C=8, fc_layers=3, fc_dim=24))
    params = params_of(case, random_tiles(case))
    weights, seed = weights_of(case.plan, params), tuple(map(np.int32, (3, 5, 2)))
    logits, gradient = walk(engine, case.plan, weights, seed=seed)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), 2)
    monkeypatch.setattr(Network, "make_rng", lambda self, name: key)
    actual = logits, tree_of(case.plan, gradient)
    assert_is_module(case, actual, params, train=True)
    assert error(logits, case.network.apply({"params": params}, IMAGES)) > 0.1
    for other in ((4, 5, 2), (3, 4, 2), (3, 5, 1)):  # run, update, network
        changed, _ = walk(engine, case.plan, weights, seed=tuple(map(np.int32, other)))
        assert error(changed, logits) > 0.01


def test_given_statistics(engine):
    """With those of the batch, batch norm is what it is on the batch; with others, it is not."""
    case = next(
        case for case in ALL
        if case.arch.norm
        and any(step.unit.normed_terms == 2 for step in case.plan.steps
                if isinstance(step.unit, NormSum))
    )  # fmt: skip
    weights = weights_of(case.plan, params_of(case, random_tiles(case)))
    network = engine.prepare(case.plan, BATCH, gradient=False)
    expected, trace = engine.forward(network, weights, IMAGES, keep=True)
    statistics = {
        name: batch
        for i, found in trace.statistics.items()
        for name, batch in zip(case.plan.steps[i].names, found, strict=True)
    }
    given = engine.prepare(make_plan(case.wiring, running=True), BATCH, gradient=False)

    def logits(statistics):
        return engine.forward(given, weights, IMAGES, statistics=statistics)[0]

    assert_close(logits(statistics), expected, 1e-5)
    for name in statistics:
        assert error(logits({**statistics, name: 2 * statistics[name]}), expected) > 1e-3, name


EVERYTHING = Genotype(
    (("sep_conv_5x5", 0), ("avg_pool_3x3", 1), ("dil_conv_3x3", 0), ("conv_3x3", 2)), (2, 3),
    (("conv_7x1_1x7", 0), ("max_pool_3x3", 1), ("cse", 0), ("conv_1x1", 2)), (2, 3),
)  # fmt: skip


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_array_operations_of_other_platforms(platform):
    """Run on this one: equal to the modules, and values stay in the engine's dtype."""
    case, programs = Case.of(Architecture(EVERYTHING, 3, C=8)), Programs()
    engines = [Engine(dtype=dtype, programs=programs) for dtype in ("float32", "bfloat16")]
    for engine in engines:
        engine.layers = array_operations(platform)
    check(case, engines[0])
    weights = weights_of(case.plan, params_of(case, random_tiles(case)))
    rounded, expected = (walk(engine, case.plan, weights)[0] for engine in engines[::-1])
    assert 1e-4 < error(rounded, expected) < 0.05
    programs.close()


# --- What else an engine does ---------------------------------------------------------------------


def test_bfloat16(engine):
    """Images and values are rounded, parameters and statistics are not."""
    case = ALL[0]
    params = params_of(case, random_tiles(case))
    weights = weights_of(case.plan, params)
    rounded = Engine(dtype=jnp.bfloat16, programs=engine.programs)
    logits, gradient = walk(rounded, case.plan, weights)
    expected, gradients = walk(engine, case.plan, weights)
    assert {x.dtype for x in jax.tree.leaves((logits, gradient))} == {jnp.dtype("float32")}
    assert 1e-4 < error(logits, expected) < 0.05
    flat = [ravel_pytree(g)[0] for g in (gradient, gradients)]
    assert 1e-4 < error(*flat) < 0.2
    network = rounded.prepare(case.plan, BATCH, gradient=True)
    _, trace = rounded.forward(network, weights, IMAGES, keep=True)
    assert {x.dtype for v, x in trace.values.items() if v} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(trace.statistics)} <= {jnp.dtype("float32")}


def test_values_are_kept_until_their_last_reader(engine):
    case = next(case for case in ALL if case.arch.has_attention and case.arch.norm)
    weights = weights_of(case.plan, params_of(case, random_tiles(case)))
    network = engine.prepare(case.plan, BATCH, gradient=True)
    logits, trace = engine.forward(network, weights, IMAGES)
    assert trace.values == {}
    kept, trace = engine.forward(network, weights, IMAGES, keep=True)
    np.testing.assert_array_equal(logits, kept)
    # All that a step writes, but for the logits.
    assert set(trace.values) == {0, *(step.output for step in case.plan.steps[:-1])}


def test_cells_outputs(engine):
    """The engine gives what the states of the wiring are, of some cells."""
    case = next(case for case in ALL if case.arch.n_cells > 3 and case.arch.norm)
    params = params_of(case, random_tiles(case))
    network = engine.prepare(case.plan, BATCH, gradient=False)
    weights = weights_of(case.plan, params)
    cells = (0, -1)
    found = engine.features(network, weights, IMAGES, cells)
    _, trace = engine.forward(network, weights, IMAGES, keep=True)
    for cell, x in zip(cells, found, strict=True):
        feature = case.wiring.outputs[cell]
        parts = [None if s is None else trace.values[case.plan.states[s]] for s in feature]
        np.testing.assert_array_equal(x, concatenate(parts))
    # The classifier follows from the last cell.
    head = case.plan.steps[-1]
    logits = head.unit.apply(tuple(a for n in head.names for a in weights[n]), (found[-1],))
    assert_close(logits, engine.forward(network, weights, IMAGES)[0])


@pytest.mark.parametrize("case", TILED[:2], ids=lambda case: case.name)
def test_two_devices_equal_one(case, engine):
    two = Engine(jax.local_devices(), programs=engine.programs)
    weights = {name: (tile,) for name, tile in random_tiles(case).items()}
    actual, expected = (walk(e, case.plan, weights, form=Tiles(SMALL)) for e in (two, engine))
    assert len(actual[0].sharding.device_set) == 2
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(actual[1]))
    assert_close(actual, expected)


def test_programs_are_shared(engine):
    """What another architecture has in common with those before is not compiled again."""
    order = sorted(ALL[:15], key=lambda case: case.name)

    def run(case):
        weights = weights_of(case.plan, params_of(case, random_tiles(case)))
        before = len(engine.programs)
        logits, _ = walk(engine, case.plan, weights)
        return logits, len(engine.programs) - before

    for case in order:
        run(case)
    made = engine.programs.made
    assert made <= len(engine.programs)
    results = [run(case) for case in order]
    assert {new for _, new in results} == {0}
    assert engine.programs.made == made
    assert len({float(logits[0, 0]) for logits, _ in results}) == len(order)


def test_the_callers_matmul_precision_reaches_the_threads_that_compile(engine):
    spec = (((4, 4), jnp.dtype(jnp.float32), engine.whole),)
    usual = engine.program("square", lambda x: x @ x, spec)
    with jax.default_matmul_precision("highest"):
        exact = engine.program("square", lambda x: x @ x, spec)
    assert "highest" in exact.compile().as_text()
    assert "highest" not in usual.compile().as_text()


def test_equal_units_of_other_architectures_are_the_same_programs():
    """The same edges between other nodes, more cells: nothing new."""
    first = Genotype((("conv_3x3", 0), ("cse", 1)), (2,), (("conv_3x3", 0), ("cse", 1)), (2,))
    other = Genotype((("cse", 1), ("conv_3x3", 0)), (2,), (("cse", 1), ("conv_3x3", 0)), (2,))
    programs = Programs(threads=1)
    try:
        engine = Engine(programs=programs)
        new = []
        for genotype, n_cells in ((first, 9), (other, 9), (first, 12)):
            before = len(programs)
            arch = Architecture(genotype, n_cells, C=8)
            engine.prepare(Case.of(arch).plan, BATCH, gradient=True)
            new.append(len(programs) - before)
        assert new[0] > 10
        assert new[1:] == [0, 0]
        # Of other numbers of images, and other widths, all are.
        engine.prepare(Case.of(Architecture(first, 9, C=8)).plan, BATCH + 1, gradient=True)
        assert len(programs) == 2 * new[0]
    finally:
        programs.close()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [32, 224])
def test_plans_of_every_generated_architecture(split, size):
    """Every parameter is read, every value is written once and before it is read."""
    for index in range(10):
        case = Case.of(sample_architecture(split, 1, index), size=size)
        graph, plan = case.graph, case.plan
        used = [name for step in plan.steps for name in step.names]
        assert len(used) == len(set(used))
        assert set(used) == {graph.names[n] for n in range(len(graph)) if tile_kind(graph, n)}
        written = {0}
        for step in plan.steps:
            assert written.issuperset(v for v in step.inputs if v is not None)
            assert step.output not in written
            written.add(step.output)
        assert written == set(range(len(plan.values)))
        assert set(plan.last_reader) == written - {plan.steps[-1].output}


# --- Tiles ----------------------------------------------------------------------------------------


def test_chunks_hold_every_node_once():
    graphs = [Case.of(Architecture(EXCITE, n)).graph for n in (4, 14)]
    nodes = {}
    for chunk in make_chunks(GHN(), graphs):
        count = len(chunk.owners)
        assert (chunk.nodes[count:] == -1).all() and (chunk.nodes[:count] >= 0).all()
        for node, owner in zip(chunk.nodes, chunk.owners, strict=False):
            assert nodes.setdefault(int(node), (owner, chunk.kind)) == (owner, chunk.kind)
    offset, expected = 0, {}
    for member, graph in enumerate(graphs):
        for node in range(len(graph)):
            if (kind := tile_kind(graph, node)) is not None:
                expected[offset + node] = ((member, graph.names[node]), kind)
        offset += len(graph)
    assert nodes == expected


@pytest.mark.parametrize("decoder", ["conv", "mlp"])  # low-rank ones: test_graphormer.py
def test_tiles_of_chunks_are_those_of_their_nodes(engine, decoder):
    """Decoding in chunks is decoding; gradients too, whatever stands where a chunk has no node."""
    ghn = GHN(max_shape=(12, 16, 3, 3), decoder=decoder)
    edges = (("conv_1x1", 0), ("sep_conv_3x3", 1))
    arch = Architecture(Genotype(edges, (2,), edges, (2,)), 3, C=8)
    graphs = [Case.of(arch.replace(n_cells=n)).graph for n in (3, 14)]
    params, graph = ghn.init_variables(0)["params"], pad_graphs(graphs)
    encode = jax.jit(lambda params: ghn.apply({"params": params}, graph))
    n_node = len(graph.nodes["primitive"])
    programs = TilePrograms(ghn, engine, params)
    states, residuals = programs.encode(graph)(params, graph)
    assert_close(states, encode(params), 1e-5)
    chunks = make_chunks(ghn, graphs)
    assert any(len(c.owners) < len(c.nodes) for c in chunks)
    assert len({c.kind for c in chunks}) < len(chunks)  # more nodes of a kind than a chunk has

    @functools.partial(jax.jit, static_argnums=3)
    def expected(params, states, nodes, kind, cotangent):
        def decode(params, states):
            tiles = ghn.apply({"params": params}, states[nodes], kind, method="decode")
            return squash(tiles, kind, jnp)

        tiles, vjp = jax.vjp(decode, params, states)
        return tiles, vjp(cotangent)

    # Of two workers.
    sums = [jax.tree.map(jnp.zeros_like, (params["decoder"], states)) for _ in range(2)]
    total = jax.tree.map(jnp.zeros_like, (params, states))
    for i, chunk in enumerate(chunks):
        tiles = programs.decode(chunk, n_node)(params["decoder"], states, chunk.nodes)
        count, shape = len(chunk.owners), tiles[0].shape
        cotangent = random(count, *shape, seed=i)
        unused = [np.full(shape, np.nan, np.float32)] * (len(tiles) - count)
        backward, given = programs.decode_backward(chunk, n_node), (*cotangent, *unused)
        sums[i % 2] = backward(params["decoder"], states, chunk.nodes, given, sums[i % 2])
        found, more = expected(params, states, chunk.nodes[:count], chunk.kind, cotangent)
        assert_close(jnp.stack(tiles[:count]), found, 1e-5)
        total = jax.tree.map(jnp.add, total, more)
    added = jax.tree.map(jnp.add, *sums)
    assert_close(added, (total[0]["decoder"], total[1]), 1e-4)
    # And on to the encoder.
    gradient = programs.encode_backward(graph, 2)(params, graph, residuals, tuple(sums))
    (encoder,) = jax.jit(lambda p, g: jax.vjp(encode, p)[1](g))(params, total[1])
    assert_close(gradient, ravel_pytree(jax.tree.map(jnp.add, encoder, total[0]))[0], 1e-4)
