"""Architectures that cover the design space, and how engine and Flax modules run them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from definition import unit_by_unit

from ghn_jax.deepnets1m.architecture import OPERATIONS, Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph, build_graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import RULES, sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.wiring import Wiring, wire
from ghn_jax.engine.engine import Engine, tree_of, weights_of
from ghn_jax.engine.plan import Plan, make_plan
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.tiling import named_tree, node_tensors, squash, tile_kind, tile_tensors
from ghn_jax.training.decoding import Tiles

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


# --- Running them ---------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


IMAGES, COTANGENT = random(BATCH, SIZE, SIZE, 3), random(BATCH, 10, seed=1)


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
