"""The executor gives the logits and the gradients of the Flax modules, for any architecture.

Most tests share the programs of six small buckets: each is compiled once and then runs ten
architectures or more.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ghn_jax.architecture import DARTS, OPERATIONS, VIT, Architecture, Genotype
from ghn_jax.compilation import executor_options
from ghn_jax.executor import run
from ghn_jax.executor.bucket import MAX_HIDDEN, Bucket, Capacity
from ghn_jax.executor.program import (
    Instructions,
    compile_instructions,
    fits,
    kinds_of,
    make_plan,
    tile_rows,
)
from ghn_jax.executor.tiles import decode_tiles, normalise_vectors
from ghn_jax.ghn import GHN
from ghn_jax.graph import Graph, build_graph, pad_graphs
from ghn_jax.network import build_network
from ghn_jax.parameters import TileKind, named_tree, node_tensors, tile_kind
from ghn_jax.sampling import RULES, SPLITS, sample_architecture
from ghn_jax.wiring import Wiring, wire

BATCH, SIZE = 4, 16
PER_BUCKET = 10
NO_DROPOUT = np.ones((BATCH, MAX_HIDDEN), np.float32)
VECTOR = TileKind("vector")
# Tiles smaller than most kernels, and not square: channels repeat, axes cannot be confused.
SMALL = GHN(max_shape=(12, 16, 16, 16))


# --- Architectures --------------------------------------------------------------------------------


class Case(NamedTuple):
    """An architecture and what it is compiled from."""

    name: str
    arch: Architecture
    wiring: Wiring
    graph: Graph
    bucket: Bucket

    @classmethod
    def of(cls, arch: Architecture, name: str = "", size: int = SIZE) -> "Case":
        wiring, graph = wire(arch, image_size=size), build_graph(arch, 1, image_size=size)
        return cls(name, arch, wiring, graph, Bucket.of(wiring))


def small_case(split: str, index: int) -> Case:
    rules = dataclasses.replace(
        RULES[split], n_cells=(3, 6), deep_above=(4, 6), nodes=(1, 3), deep_nodes=2,
        widths=(8,), fc_dims=(24, 96), min_params=None,
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
    *(f"stem {s}, C_mult {m}" for s in ("full", "half", "vit") for m in (1, 2)),
    *(f"stem {s}, norm {n}" for s in ("full", "half", "vit") for n in (True, False)),
    *(f"stem_type {s}, ks {k}" for s in ("0", "0 and pool", "1") for k in (3, 5, 7)),
    *(f"glob_avg {g}, fc_layers {n}" for g in (True, False) for n in (1, 2)),
    *(f"preproc {p}" for p in (True, False)),
    *(f"n_cells {n}" for n in (3, 4, 5, 6)),
}


def choose() -> dict[Bucket, list[Case]]:
    """Ten architectures for each bucket, and any further one that tests something new."""
    chosen: dict[Bucket, list[Case]] = {}
    seen: set[str] = set()
    for index in range(60):
        for split in ("train", "dense", "bnfree"):
            case = small_case(split, index)
            group = chosen.setdefault(case.bucket, [])
            if len(group) < PER_BUCKET or features(case) - seen:
                group.append(case)
                seen |= features(case)
    return chosen


CASES = choose()
ALL = [case for bucket in sorted(CASES) for case in CASES[bucket]]


def test_architectures_cover_the_design_space():
    assert len(ALL) >= 60
    missing = WANTED.difference(*map(features, ALL))
    assert not missing, f"no architecture tests: {sorted(missing)}"


# --- Programs -------------------------------------------------------------------------------------


@functools.cache
def tile_shape(ghn: GHN, kind: TileKind) -> tuple[int, ...]:
    def decode():
        states = jnp.zeros((1, ghn.features))
        return ghn.init_with_output(jax.random.key(0), states, kind, method="decode")[0]

    return jax.eval_shape(decode).shape[1:]


def common_capacity(cases: list[Case]) -> Capacity:
    needs = [dataclasses.astuple(make_plan(case.wiring).needed) for case in cases]
    return Capacity(*map(max, zip(*needs, strict=True)))


def nodes_by_kind(graph: Graph) -> dict[TileKind, list[int]]:
    nodes: dict[TileKind, list[int]] = {}
    for node in range(len(graph)):
        if (kind := tile_kind(graph, node)) is not None:
            nodes.setdefault(kind, []).append(node)
    return nodes


class Run(NamedTuple):
    """One architecture with random tiles, as the executor takes it."""

    case: Case
    tiles: dict[TileKind, np.ndarray]
    table: Instructions
    rows: dict[str, int]  # official parameter name -> row of its tile array

    def of_nodes(self, tiles) -> dict[int, np.ndarray]:
        """The tile of each node from arrays of tiles (or of their cotangents)."""
        graph = self.case.graph
        return {
            node: tiles[kind][self.rows[graph.names[node]]]
            for kind, nodes in nodes_by_kind(graph).items()
            for node in nodes
        }


class Group:
    """A program of one bucket for several architectures, with room for each of them."""

    def __init__(self, bucket, cases, *, capacity=None, normalise=True, ghn=SMALL):
        self.bucket, self.normalise, self.ghn = bucket, normalise, ghn
        self.capacity = capacity or common_capacity(cases)
        counts = [nodes_by_kind(case.graph) for case in cases]
        # One row of each is spare.
        self.sizes = {
            kind: 1 + max(len(count.get(kind, ())) for count in counts) for kind in kinds_of(bucket)
        }
        self.traces = 0
        self.gradient = jax.jit(self._gradient, compiler_options=executor_options())
        self.logits = jax.jit(self.execute, compiler_options=executor_options())

    def prepare(self, case: Case, seed: int = 0) -> Run:
        rows, (names,) = tile_rows([case.graph], self.sizes)
        rng = np.random.default_rng(seed)
        tiles = {
            kind: rng.standard_normal((len(nodes), *tile_shape(self.ghn, kind)), dtype=np.float32)
            for kind, nodes in rows.nodes.items()
        }
        table = compile_instructions(
            make_plan(case.wiring), self.capacity, names, self.sizes[VECTOR] - 1, self.normalise
        )
        return Run(case, tiles, table, names)

    def ready(self, tiles):
        return normalise_vectors(tiles) if self.normalise else tiles

    def execute(self, tiles, table, images, dropout=None):
        self.traces += 1
        return run.execute(
            self.bucket, self.capacity, self.normalise, self.ready(tiles), table, images, dropout
        )

    def _gradient(self, tiles, table, images, cotangent, dropout=NO_DROPOUT):
        """Logits, and the tiles' cotangents for a cotangent of the logits."""
        if self.bucket.multiplier == 1:
            logits, vjp = jax.vjp(lambda t: self.execute(t, table, images, dropout), tiles)
            return logits, vjp(cotangent)[0]
        # The way that training takes, into memory that holds another architecture's states and
        # cotangents: whatever is read before it is written turns into NaN.
        self.traces += 1
        static = self.bucket, self.normalise
        tiles, decode_vjp = jax.vjp(self.ready, tiles)
        arenas = run.Arenas.zeros(self.capacity, len(images))
        dtiles, arenas = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (tiles, arenas))
        values, x = run.forward(*static, tiles, table, images, arenas.values)
        logits, vjp = jax.vjp(
            lambda x, weights: run.head(weights, table, x, dropout),
            x, run.head_tiles(tiles, table),
        )  # fmt: skip
        dx, dhead = vjp(cotangent)
        arenas = arenas._replace(values=values)
        _, dtiles = run.backward(*static, tiles, table, images, arenas, dx, dtiles)
        return logits, *decode_vjp(run.save_head_tiles(dtiles, table, dhead))


@functools.cache
def group_of(bucket: Bucket) -> Group:
    return Group(bucket, CASES[bucket])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


IMAGES, COTANGENT = random(BATCH, SIZE, SIZE, 3), random(BATCH, 10, seed=1)


def module_logits(case: Case, tiles: dict, normalise: bool, images) -> jax.Array:
    graph = case.graph
    tensors = {n: node_tensors(graph, n, tile, normalise, jnp) for n, tile in tiles.items()}
    params = named_tree(graph, tensors)
    network = build_network(case.arch, image_size=case.wiring.image_size)
    return network.apply({"params": params}, images)


def module_gradient(case: Case):
    """What `Group.gradient` computes, from the Flax module: (tiles, images, cotangent) -> ..."""

    def gradient(tiles, images, cotangent):
        logits, vjp = jax.vjp(lambda t: module_logits(case, t, True, images), tiles)
        return logits, vjp(cotangent)[0]

    return jax.jit(gradient)


def neighbours(images: np.ndarray):
    """The images, then the same to within rounding, four times.

    A gradient jumps where a ReLU's input changes sign: within rounding of such a point the executor
    may be on one side and the module on the other, and both are right.
    """
    yield images
    for seed in range(4):
        away = np.where(random(*images.shape, seed=seed) > 0, np.inf, -np.inf)
        yield np.nextafter(images, away.astype(np.float32))


def error(actual, expected) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-6)


def assert_close(actual, expected, what: str, tolerance: float = 1e-3):
    assert error(actual, expected) < tolerance, f"{what}: {error(actual, expected):.1e}"


def assert_trees_close(actual, expected, tolerance: float = 1e-5):
    flat = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, b), a in zip(flat, jax.tree.leaves(actual), strict=True):
        assert_close(a, b, jax.tree_util.keystr(path), tolerance)


# --- Equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.bucket.stem}-{case.name}")
def test_executor_equals_module(case):
    group = group_of(case.bucket)
    prepared = group.prepare(case)
    logits, dtiles = group.gradient(prepared.tiles, prepared.table, IMAGES, COTANGENT)
    gradient = module_gradient(case)
    nodes, actual = prepared.of_nodes(prepared.tiles), prepared.of_nodes(dtiles)
    for images in neighbours(IMAGES):
        expected, gradients = gradient(nodes, images, COTANGENT)
        assert_close(logits, expected, "logits")
        errors = {case.graph.names[n]: error(actual[n], g) for n, g in gradients.items()}
        if max(errors.values()) < 1e-3:
            return
    assert max(errors.values()) < 1e-3, f"gradients: {errors}"


EXCITE = Genotype(
    (("cse", 0), ("sep_conv_3x3", 1)), (2,), (("conv_7x1_1x7", 0), ("skip_connect", 1)), (2,)
)


@pytest.mark.parametrize(
    "size, normalise, arch",
    [
        # Large images have other stems.
        (128, True, Architecture(VIT, 3, C=8)),
        (128, True, Architecture(DARTS, 3, C=8, stem_type=1, ks=5, fc_layers=2, fc_dim=40)),
        # GHN-1's parameters are not scaled.
        (SIZE, False, Architecture(EXCITE, 3, C=8, ks=7, glob_avg=False, fc_layers=2, fc_dim=40)),
    ],
    ids=["vit-128", "half-128", "full-ghn1"],
)
def test_forward_equals_module(size, normalise, arch):
    case = Case.of(arch, size=size)
    group = Group(case.bucket, [case], normalise=normalise)
    prepared = group.prepare(case)
    images = random(2, size, size, 3)
    # Small enough that unscaled networks do not overflow.
    tiles = jax.tree.map(lambda tile: tile * (1 if normalise else 0.3), prepared.tiles)
    nodes = prepared.of_nodes(tiles)
    expected = jax.jit(lambda t: module_logits(case, t, normalise, images))(nodes)
    assert_close(group.logits(tiles, prepared.table, images), expected, "logits")


def test_dropout():
    """Factors given to the executor act where the module's dropout does."""
    case = next(c for c in CASES[Bucket(8, 1, SIZE, "vit")] if c.arch.fc_layers == 2)
    group = group_of(case.bucket)
    prepared = group.prepare(case)
    factors = 2 * np.random.default_rng(0).integers(2, size=NO_DROPOUT.shape).astype(np.float32)
    logits, dtiles = group.gradient(prepared.tiles, prepared.table, IMAGES, COTANGENT, factors)

    def multiply(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            return args[0] * factors[:, : args[0].shape[1]]
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(multiply):
        expected = module_gradient(case)(prepared.of_nodes(prepared.tiles), IMAGES, COTANGENT)
    assert_trees_close((logits, prepared.of_nodes(dtiles)), expected, 1e-3)


# --- Programs and how they are transformed --------------------------------------------------------


def test_one_program_runs_every_architecture():
    bucket = Bucket(8, 1, SIZE, "vit")
    indices = [(split, i) for i in range(100, 200) for split in ("train", "dense", "bnfree")]
    others = (small_case(*index) for index in indices)
    group = group_of(bucket)
    fitting = [c for c in others if c.bucket == bucket
               and fits(make_plan(c.wiring).needed, group.capacity)
               and all(len(n) < group.sizes[k]
                       for k, n in nodes_by_kind(c.graph).items())]  # fmt: skip
    assert len(fitting) >= 20
    results, programs = set(), []
    for case in fitting[:20]:
        prepared = group.prepare(case)
        logits, _ = group.gradient(prepared.tiles, prepared.table, IMAGES, COTANGENT)
        results.add(float(logits[0, 0]))
        programs.append(group.gradient._cache_size())
    assert len(results) == 20  # they did not run the same one
    assert programs[0] == programs[-1]


class Batch(NamedTuple):
    """Architectures of one bucket as stacked arrays, and what they give one by one."""

    group: Group
    tiles: dict[TileKind, np.ndarray]
    tables: Instructions
    results: tuple

    @classmethod
    def of(cls, count: int) -> "Batch":
        group = group_of(Bucket(8, 1, SIZE, "vit"))
        runs = [group.prepare(case, i) for i, case in enumerate(CASES[group.bucket][:count])]
        results = [group.gradient(r.tiles, r.table, IMAGES, COTANGENT) for r in runs]
        stacked = [(r.tiles, r.table, result) for r, result in zip(runs, results, strict=True)]
        return cls(group, *jax.tree.map(lambda *x: np.stack(x), *stacked))


def test_vmap_equals_one_by_one():
    group, tiles, tables, results = Batch.of(3)
    mapped = jax.vmap(group._gradient, in_axes=(0, 0, None, None))
    mapped = jax.jit(mapped, compiler_options=executor_options())
    assert_trees_close(mapped(tiles, tables, IMAGES, COTANGENT), results)


def test_two_devices_equal_one():
    group, tiles, tables, results = Batch.of(2)
    mesh = Mesh(jax.devices()[:2], ("architecture",))
    each, all_ = PartitionSpec("architecture"), PartitionSpec()

    def on_one_device(tiles, table, images, cotangent):
        tiles, table = jax.tree.map(lambda x: x[0], (tiles, table))
        result = group._gradient(tiles, table, images, cotangent)
        return jax.tree.map(lambda x: x[None], result)

    sharded = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=(each, each, all_, all_), out_specs=each, check_vma=False
    )
    sharded = jax.jit(sharded, compiler_options=executor_options())
    actual = sharded(tiles, tables, IMAGES, COTANGENT)
    assert len(actual[0].sharding.device_set) == 2
    assert_trees_close(actual, results)


def test_room_to_spare_changes_nothing():
    group = group_of(Bucket(8, 1, SIZE, "vit"))
    case = CASES[group.bucket][0]
    c = group.capacity
    roomy = Group(
        group.bucket,
        CASES[group.bucket],
        capacity=Capacity(c.values + 301, c.gradients + 57, c.instructions + 7, c.parts + 2),
    )
    results = []
    for g in (group, roomy):
        prepared = g.prepare(case)
        results.append(g.gradient(prepared.tiles, prepared.table, IMAGES, COTANGENT))
    assert_trees_close(*results)


def test_arenas_that_indices_do_not_reach_are_refused():
    capacity = Capacity(2**22, 2**18, 64, 4)
    assert run.Arenas.shapes(capacity, 63).values.shape == (63 * 2**25,)
    with pytest.raises(ValueError, match="give each device fewer images"):
        run.Arenas.shapes(capacity, 64)


def test_places_of_states_do_not_overlap():
    """A state has its place to itself for as long as it is needed."""
    for case in ALL[::5]:
        _, _, steps, planes, places = make_plan(case.wiring)
        values = np.zeros(places.values, int)
        for i, step in enumerate(steps):
            if step.target is not None:
                units = case.bucket.units(planes[step.target])
                if i in places.kept:
                    values[places.kept[i] : places.kept[i] + units] += 1
                if step.target not in [s.target for s in steps[:i]]:
                    values[places.value[step.target] :][:units] += 1
        assert (values == 1).all()
        gradients = np.full(places.gradients, -1)  # whose cotangent is where, walking back
        for step in reversed(steps):
            if step.target is not None:
                units = case.bucket.units(planes[step.target])
                assert (gradients[places.gradient[step.target] :][:units] == step.target).all()
            for state, _ in step.sources:
                if state != 0:
                    units = case.bucket.units(planes[state])
                    gradients[places.gradient[state] :][:units] = state


# --- What surrounds the programs ------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [32, 224])
def test_every_generated_architecture_has_instructions(split, size):
    for index in range(20):
        case = Case.of(sample_architecture(split, 1, index), size=size)
        capacity = make_plan(case.wiring).needed
        _, (rows,) = tile_rows([case.graph], {})
        table = compile_instructions(make_plan(case.wiring), capacity, rows, 0)
        assert table.count == capacity.instructions
        # Every parameter is read, by an instruction or by the head.
        used = {*table.kernels.ravel(), *table.vectors.ravel(), *table.norm_vector, *table.head}
        assert used >= set(rows.values())


def test_least_capacity_is_the_least():
    case = ALL[0]
    capacity = make_plan(case.wiring).needed
    _, (rows,) = tile_rows([case.graph], {})
    compile_instructions(make_plan(case.wiring), capacity, rows, 0)
    for field, size in dataclasses.asdict(capacity).items():
        small = dataclasses.replace(capacity, **{field: size - 1})
        with pytest.raises(ValueError, match="raise the capacity"):
            compile_instructions(make_plan(case.wiring), small, rows, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_cells": 2}, "3 cells or more, given 2"),
        ({"ks": 9}, "given ks=9"),
        ({"fc_layers": 3}, "1 or 2 fully connected layers, given 3"),
        ({"fc_layers": 2, "fc_dim": MAX_HIDDEN + 1}, "512 hidden units or less, given fc_dim=513"),
        ({"C": 12}, "multiples of 8, given C=12"),
    ],
)
def test_what_the_executor_cannot_run(changes, message):
    arch = Architecture(DARTS, **{"n_cells": 3, **changes})
    with pytest.raises(ValueError, match=message):
        Bucket.of(wire(arch))


@pytest.mark.parametrize("cells", [(4, 14), (3,)])
def test_tiles_of_a_group_are_those_of_its_nodes(cells):
    """Decoding in chunks, as many as the batch needs, is decoding; gradients too."""
    ghn = GHN(max_shape=(12, 16, 7, 7))
    graphs = [Case.of(Architecture(EXCITE, n_cells)).graph for n_cells in cells]
    variables = ghn.init_variables(0)
    states = ghn.apply(variables, pad_graphs(graphs))
    # Of classifiers there are fewer than a chunk.
    rows, names = tile_rows(graphs, {TileKind("classifier"): 8})

    def all_at_once(variables, states):
        return normalise_vectors(
            {
                kind: ghn.apply(variables, states[nodes], kind, method="decode")[
                    : rows.counts[kind]
                ]
                for kind, nodes in rows.nodes.items()
            }
        )

    def in_chunks(variables, states):
        tiles = decode_tiles(ghn, variables, states, rows)
        return {kind: tile[: rows.counts[kind]] for kind, tile in tiles.items()}

    cotangent = {
        kind: random(int(count), *tile_shape(ghn, kind)) for kind, count in rows.counts.items()
    }
    results = []
    for decode in (in_chunks, all_at_once):

        @jax.jit
        def both(variables, states, cotangent, decode=decode):
            tiles, vjp = jax.vjp(decode, variables, states)
            return tiles, vjp(cotangent)

        results.append(both(variables, states, cotangent))
    assert_trees_close(*results)
    counts = [int(count) for count in rows.counts.values()]
    assert max(counts) > 64 if len(cells) > 1 else 1 in counts  # more than a chunk; less than one
    # The rows' names lead to the nodes of their own graph.
    offset = 0
    for g, row_of in zip(graphs, names, strict=True):
        for kind, nodes in nodes_by_kind(g).items():
            for node in nodes:
                assert rows.nodes[kind][row_of[g.names[node]]] == offset + node
        offset += len(g)
