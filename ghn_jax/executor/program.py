"""From an architecture to the executor's instruction table, on the host, in NumPy."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ghn_jax.executor.branches import branch_of, kernel_slots, vector_slots
from ghn_jax.executor.bucket import UNITS, Bucket, Capacity, Kind
from ghn_jax.graph import Graph, next_power_of_two
from ghn_jax.nodes import head_nodes, operation_nodes
from ghn_jax.parameters import TileKind, tile_kind
from ghn_jax.wiring import Operation, Wiring


class Instructions(NamedTuple):
    """An architecture as data (arrays of one architecture; n instructions, P parts).

    Attributes:
      count: () number of instructions.
      kind: (n,) index into `Bucket.kinds`.
      parts: (n,) number of states read.
      sources: (n, P) places of the states read; see `Places`.
      offsets: (n, P) the first channel of each part in the concatenation.
      target: (n,) place of the state written.
      accumulate: (n,) whether it is added to what is there.
      gradient: (n,) place of the target's cotangent.
      source_gradients: (n, P) places of the sources' cotangents.
      source_accumulate: (n, P) whether they are added to.
      kernels: (n, K) rows of the tiles' arrays, a column for each of `kernel_slots`; -1 for none.
      vectors: (n, V) the same of vector tiles, as many as `vector_slots`.
      norm: (n,) whether batch norm follows.
      norm_vector: (n,) row of its vector tile.
      keep: (n,) whether what comes before batch norm is kept for the backward loop.
      kept: (n,) its place.
      tile_accumulate: (n,) whether the tiles' cotangents are added to.
      channel: (n,) first output channel of a stem instruction.
      scale: (n,) weight scale of instructions with several parts.
      head: (4,) rows of the classifier's tiles: classifier weight and bias, hidden layer's weight
        and bias.
      hidden: () width of the hidden fully connected layer, 0 without one.
      head_scales: (2,) weight scales of the classifier and of the hidden layer.
    """

    count: np.ndarray
    kind: np.ndarray
    parts: np.ndarray
    sources: np.ndarray
    offsets: np.ndarray
    target: np.ndarray
    accumulate: np.ndarray
    gradient: np.ndarray
    source_gradients: np.ndarray
    source_accumulate: np.ndarray
    kernels: np.ndarray
    vectors: np.ndarray
    norm: np.ndarray
    norm_vector: np.ndarray
    keep: np.ndarray
    kept: np.ndarray
    tile_accumulate: np.ndarray
    channel: np.ndarray
    scale: np.ndarray
    head: np.ndarray
    hidden: np.ndarray
    head_scales: np.ndarray


class TileRows(NamedTuple):
    """Which node each row of the decoded tile arrays belongs to.

    Attributes:
      nodes: kind -> (rows,) int32 node of the padded batch. The last row of each is spare: it
        takes what belongs to no node.
      counts: kind -> () int32 number of rows in use.
    """

    nodes: dict[TileKind, np.ndarray]
    counts: dict[TileKind, np.ndarray]


def _empty(bucket: Bucket, capacity: Capacity) -> Instructions:
    n, p = capacity.instructions, capacity.parts
    integers, flags = np.int32, np.bool_
    return Instructions(
        count=np.zeros((), integers),
        kind=np.zeros(n, integers),
        parts=np.zeros(n, integers),
        sources=np.zeros((n, p), integers),
        offsets=np.zeros((n, p), integers),
        target=np.zeros(n, integers),
        accumulate=np.zeros(n, flags),
        gradient=np.zeros(n, integers),
        source_gradients=np.zeros((n, p), integers),
        source_accumulate=np.zeros((n, p), flags),
        kernels=np.full((n, len(kernel_slots(bucket))), -1, integers),
        vectors=np.full((n, vector_slots(bucket)), -1, integers),
        norm=np.zeros(n, flags),
        norm_vector=np.zeros(n, integers),
        keep=np.zeros(n, flags),
        kept=np.zeros(n, integers),
        tile_accumulate=np.zeros(n, flags),
        channel=np.zeros(n, integers),
        scale=np.ones(n, np.float32),
        head=np.zeros(4, integers),
        hidden=np.zeros((), integers),
        head_scales=np.ones(2, np.float32),
    )


class Step(NamedTuple):
    """One instruction before places are given out: states, node names and constants."""

    kind: Kind
    sources: tuple[tuple[int, int], ...]  # (state, first channel)
    target: int | None
    kernels: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()
    channel: int = 0
    fan_in: int = 0


class _Lister:
    """Lists an architecture's instructions over its states (and extra ones for `sep_conv`)."""

    def __init__(self, wiring: Wiring, bucket: Bucket):
        self.wiring, self.bucket = wiring, bucket
        self.planes = [None] + [bucket.plane(s.size, s.channels) for s in wiring.states[1:]]
        self.steps: list[Step] = []

    def _kind(self, name: str, source: int | None, target: int | None) -> Kind:
        at = [-1 if s in (None, 0) else self.planes[s] for s in (source, target)]
        return Kind(name, *at)

    def add(self, name, sources, target, kernels=(), vectors=(), channel=0, fan_in=0) -> None:
        kind = self._kind(name, sources[0][0], target)
        self.steps.append(
            Step(kind, tuple(sources), target, tuple(kernels), tuple(vectors), channel, fan_in)
        )

    def operation(self, op: Operation) -> None:
        nodes = operation_nodes(op, self.wiring)
        kernels = [n.name for n in nodes if n.name and n.primitive not in ("bn", "ln", "bias")]
        vectors = [n.name for n in nodes if n.primitive in ("bn", "ln", "bias")]
        if op.kind == "stem_pool":
            for source, target in zip(op.inputs, op.output, strict=True):
                self.add("max_pool", [(source, 0)], target)
        elif op.kind in ("stem_conv", "stem_imagenet", "stem_vit"):
            name = {
                "stem_conv": f"stem_{op.kernel}",
                "stem_imagenet": f"stem_double_{op.kernel}",
                "stem_vit": "stem_vit",
            }[op.kind]
            c = self.wiring.arch.C
            for part, target in enumerate(op.output):
                self.add(name, [(0, 0)], target, kernels, vectors, channel=part * c)
        elif op.kind in ("preprocess", "factorized_reduce"):
            part = op.in_channels // len(op.inputs)
            sources = [(s, i * part) for i, s in enumerate(op.inputs) if s is not None]
            self.add(UNITS[op.kind], sources, op.output[0], kernels, vectors, fan_in=op.in_channels)
        elif op.kind.startswith("sep_conv"):
            middle = len(self.planes)
            self.planes.append(self.planes[op.output[0]])
            half = len(vectors) // 2
            unit = UNITS[op.kind]
            self.add(unit, [(op.inputs[0], 0)], middle, kernels[:2], vectors[:half])
            self.add(unit, [(middle, 0)], op.output[0], kernels[2:], vectors[half:])
        else:
            self.add(UNITS[op.kind], [(op.inputs[0], 0)], op.output[0], kernels, vectors)

    def head(self) -> None:
        head = self.wiring.head
        name = "average" if head.glob_avg else "flatten"
        part = next(self.wiring.states[s].channels for s in head.feature if s is not None)
        for i, state in enumerate(head.feature):
            if state is not None:
                self.add(name, [(state, i * part)], None)


def _list_steps(wiring: Wiring, bucket: Bucket) -> tuple[list[Step], list[int | None]]:
    """The instructions of an architecture over its states, and the plane of each state."""
    lister = _Lister(wiring, bucket)
    for op in wiring.operations:
        lister.operation(op)
    lister.head()
    return lister.steps, lister.planes


class Places(NamedTuple):
    """Where states begin, in units of `UNIT` numbers for each image, and the length of both arenas.

    Attributes:
      value: state -> its place in the arena of states.
      kept: instruction -> the place there of what comes before its batch norm.
      gradient: state -> the place of its cotangent in the other arena.
      values, gradients: lengths of the arenas.
    """

    value: dict[int, int]
    kept: dict[int, int]
    gradient: dict[int, int]
    values: int
    gradients: int


class _Room:
    """Gives out stretches of an arena and takes them back: the first gap that is long enough."""

    def __init__(self):
        self.taken: list[tuple[int, int]] = []  # (start, end), sorted
        self.length = 0

    def take(self, length: int) -> int:
        start = 0
        for taken, end in self.taken:
            if taken - start >= length:
                break
            start = end
        bisect.insort(self.taken, (start, start + length))
        self.length = max(self.length, start + length)
        return start

    def give_back(self, start: int, length: int) -> None:
        self.taken.remove((start, start + length))


def _give_places(
    steps: Sequence[Step], planes: Sequence[int | None], bucket: Bucket, norm: bool
) -> Places:
    """Gives every state a place in the arena of states and its cotangent one in the other.

    States are all kept for the backward loop. A cotangent lives from its state's last reader to its
    first writer, so that far less room is needed: it is reused.
    """
    value: dict[int, int] = {}
    kept: dict[int, int] = {}
    first_writer: dict[int, int] = {}
    length = 0
    for i, step in enumerate(steps):
        if step.target is None:
            continue
        units = bucket.units(planes[step.target])
        if step.target not in value:
            value[step.target], first_writer[step.target] = length, i
            length += units
        if norm and branch_of(step.kind, bucket).keep:
            kept[i] = length
            length += units
    gradient: dict[int, int] = {}
    room = _Room()
    for i in reversed(range(len(steps))):
        step = steps[i]
        for state, _ in step.sources:
            if state != 0 and state not in gradient:
                gradient[state] = room.take(bucket.units(planes[state]))
        if step.target is not None and first_writer[step.target] == i:
            room.give_back(gradient[step.target], bucket.units(planes[step.target]))
    return Places(value, kept, gradient, length, room.length)


class Plan(NamedTuple):
    """An architecture for the executor, but for its tiles.

    Attributes:
      wiring: the architecture's operations.
      bucket: its bucket.
      steps: its instructions.
      planes: of each state, the plane; None for the images.
      places: of each state.
    """

    wiring: Wiring
    bucket: Bucket
    steps: list[Step]
    planes: list[int | None]
    places: Places

    @property
    def needed(self) -> Capacity:
        """The least capacity that runs it."""
        parts = max(len(step.sources) for step in self.steps)
        return Capacity(self.places.values, self.places.gradients, len(self.steps), parts)


def make_plan(wiring: Wiring) -> Plan:
    """Lists an architecture's instructions and gives its states places.

    Raises:
      ValueError: the executor cannot run it; see `Bucket.of`.
    """
    bucket = Bucket.of(wiring)
    steps, planes = _list_steps(wiring, bucket)
    return Plan(wiring, bucket, steps, planes, _give_places(steps, planes, bucket, wiring.norm))


def fits(needed: Capacity, given: Capacity) -> bool:
    """Whether a capacity has room for what an architecture needs."""
    pairs = zip(dataclasses.astuple(needed), dataclasses.astuple(given), strict=True)
    return all(need <= have for need, have in pairs)


def compile_instructions(
    plan: Plan,
    capacity: Capacity,
    rows: Mapping[str, int],
    spare: int,
    normalise: bool = True,
) -> Instructions:
    """Makes the instruction table of an architecture.

    Args:
      plan: the architecture.
      capacity: static sizes of the program that will run it.
      rows: official parameter name -> row of its tile array; see `tile_rows`.
      spare: a row of the vector tiles that takes what belongs to no node.
      normalise: whether weights are scaled (Table 2).

    Raises:
      ValueError: the architecture does not fit the bucket or the capacity.
    """
    wiring, bucket, steps, _, places = plan
    if not fits(plan.needed, capacity):
        raise ValueError(
            f"the architecture needs {plan.needed}, more than the executor's {capacity}; raise the "
            "capacity"
        )
    index = {kind: i for i, kind in enumerate(bucket.kinds)}
    columns = {slot: i for i, slot in enumerate(kernel_slots(bucket))}
    table = _empty(bucket, capacity)
    table.count[...] = len(steps)
    written: set[int] = set()
    for i, step in enumerate(steps):
        if step.kind not in index:
            raise ValueError(f"no instruction for {step.kind} in {bucket}; use build_network")
        table.kind[i] = index[step.kind]
        table.parts[i] = len(step.sources)
        for j, (state, channel) in enumerate(step.sources):
            table.sources[i, j] = places.value.get(state, 0)
            table.offsets[i, j] = channel
            table.source_gradients[i, j] = places.gradient.get(state, 0)
        if step.target is not None:
            table.target[i] = places.value[step.target]
            table.gradient[i] = places.gradient[step.target]
            table.accumulate[i] = step.target in written
            written.add(step.target)
        branch = branch_of(step.kind, bucket)
        for slot, name in zip(branch.slots, step.kernels, strict=True):
            table.kernels[i, columns[slot]] = rows[name]
        vectors = [rows[name] for name in step.vectors] or [spare] * (branch.vectors + 1)
        table.norm[i] = branch.norm and wiring.norm
        table.keep[i] = i in places.kept
        table.kept[i] = places.kept.get(i, 0)
        table.vectors[i, : branch.vectors] = vectors[: branch.vectors]
        table.norm_vector[i] = vectors[-1]
        table.channel[i] = step.channel
        if normalise and step.fan_in:
            table.scale[i] = math.sqrt(2 / step.fan_in)
    _mark_accumulation(steps, table)
    _fill_head(wiring, table, rows, spare, normalise)
    return table


def _mark_accumulation(steps: Sequence[Step], table: Instructions) -> None:
    """Marks cotangents that the backward loop adds to because something wrote them before."""
    states: set[int] = set()
    tiles: set[str] = set()
    for i in reversed(range(len(steps))):
        for j, (state, _) in enumerate(steps[i].sources):
            table.source_accumulate[i, j] = state in states
            states.add(state)
        table.tile_accumulate[i] = bool(tiles.intersection(steps[i].kernels))
        tiles.update(steps[i].kernels)


def _fill_head(wiring, table: Instructions, rows, spare: int, normalise: bool) -> None:
    head = wiring.head
    names = [n.name for n in head_nodes(head) if n.name]
    weight, bias = names[-2:]
    hidden = len(head.dims) > 2
    table.head[:] = [rows[weight], rows[bias], rows[names[0]] if hidden else 0,
                     rows[names[1]] if hidden else spare]  # fmt: skip
    table.hidden[...] = head.dims[1] if hidden else 0
    if normalise:
        table.head_scales[:] = [math.sqrt(2 / head.dims[-2]), math.sqrt(2 / head.dims[0])]


def kinds_of(bucket: Bucket) -> list[TileKind]:
    """The kinds of tiles that a bucket's instructions read, sorted."""
    kinds = {TileKind("vector"), TileKind("kernel"), TileKind("classifier")}
    kinds |= {TileKind("classifier_bias")}
    return sorted(kinds.union(tile for tile, _ in kernel_slots(bucket)))


def tile_rows(
    graphs: Sequence[Graph], capacity: Mapping[TileKind, int]
) -> tuple[TileRows, list[dict[str, int]]]:
    """Lists the nodes of a batch of graphs by the kind of tile they need.

    Args:
      graphs: the graphs, in the order of the padded batch.
      capacity: rows of each kind's array, one of them spare; doubled where it does not suffice.

    Returns:
      The rows, and for each graph official parameter name -> row.
    """
    lists: dict[TileKind, list[int]] = {kind: [] for kind in capacity}
    names = []
    offset = 0
    for graph in graphs:
        row_of: dict[str, int] = {}
        for node in range(len(graph)):
            kind = tile_kind(graph, node)
            if kind is None:
                continue
            nodes = lists.setdefault(kind, [])
            row_of[graph.names[node]] = len(nodes)
            nodes.append(offset + node)
        names.append(row_of)
        offset += len(graph)
    nodes, counts = {}, {}
    for kind, used in lists.items():
        size = capacity.get(kind, 0)
        if len(used) >= size:
            size = next_power_of_two(len(used) + 1)
        nodes[kind] = np.zeros(size, np.int32)
        nodes[kind][: len(used)] = used
        counts[kind] = np.asarray(len(used), np.int32)
    return TileRows(nodes, counts), names
