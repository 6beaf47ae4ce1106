"""Meta-batches: several architectures as the arrays of one update (§ 4.3), made on the host."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jraph

from ghn_jax.architecture import Architecture
from ghn_jax.executor.bucket import Bucket, Capacity
from ghn_jax.executor.program import (
    Instructions,
    Plan,
    TileRows,
    compile_instructions,
    make_plan,
    tile_rows,
)
from ghn_jax.ghn import GHN
from ghn_jax.graph import Graph, count_nodes, next_power_of_two, pad_graphs
from ghn_jax.parameters import TileKind
from ghn_jax.wiring import wire

# A meta-batch of up to 8 architectures with more nodes than this is passed over, as in the authors'
# code; of more architectures, with more than so many for every 8.
MAX_NODES = 2200


class Program(NamedTuple):
    """One architecture, ready for the executor."""

    bucket: Bucket
    capacity: Capacity
    table: Instructions


class Group(NamedTuple):
    """The architectures that one worker runs, one after another.

    Attributes:
      members: their positions in the meta-batch.
      graph: their graphs, padded to one.
      rows: the nodes of that graph that need each kind of tile.
      programs: the architectures for the executor, in the order of `members`.
    """

    members: tuple[int, ...]
    graph: jraph.GraphsTuple
    rows: TileRows
    programs: tuple[Program, ...]


class MetaBatch(NamedTuple):
    """What one update needs to know about its architectures.

    Attributes:
      groups: the architectures divided between workers: those of this process.
      nodes: number of nodes of all graphs.
      architectures: all of them, in the order given.
      position: where the stream of architectures goes on after this meta-batch.
    """

    groups: tuple[Group, ...]
    nodes: int
    architectures: tuple[Architecture, ...]
    position: int


# Rows for each kind of tile in a group of four architectures of the training split, one of them
# spare: about twice the most seen in 1,600 generated ones. Where they do not suffice they double,
# and the programs that meet the larger arrays are compiled again.
_ROWS_OF_FOUR = {
    TileKind("kernel"): 512,
    TileKind("kernel", 3, 3): 128,
    TileKind("kernel", 5, 5): 64,
    TileKind("kernel", 7, 7): 64,
    TileKind("kernel", 1, 7): 64,
    TileKind("kernel", 7, 1): 64,
    TileKind("depthwise", 3, 3): 128,
    TileKind("depthwise", 5, 5): 128,
    TileKind("vector"): 1024,
    TileKind("classifier"): 8,
    TileKind("classifier_bias"): 8,
}


def _row_capacity(image_size: int, size: int) -> dict[TileKind, int]:
    """Rows of each kind's tile array for a group of `size` architectures."""
    factor = max(next_power_of_two(size), 2) / 4
    rows = {kind: int(n * factor) for kind, n in _ROWS_OF_FOUR.items()}
    positions = 14 if image_size > 96 else (image_size + 2 - 3) // 3 + 1
    rows[TileKind("position", positions, positions)] = max(2 * next_power_of_two(size), 2)
    if image_size > 96:
        rows[TileKind("kernel", 16, 16)] = max(2 * next_power_of_two(size), 2)
    return rows


def common_capacity(needed: Iterable[Capacity]) -> Capacity:
    """Room for each of several architectures, in powers of two."""
    fields = zip(*map(dataclasses.astuple, needed), strict=True)
    return Capacity(*(next_power_of_two(max(field)) for field in fields))


def _cost(plan: Plan) -> float:
    """A rough cost of running an architecture, in no unit: what a core was seen to take."""
    cost = 0.0
    for step in plan.steps:
        if step.target is None:
            continue
        size, channels = plan.bucket.planes[step.kind.target]
        name, _, kernel = step.kind.name.partition("_")
        if name == "attention":
            per_number = 200 + 6 * channels + 2 * size**2 + 160 * size**2 / channels  # of 8 heads
        elif name in ("depthwise", "dilated"):
            per_number = 100 + int(kernel) ** 2 + channels
        elif kernel in ("3", "5", "7", "7x1") and name == "conv":
            per_number = 150 + 5 * channels
        elif name == "stem":
            per_number = 150
        else:
            per_number = channels * len(step.sources)
        cost += size * size * channels * (per_number + 100)
    return cost


def divide(costs: Sequence[float], n_groups: int) -> list[list[int]]:
    """Divides architectures between groups so that the largest cost of a group is small.

    The most expensive first, each to the group with the least so far. Groups may differ in how many
    they get, but each gets one at least, and none more than twice its share, which bounds the
    arrays that they are padded to.
    """
    most = 2 * -(-len(costs) // n_groups)
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    totals = [0.0] * n_groups
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        free = (g for g in range(n_groups) if len(groups[g]) < most)
        g = min(free, key=lambda g: (totals[g], len(groups[g])))
        groups[g].append(i)
        totals[g] += costs[i]
    return [sorted(g) for g in groups]


def _pad_graph(graphs: Sequence[Graph], share: int, graph_nodes: int) -> jraph.GraphsTuple:
    """A group's graphs as one, of sizes that nearly every group of this share has."""
    nodes = sum(map(len, graphs))
    edges = sum(len(g.edges) for g in graphs)
    n_node, n_step = graph_nodes * next_power_of_two(share), next_power_of_two(graph_nodes)
    n_edge = next_power_of_two(max(edges, 128 * n_node))
    graph = pad_graphs(graphs, max(n_node, nodes + 1), n_edge)
    steps = len(graph.globals["forward"])
    if nodes >= n_node or steps > n_step:
        # Larger in both, so that there are two sizes and not four.
        n_node = next_power_of_two(max(n_node, nodes) + 1)
        graph = pad_graphs(graphs, n_node, n_edge, n_step=max(2 * n_step, steps))
    else:
        graph = pad_graphs(graphs, n_node, n_edge, n_step=n_step)
    return graph._replace(
        n_node=graph.n_node.sum(keepdims=True), n_edge=graph.n_edge.sum(keepdims=True)
    )


def _make_group(
    ghn: GHN, members, architectures, plans, share, *, image_size, graph_nodes, capacity
):
    graphs = [ghn.graph(architectures[i], image_size=image_size) for i in members]
    rows, names = tile_rows(graphs, _row_capacity(image_size, share))
    spare = len(rows.nodes[TileKind("vector")]) - 1
    programs = []
    for i, row_of in zip(members, names, strict=True):
        needed = plans[i].needed
        room = common_capacity([needed] if capacity is None else [needed, capacity])
        table = compile_instructions(plans[i], room, row_of, spare, ghn.normalise)
        programs.append(Program(plans[i].bucket, room, table))
    graph = _pad_graph(graphs, share, graph_nodes)
    return Group(tuple(members), graph, rows, tuple(programs)), [len(g) for g in graphs]


def make_meta_batch(
    ghn: GHN,
    architectures: Sequence[Architecture],
    *,
    image_size: int,
    n_groups: int = 1,
    local: range | None = None,
    graph_nodes: int = 288,
    capacity: Capacity | None = None,
    position: int = 0,
) -> MetaBatch:
    """Prepares architectures for an update.

    Args:
      ghn: the hypernetwork that will predict their parameters.
      architectures: the meta-batch.
      image_size: height and width of the images, in pixels.
      n_groups: number of workers that will run them, of all processes.
      local: which of the groups this process prepares; all if not given.
      graph_nodes: nodes that a group's padded graph has room for, for each architecture of an even
        share; where that does not suffice, it grows.
      capacity: room that every architecture's program has at least, so that it is the same for all
        that fit; None for what each needs.
      position: stored in the result.

    Raises:
      ValueError: there are fewer architectures than groups, or one is beyond the decoders or the
        executor.
    """
    if n_groups > len(architectures):
        raise ValueError(
            f"{len(architectures)} architectures cannot be divided between {n_groups} groups; give "
            "as many or more"
        )
    options = {"num_classes": ghn.num_classes, "image_size": image_size}
    plans = [make_plan(wire(arch, **options)) for arch in architectures]
    divided = divide([_cost(plan) for plan in plans], n_groups)
    share = -(-len(architectures) // n_groups)
    sizes: dict[int, int] = {}
    groups = []
    for members in divided if local is None else divided[local.start : local.stop]:
        group, nodes = _make_group(
            ghn, members, architectures, plans, share,
            image_size=image_size, graph_nodes=graph_nodes, capacity=capacity,
        )  # fmt: skip
        groups.append(group)
        sizes.update(zip(members, nodes, strict=True))
    # Of architectures that other processes prepare, only the number of nodes matters here.
    nodes = sum(sizes[i] if i in sizes else count_nodes(p.wiring) for i, p in enumerate(plans))
    return MetaBatch(tuple(groups), nodes, tuple(architectures), position)


@dataclasses.dataclass(frozen=True)
class Stream:
    """An endless stream of meta-batches; meta-batch after meta-batch a pure function of `start`.

    Attributes:
      ghn, image_size, n_groups, local, graph_nodes: see `make_meta_batch`. Which architectures
        come, and in which order, does not depend on the groups.
      architecture: position -> the architecture at that position of the stream.
      size: architectures in a meta-batch.
      max_nodes: meta-batches with more nodes for every 8 architectures (or part of 8) are passed
        over.
    """

    ghn: GHN
    architecture: Callable[[int], Architecture]
    size: int
    image_size: int
    n_groups: int = 1
    local: range | None = None
    graph_nodes: int = 288
    max_nodes: int = MAX_NODES

    @functools.cached_property
    def capacity(self) -> Capacity:
        """Room for nearly every architecture of the stream: for each of its first 256."""
        options = {"num_classes": self.ghn.num_classes, "image_size": self.image_size}
        first = (wire(self.architecture(i), **options) for i in range(256))
        return common_capacity(make_plan(wiring).needed for wiring in first)

    def batches(self, start: int) -> Iterator[MetaBatch]:
        """Meta-batches from a position of the stream on."""
        position = start
        while True:
            architectures = [self.architecture(position + i) for i in range(self.size)]
            position += self.size
            batch = make_meta_batch(
                self.ghn,
                architectures,
                image_size=self.image_size,
                n_groups=self.n_groups,
                local=self.local,
                graph_nodes=self.graph_nodes,
                capacity=self.capacity,
                position=position,
            )
            if batch.nodes <= self.max_nodes * -(-self.size // 8):
                yield batch
