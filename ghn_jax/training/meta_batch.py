"""Meta-batches: several architectures as the data of one update (§ 4.3), made on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jraph
import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import Graph, count_nodes
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.engine.plan import Plan, make_plan
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.padding import next_power_of_two, pad_graphs
from ghn_jax.training.decoding import Chunk, make_chunks

# A meta-batch of up to 8 architectures with more nodes than this is passed over, as in the authors'
# code; of more architectures, with more than so many for every 8.
MAX_BATCH_NODES = 2200

_LARGE = 100  # meta-batches in a row that are passed over before it is an error
_STEPS = 64  # the number of a sweep's steps is rounded up to a multiple of this
_ROOM = 128  # and the largest graph's nodes, where graphs are encoded side by side


class MetaBatch(NamedTuple):
    """What one update needs to know about its architectures.

    Attributes:
      members: places in the meta-batch of the architectures that this process runs, ascending.
      plans: their steps.
      costs: of running them; see `cost`.
      graph: their graphs, padded to one.
      chunks: the nodes of that graph that have parameters.
      nodes: number of nodes of all graphs, of all processes.
      architectures: all of them, in the order given.
      position: where the stream of architectures goes on after this meta-batch.
    """

    members: tuple[int, ...]
    plans: tuple[Plan, ...]
    costs: tuple[float, ...]
    graph: jraph.GraphsTuple
    chunks: tuple[Chunk, ...]
    nodes: int
    architectures: tuple[Architecture, ...]
    position: int


def cost(plan: Plan) -> float:
    """A rough cost of running a network, to share out networks by: multiply-adds, and numbers."""
    total = 0.0
    for step in plan.steps:
        size = plan.values[next(v for v in step.inputs if v is not None)].size
        channels, height = plan.values[step.output]
        total += step.unit.multiply_adds(size) + 100 * channels * height**2
    return total


def divide(costs: Sequence[float], shares: int) -> list[list[int]]:
    """Divides architectures so that the largest cost of a share is small.

    The most expensive first, each to the share with the least so far; each gets one at least.
    """
    parts: list[list[int]] = [[] for _ in range(shares)]
    totals = [0.0] * shares
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(shares), key=lambda part: (totals[part], len(parts[part])))
        parts[least].append(i)
        totals[least] += costs[i]
    return [sorted(part) for part in parts]


def _join(ghn: GHN, graphs: Sequence[Graph], graph_nodes: int) -> jraph.GraphsTuple:
    """Graphs as one, of sizes that nearly every meta-batch of as many has."""
    nodes, edges = sum(map(len, graphs)), sum(len(g.edges) for g in graphs)
    n_node = graph_nodes * next_power_of_two(len(graphs))
    if nodes >= n_node:
        n_node = next_power_of_two(nodes + 1)
    n_edge = next_power_of_two(max(edges, 64 * n_node))
    if ghn.encoder == "graphormer":
        largest = -(-max(map(len, graphs)) // _ROOM) * _ROOM
        return pad_graphs(graphs, n_node, n_edge, largest=largest)
    graph = pad_graphs(graphs, n_node, n_edge)
    # Sweeps' steps to a multiple of 64: a power of two would leave half of them empty.
    steps = max(int((rows < n_node).any(1).sum()) for rows in graph.globals.values())
    length = -(-steps // _STEPS) * _STEPS
    padded = {
        name: np.pad(
            rows[:length], ((0, max(0, length - len(rows))), (0, 0)), constant_values=n_node
        )
        for name, rows in graph.globals.items()
    }
    return graph._replace(globals=padded)


def make_meta_batch(
    ghn: GHN,
    architectures: Sequence[Architecture],
    *,
    image_size: int,
    share: tuple[int, int] = (0, 1),
    graph_nodes: int = 288,
    position: int = 0,
) -> MetaBatch:
    """Prepares architectures for an update.

    Args:
      ghn: the hypernetwork that will predict their parameters.
      architectures: the meta-batch.
      image_size: height and width of the images, in pixels.
      share: which share of the architectures this process runs, and of how many.
      graph_nodes: nodes that the padded graph has room for, for each architecture; where that does
        not suffice, it grows.
      position: stored in the result.

    Raises:
      ValueError: there are fewer architectures than shares, or one is beyond the decoders.
    """
    index, shares = share
    if shares > len(architectures):
        raise ValueError(
            f"{len(architectures)} architectures cannot be divided between {shares} rows of "
            "devices; give as many or more"
        )
    task = Task(ghn.num_classes, image_size)
    plans = [make_plan(wire(arch, task)) for arch in architectures]
    costs = [cost(plan) for plan in plans]
    members = divide(costs, shares)[index]
    graphs = {i: ghn.graph(architectures[i], image_size=image_size) for i in members}
    # Of architectures that other processes run, only the number of nodes matters here.
    nodes = sum(
        len(graphs[i]) if i in graphs else count_nodes(plan.wiring) for i, plan in enumerate(plans)
    )
    local = [graphs[i] for i in members]
    return MetaBatch(
        tuple(members), tuple(plans[i] for i in members), tuple(costs[i] for i in members),
        _join(ghn, local, graph_nodes), make_chunks(ghn, local), nodes, tuple(architectures),
        position,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stream:
    """An endless stream of meta-batches; meta-batch after meta-batch a pure function of `start`.

    Attributes:
      ghn, image_size, share, graph_nodes: see `make_meta_batch`. Which architectures come, and in
        which order, does not depend on the share.
      architecture: position -> the architecture at that position of the stream.
      size: architectures in a meta-batch.
      max_nodes: meta-batches with more nodes for every 8 architectures (or part of 8) are passed
        over.
    """

    ghn: GHN
    architecture: Callable[[int], Architecture]
    size: int
    image_size: int
    share: tuple[int, int] = (0, 1)
    graph_nodes: int = 288
    max_nodes: int = MAX_BATCH_NODES

    def batches(self, start: int) -> Iterator[MetaBatch]:
        """Meta-batches from a position of the stream on."""
        position, large = start, 0
        while True:
            architectures = [self.architecture(position + i) for i in range(self.size)]
            position += self.size
            batch = make_meta_batch(
                self.ghn,
                architectures,
                image_size=self.image_size,
                share=self.share,
                graph_nodes=self.graph_nodes,
                position=position,
            )
            if batch.nodes <= self.max_nodes * -(-self.size // 8):
                large = 0
                yield batch
            elif (large := large + 1) == _LARGE:
                raise ValueError(
                    f"{large} meta-batches of {self.size} architectures in a row have more nodes "
                    f"than --max-nodes {self.max_nodes} allows, the last one {batch.nodes}; raise "
                    "it, or train on smaller or more architectures"
                )
