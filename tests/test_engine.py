"""The engine gives the logits and the gradients of the Flax modules, for any architecture.

The modules run unit by unit: what two architectures have in common is compiled once, as it is for
the engine. Architectures are chosen such that much is.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import unit_by_unit
from jax.flatten_util import ravel_pytree

from ghn_jax.deepnets1m.architecture import DARTS, OPERATIONS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph, build_graph
from ghn_jax.deepnets1m.layers import concatenate
from ghn_jax.deepnets1m.network import Network, build_network
from ghn_jax.deepnets1m.sampling import RULES, SPLITS, sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import NormSum
from ghn_jax.deepnets1m.wiring import Wiring, wire
from ghn_jax.engine.compilation import program_options
from ghn_jax.engine.engine import Engine, array_operations, tree_of, weights_of
from ghn_jax.engine.plan import Plan, make_plan
from ghn_jax.engine.programs import Programs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.hypernet.tiling import named_tree, node_tensors, squash, tile_kind, tile_tensors
from ghn_jax.training.decoding import TilePrograms, Tiles, make_chunks

BATCH, SIZE, COUNT = 4, 16, 60
# Tiles smaller than most kernels, and not square: channels repeat, axes cannot be confused.
SMALL = GHN(max_shape=(12, 16, 16, 16))


# --- Architectures --------------------------------------------------------------------------------


class Case(NamedTuple):
    """An architecture and what it is run from."""

    name: str
    arch: Architecture
    wiring: Wiring
    plan: Plan

    @classmethod
    def of(cls, arch: Architecture, name: str = "", size: int = SIZE) -> "Case":
        wiring = wire(arch, Task(image_size=size))
        return cls(name, arch, wiring, make_plan(wiring))

    @property
    def graph(self) -> Graph:
        return graph_of(self.arch, self.wiring.task.image_size)

    @property
    def network(self):
        return build_network(self.arch, image_size=self.wiring.task.image_size)


@functools.cache
def graph_of(arch: Architecture, size: int) -> Graph:
    return build_graph(arch, 1, image_size=size)


def small_case(split: str, index: int) -> Case:
    rules = dataclasses.replace(
        RULES[split], n_cells=(3, 6), deep_above=(4, 6), nodes=(1, 3), deep_nodes=2,
        widths=(8,), fc_dims=(24,), min_params=None,
    )  # fmt: skip
    return Case.of(sample_architecture(split, 0, index, rules=rules), f"{split}-{index}")


def features(case: Case) -> set[str]:
    """What running an architecture tests, in words."""
    arch, stem = case.arch, "full"
    if arch.has_attention:
        stem = "vit"
    elif arch.stem_type == 1 or arch.stem_pool:
        stem = "half"
    words = {
        f"stem {stem}, C_mult {arch.C_mult}",
        f"stem {stem}, norm {arch.norm is not None}",
        f"preproc {arch.preproc}",
        f"glob_avg {arch.glob_avg}, fc_layers {arch.fc_layers}",
        f"n_cells {arch.n_cells}",
    }
    if not arch.has_attention:
        pool = " and pool" if arch.stem_pool else ""
        words.add(f"stem_type {arch.stem_type}{pool}, ks {arch.ks}")
    for op in case.wiring.operations:
        if "._ops." in op.name and op.kind != "msa":
            # With a stride, a skip connection is a factorised reduction.
            kind = "skip_connect" if op.kind == "factorized_reduce" else op.kind
            words.add(f"{kind}, stride {op.stride}")
        if None in op.inputs:
            words.add("zeros in the input")
    if None in case.wiring.head.feature:
        words.add("zeros in the head's input")
    for which in ("normal", "reduce"):
        for kind, source in getattr(arch.genotype, which):
            if kind == "msa":  # networks with attention have no strides
                words.add(f"msa, {which} cell")
            if kind == "none":
                words.add(f"none, stride {2 if which == 'reduce' and source < 2 else 1}")
    return words


WANTED = {
    *(f"{op}, stride {s}" for op in OPERATIONS if op != "msa" for s in (1, 2)),
    *("msa, normal cell", "msa, reduce cell"),
    *("zeros in the input", "zeros in the head's input"),
    *(f"stem {s}, C_mult {m}" for s in ("full", "half", "vit") for m in (1, 2)),
    *(f"stem {s}, norm {n}" for s in ("full", "half", "vit") for n in (True, False)),
    *(f"stem_type {s}, ks {k}" for s in ("0", "0 and pool", "1") for k in (3, 5, 7)),
    *(f"glob_avg {g}, fc_layers {n}" for g in (True, False) for n in (1, 2)),
    *(f"preproc {p}" for p in (True, False)),
    *(f"n_cells {n}" for n in (3, 4, 5, 6)),
}


def programs_of(case: Case) -> set:
    """What is compiled for an architecture, as far as another one may need the same."""
    values = case.plan.values
    return {
        (step.unit, tuple(None if v is None else values[v] for v in step.inputs))
        for step in case.plan.steps
    }


def choose(pool: list[Case], wanted: set[str], count: int) -> list[Case]:
    """Cases that test all that is wanted, then others; those first that compile little."""
    pool = list(pool)
    tests, needs = ({case.name: f(case) for case in pool} for f in (features, programs_of))
    chosen, left, compiled = [], set(wanted), set()
    while len(chosen) < count or left:
        useful = [case for case in pool if not left or tests[case.name] & left]
        if not useful:
            break

        def price(case, compiled=compiled, left=left):
            new = len(needs[case.name] - compiled)
            return (5 + new) / len(tests[case.name] & left) if left else new

        best = min(useful, key=price)
        pool.remove(best)
        chosen.append(best)
        compiled |= needs[best.name]
        left -= tests[best.name]
    return chosen


POOL = [small_case(split, i) for i in range(100) for split in ("train", "dense", "bnfree")]
ALL = choose(POOL, WANTED, COUNT)
# Every kind of tile; weights of classifiers that repeat.
TILED = choose(
    ALL,
    {
        *("msa, normal cell", "stem vit, norm True", "cse, stride 1", "conv_7x1_1x7, stride 1"),
        *("sep_conv_3x3, stride 1", "dil_conv_5x5, stride 2", "skip_connect, stride 2"),
        *("glob_avg False, fc_layers 1", "glob_avg True, fc_layers 2"),
        *("glob_avg False, fc_layers 2", "stem_type 1, ks 7"),
    },
    0,
)


def test_architectures_cover_the_design_space():
    assert len({case.arch for case in ALL}) == len(ALL) >= 60
    missing = WANTED.difference(*map(features, ALL))
    assert not missing, f"no architecture tests: {sorted(missing)}"


# --- Running them ---------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


IMAGES, COTANGENT = random(BATCH, SIZE, SIZE, 3), random(BATCH, 10, seed=1)


@pytest.fixture(scope="module")
def engine():
    """Its programs are compiled as in training."""
    programs = Programs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ghn_jax.engine.engine.program_options", program_options)
        made = Engine(programs=programs)
    yield made
    programs.close()


def random_tiles(case: Case, ghn: GHN = SMALL) -> dict[str, np.ndarray]:
    """A tile for each parameter, under its official name."""
    graph, form, tiles = case.graph, Tiles(ghn), {}
    shapes = {
        name: shape
        for step in case.plan.steps
        for name, (shape,) in zip(step.names, form.shapes(step.unit), strict=True)
    }
    assert set(shapes) == {graph.names[n] for n in range(len(graph)) if tile_kind(graph, n)}
    for seed, (name, shape) in enumerate(shapes.items()):
        tiles[name] = random(*shape, seed=seed)
    return tiles


@functools.partial(jax.jit, static_argnums=range(4))
def compiled_tensors(primitive, shape, kind, normalise: bool, tile) -> dict:
    """`node_tensors`, compiled once for all nodes that are alike."""
    tile = squash(tile, kind, jnp) if normalise else tile
    return tile_tensors(primitive, shape, kind, tile, normalise, jnp)


def params_of(case: Case, tiles: dict, compiled: bool = False, normalise: bool = True) -> dict:
    """The module's parameters from tiles."""
    graph = case.graph
    nodes = {name: node for node, name in enumerate(graph.names)}

    def tensors(node, tile):
        if not compiled:
            return node_tensors(graph, node, tile, normalise, np)
        primitive, shape = PRIMITIVES[graph.primitives[node]], graph.param_shapes[node]
        return compiled_tensors(primitive, tuple(shape), tile_kind(graph, node), normalise, tile)

    return named_tree(graph, {nodes[n]: tensors(nodes[n], tile) for n, tile in tiles.items()})


def walk(engine: Engine, plan: Plan, weights, *, form=None, images=IMAGES, seed=None):
    """Logits, and cotangents of the parameters."""
    options = {"gradient": True, "dropout": seed is not None}
    form = (form,) if form else ()
    network = engine.prepare(plan, len(images), *form, **options)
    images, cotangent = jax.device_put((images, COTANGENT[: len(images)]), engine.split)
    weights = jax.device_put(weights, engine.whole)
    logits, trace = engine.forward(network, weights, images, keep=True, seed=seed)
    gradient = engine.backward(network, weights, trace, cotangent)
    assert set(trace.values) == {0}  # all but the images is used up
    return logits, gradient


def module_walk(case: Case, params, images=IMAGES, tiles: bool = False, **options):
    """The same by the Flax module; with `tiles`, parameters are made from them."""
    normalise = options.pop("normalise", True)

    def run(params):
        made = params_of(case, params, True, normalise) if tiles else params
        return case.network.apply({"params": made}, images, **options)

    with unit_by_unit():
        logits, vjp = jax.vjp(run, params)
        return logits, vjp(COTANGENT[: len(images)])[0]


def neighbours(images: np.ndarray):
    """The images, then the same to within rounding, four times.

    A gradient jumps where a ReLU's input changes sign: within rounding of such a point the engine
    may be on one side and the module on the other, and both are right.
    """
    yield images
    for seed in range(4):
        away = np.where(random(*images.shape, seed=seed) > 0, np.inf, -np.inf)
        yield np.nextafter(images, away.astype(np.float32))


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-6)


def assert_close(actual, expected, tolerance: float = 1e-3):
    """Trees of the same keys and shapes, whose arrays are close."""
    flat, keys = jax.tree_util.tree_flatten_with_path(expected)
    assert jax.tree.structure(actual) == keys
    errors = {
        jax.tree_util.keystr(path): error(a, b)
        for (path, b), a in zip(flat, jax.tree.leaves(actual), strict=True)
    }
    assert max(errors.values()) < tolerance, errors


def assert_is_module(case: Case, actual, params, images=IMAGES, **options):
    """Logits and gradient are the module's, for these images or their like."""
    logits, gradient = actual
    problem = None
    for near in neighbours(images):
        expected, gradients = module_walk(case, params, near, **options)
        assert_close(logits, expected)
        try:
            return assert_close(gradient, gradients)
        except AssertionError as difference:
            problem = difference
    raise problem


def check(case: Case, engine: Engine, images=IMAGES):
    """With tensors as parameters."""
    params = params_of(case, random_tiles(case))
    logits, gradient = walk(engine, case.plan, weights_of(case.plan, params), images=images)
    assert_is_module(case, (logits, tree_of(case.plan, gradient)), params, images)


def squashed(tiles: dict[str, np.ndarray], case: Case, ghn: GHN) -> dict[str, jax.Array]:
    """Tiles of vectors, as they are where they have been decoded."""
    nodes = {name: node for node, name in enumerate(case.graph.names)}
    return {
        name: squash(jnp.asarray(tile), tile_kind(case.graph, nodes[name]), jnp)
        if ghn.normalise
        else jnp.asarray(tile)
        for name, tile in tiles.items()
    }


def check_tiles(case: Case, engine: Engine, ghn: GHN = SMALL, scale: float = 1.0):
    """With tiles as parameters."""
    tiles = {name: scale * tile for name, tile in random_tiles(case, ghn).items()}
    ready, vjp = jax.vjp(lambda tiles: squashed(tiles, case, ghn), tiles)
    weights = {name: (tile,) for name, tile in ready.items()}
    logits, gradient = walk(engine, case.plan, weights, form=Tiles(ghn))
    (gradient,) = vjp({name: tile for name, (tile,) in gradient.items()})
    assert_is_module(case, (logits, gradient), tiles, tiles=True, normalise=ghn.normalise)


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
