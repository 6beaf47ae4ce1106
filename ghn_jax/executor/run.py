"""Runs any architecture of a bucket as one compiled program (`docs/design.md`).

The forward loop walks the instruction table and writes every state to its place in one arena; the
backward loop walks it in reverse and takes the gradient of each branch from its stored inputs. No
residual of any branch is stored but one: what dense and depthwise convolutions hand to batch norm,
which takes longer to compute again than to read. Places are given out on the host, for each
architecture (`program.Places`): it takes up what it needs and no more, and no program depends
on how many states of which shape there are.

How an instruction is chosen: `lax.switch` would copy every array that a branch writes to. Instead
each kind is a `while` loop that runs once or not at all (`_when`): XLA updates a loop's arrays in
place, and on CPUs it spreads the body's operations over the cores, which it does not do inside
branches. Measured on two cores (64 images, 32x32, 32
channels; ms for one instruction, identity and 1x1 convolution): loops 0.8 and 3.6, a switch that
returns the state 1.2 and 2.6, a switch over the arrays 55 and 63.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ghn_jax.executor.branches import (
    VECTOR,
    Branch,
    Context,
    Slot,
    branch_of,
    finish,
    kernel_slots,
    stride_of,
    vector_slots,
)
from ghn_jax.executor.bucket import MAX_HIDDEN, UNIT, Bucket, Capacity, Kind
from ghn_jax.executor.program import Instructions
from ghn_jax.parameters import TileKind, tile_axis

Tiles = dict[TileKind, jax.Array]
CLASSIFIER, CLASSIFIER_BIAS = TileKind("classifier"), TileKind("classifier_bias")
KERNEL = TileKind("kernel")


def _read(array: jax.Array, index: jax.Array) -> jax.Array:
    """One row of an array."""
    # As XLA does it, from the nearest row there is: -1, which stands for none, reads row 0. NumPy's
    # meaning of negative indices would be four operations more at every use.
    return lax.dynamic_index_in_dim(array, index, 0, keepdims=False, allow_negative_indices=False)


def _write(array: jax.Array, index: jax.Array, value: jax.Array, add=None) -> jax.Array:
    """Sets one row of an array; adds to it where `add` is given and true."""
    if add is not None:
        value = jnp.where(add, _read(array, index) + value, value)
    return lax.dynamic_update_index_in_dim(array, value, index, 0, allow_negative_indices=False)


def _replace(arrays: tuple, index: int, value) -> tuple:
    return (*arrays[:index], value, *arrays[index + 1 :])


def _when(condition: jax.Array, function: Callable, carry):
    """`function(carry)` if the condition holds, else `carry`: a branch that works in place."""
    return lax.while_loop(
        lambda s: s[0], lambda s: (jnp.zeros_like(s[0]), function(s[1])), (condition, carry)
    )[1]


def _row(table: Instructions, i) -> Instructions:
    """Instruction i, every field of it a scalar or a tuple of scalars."""

    def read(array):
        if array.ndim == 1:
            return _read(array, i)
        return tuple(
            lax.dynamic_slice(array, (i, jnp.int32(j)), (1, 1), allow_negative_indices=False)[0, 0]
            for j in range(array.shape[1])
        )

    fixed = ("count", "head", "hidden", "head_scales")
    return table._replace(
        **{name: read(getattr(table, name)) for name in table._fields if name not in fixed}
    )


def _context(kind: Kind, bucket: Bucket, row: Instructions, normalise: bool, axis) -> Context:
    return Context(
        channels=bucket.planes[kind.target][1],
        stride=stride_of(kind, bucket),
        normalise=normalise,
        norm=row.norm,
        offset=row.channel,
        scale=row.scale,
        axis=axis,
    )


class _InstructionTiles(NamedTuple):
    """The tiles that one instruction reads, or their cotangents: memory that all kinds share.

    Attributes:
      kernels: those of every slot.
      vectors: those that it reads itself.
      norm: its batch norm's, from the instruction's first output channel on.
    """

    kernels: dict[Slot, jax.Array]
    vectors: tuple[jax.Array, ...]
    norm: jax.Array

    def of(self, branch: Branch) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """The kernels and the vectors that a branch takes."""
        kernels = tuple(self.kernels[slot] for slot in branch.slots)
        return kernels, self.vectors[: branch.vectors]


class _Handed(NamedTuple):
    """What the kinds of backward instructions hand over: memory that they all share.

    Attributes:
      results: of each plane, what comes before batch norm, then its cotangent.
      sources: of each plane, the cotangent of a state read.
      tiles: cotangents of the tiles that an instruction reads.
    """

    results: tuple[jax.Array, ...]
    sources: tuple[jax.Array, ...]
    tiles: _InstructionTiles


class _Program:
    """The loops over one architecture's instructions: static parts and loop-invariant arrays."""

    def __init__(self, bucket, normalise, tiles: Tiles, table: Instructions, images, axis):
        self.bucket, self.normalise, self.axis = bucket, normalise, axis
        self.tiles, self.table, self.images = tiles, table, images
        self.bins = tiles[KERNEL].shape[2]
        # Kinds by the plane they write: they share the batch norm that ends them.
        self.groups: dict[int, list[int]] = {}
        for k, kind in enumerate(bucket.kinds):
            self.groups.setdefault(kind.target, []).append(k)
        self.group_of_kind = jnp.asarray([kind.target for kind in bucket.kinds], jnp.int32)
        self.source_of_kind = jnp.asarray([kind.source for kind in bucket.kinds], jnp.int32)
        self.kernel_slots, self.vector_slots = kernel_slots(bucket), vector_slots(bucket)

    def _shape(self, plane: int) -> tuple[int, ...]:
        size, channels = self.bucket.planes[plane]
        return len(self.images), size, size, channels

    def _start(self, place: jax.Array) -> tuple[jax.Array]:
        return (place * (UNIT * len(self.images)),)

    def read(self, arena: jax.Array, plane: int, place: jax.Array) -> jax.Array:
        """The state of a plane that begins at a place of an arena: (B, size, size, channels)."""
        shape = self._shape(plane)
        start, length = self._start(place), (math.prod(shape),)
        state = lax.dynamic_slice(arena, start, length, allow_negative_indices=False)
        return state.reshape(shape)

    def write(self, arena: jax.Array, plane: int, place: jax.Array, state, add=None) -> jax.Array:
        """Sets a state; adds to what is there where `add` is given and true."""

        def copy(carry):
            arena, state = carry
            rows = state.reshape(-1)
            if add is not None:
                rows = jnp.where(add, self.read(arena, plane, place).reshape(-1) + rows, rows)
            start = self._start(place)
            return lax.dynamic_update_slice(arena, rows, start, allow_negative_indices=False), state

        # By itself, in a loop that always runs: fused with what computes the state, XLA would
        # divide the index of every number by the state's sizes (64 11x11 images, 32 channels: 0.6
        # ms, and 0.05 by itself).
        return _when(place >= 0, copy, (arena, state))[0]

    def scratch(self) -> tuple[jax.Array, ...]:
        """One state in each plane: what kinds hand over to the batch norm they share."""
        planes = range(len(self.bucket.planes))
        return tuple(jnp.zeros(self._shape(p), jnp.float32) for p in planes)

    def walk(self, run_one: Callable, carry, *, reverse: bool):
        """Runs `run_one(row, carry) -> carry` for every instruction, in order."""
        count = self.table.count

        def body(state):
            i, carry = state
            row = _row(self.table, count - 1 - i if reverse else i)
            # In a loop of its own, which always runs: what crosses a loop's boundary is computed
            # once. XLA would read each number of the row anew in every fusion that it is used in.
            return i + 1, _when(row.kind >= 0, functools.partial(run_one, row), carry)

        return lax.while_loop(lambda s: s[0] < count, body, (jnp.zeros_like(count), carry))[1]

    def start_tiles(self) -> _InstructionTiles:
        """Memory for the tiles of an instruction."""

        def zeros(kind):
            return jnp.zeros(self.tiles[kind].shape[1:], jnp.float32)

        kernels = {slot: zeros(slot[0]) for slot in self.kernel_slots}
        return _InstructionTiles(kernels, (zeros(VECTOR),) * self.vector_slots, zeros(VECTOR))

    def read_tiles(self, row: Instructions, old: _InstructionTiles) -> _InstructionTiles:
        """The tiles that an instruction reads; any others in slots where it has none.

        Read here, in one place for all kinds, and not where they are used: XLA would read a row of
        the tiles' array anew in every fusion that has to do with a tile.
        """
        kernels = {
            slot: _when(place >= 0, lambda _, slot=slot, place=place: self._tile(slot[0], place), x)
            for (slot, x), place in zip(old.kernels.items(), row.kernels, strict=True)
        }
        vectors = tuple(self._tile(VECTOR, place) for place in row.vectors)
        norm = jnp.roll(self._tile(VECTOR, row.norm_vector), -row.channel, axis=1)
        return _InstructionTiles(kernels, vectors, norm)

    def _tile(self, kind: TileKind, place: jax.Array) -> jax.Array:
        return _read(self.tiles[kind], place)

    def convolve(self, kind: Kind, row: Instructions, values, tiles) -> jax.Array:
        """What an instruction computes, up to batch norm."""
        branch = branch_of(kind, self.bucket)
        context = _context(kind, self.bucket, row, self.normalise, self.axis)
        kernels, vectors = tiles.of(branch)
        if branch.part is None:
            source = (
                self.images if kind.source < 0 else self.read(values, kind.source, row.sources[0])
            )
            return branch.apply(source, kernels, vectors, context)
        sources, offsets = jnp.stack(row.sources), jnp.stack(row.offsets)

        def add(j, z):
            x = self.read(values, kind.source, _read(sources, j))
            return z + branch.part(x, kernels, _read(offsets, j), context)

        return lax.fori_loop(0, row.parts, add, jnp.zeros(self._shape(kind.target), values.dtype))

    def _keeps(self, kinds: Sequence[int]) -> bool:
        return any(branch_of(self.bucket.kinds[k], self.bucket).keep for k in kinds)

    def _finish(self, plane: int, row: Instructions, z, vector):
        context = _context(Kind("", plane, plane), self.bucket, row, self.normalise, self.axis)
        return finish(z, vector, context)

    # --- forward ---

    def forward_instruction(self, row: Instructions, carry):
        """Runs one instruction forward."""
        carry, tiles = carry
        tiles = self.read_tiles(row, tiles)
        group = _read(self.group_of_kind, row.kind)
        for plane, kinds in self.groups.items():
            run = functools.partial(self._forward_group, plane, kinds, row, tiles)
            carry = _when(group == plane, run, carry)
        return carry, tiles

    def _forward_group(self, plane: int, kinds: Sequence[int], row: Instructions, tiles, carry):
        """Runs one forward instruction that writes to this plane."""
        if plane < 0:
            return self._forward_bins(kinds, row, carry)
        values, features, scratch = carry
        z = scratch[plane]
        for k in kinds:
            kind = self.bucket.kinds[k]
            z = _when(
                row.kind == k, lambda _, kind=kind: self.convolve(kind, row, values, tiles), z
            )
        y = self._finish(plane, row, z, tiles.norm)
        values = self.write(values, plane, row.target, y, row.accumulate)
        if self._keeps(kinds):
            values = _when(row.keep, lambda v: self.write(v, plane, row.kept, z), values)
        return values, features, _replace(scratch, plane, z)

    def _forward_bins(self, kinds, row, carry):
        values, features, scratch = carry
        for k in kinds:
            kind = self.bucket.kinds[k]
            bins = branch_of(kind, self.bucket).bins

            def add(features, kind=kind, bins=bins):
                x = self.read(values, kind.source, row.sources[0])
                return features + bins(x, row.offsets[0], self.bins)

            features = _when(row.kind == k, add, features)
        return values, features, scratch

    # --- backward ---

    def start_backward(self) -> _Handed:
        """Memory for what backward instructions hand over."""
        return _Handed(self.scratch(), self.scratch(), self.start_tiles())

    def backward_instruction(self, values, dfeatures, row: Instructions, carry):
        """Takes one instruction's gradient: cotangents of its sources and of its tiles.

        Every kind hands them over, and they are written in one place for all kinds: XLA keeps, for
        each loop that an array goes through, a list of all that may have written it.
        """
        gradients, dtiles, handed, tiles = carry
        tiles = self.read_tiles(row, tiles)
        group = _read(self.group_of_kind, row.kind)
        source_plane = _read(self.source_of_kind, row.kind)
        for plane, kinds in self.groups.items():
            if plane >= 0:
                run = functools.partial(
                    self._through_norm, plane, kinds, row, values, gradients, tiles
                )
                z, dvector = _when(group == plane, run, (handed.results[plane], handed.tiles.norm))
                results = _replace(handed.results, plane, z)
                handed = handed._replace(results=results, tiles=handed.tiles._replace(norm=dvector))
        fields = (row.sources, row.offsets, row.source_gradients, row.source_accumulate)
        columns = [jnp.stack(field) for field in fields]

        def one_part(j, carry):
            gradients, handed = carry
            source, offset, place, add = (_read(column, j) for column in columns)
            for plane, kinds in self.groups.items():
                g = dfeatures if plane < 0 else handed.results[plane]

                def run_group(handed, kinds=kinds, g=g):
                    for k in kinds:
                        kind = self.bucket.kinds[k]
                        run = functools.partial(
                            self._backward, kind, row, j, values, source, offset, g, tiles
                        )
                        handed = _when(row.kind == k, run, handed)
                    return handed

                handed = _when(group == plane, run_group, handed)
            for plane, dx in enumerate(handed.sources):
                save = functools.partial(self.write, plane=plane, place=place, state=dx, add=add)
                gradients = _when(source_plane == plane, save, gradients)
            return gradients, handed

        gradients, handed = lax.fori_loop(0, row.parts, one_part, (gradients, handed))
        return gradients, self._save_tiles(row, dtiles, handed.tiles), handed, tiles

    def _through_norm(self, plane: int, kinds, row: Instructions, values, gradients, tiles, handed):
        """From the cotangent of a state of this plane to that before batch norm, and its tile's."""
        z, _ = handed
        for k in kinds:
            kind = self.bucket.kinds[k]
            branch = branch_of(kind, self.bucket)
            if branch.norm and not branch.keep:
                again = (row.kind == k) & row.norm
                z = _when(again, lambda _, kind=kind: self.convolve(kind, row, values, tiles), z)
        if self._keeps(kinds):
            z = _when(row.keep, lambda _: self.read(values, plane, row.kept), z)
        g = self.read(gradients, plane, row.gradient)
        _, vjp = jax.vjp(lambda z, v: self._finish(plane, row, z, v), z, tiles.norm)
        return vjp(g)

    def _backward(self, kind, row, j, values, source, offset, g, tiles, handed) -> _Handed:
        """The cotangents of an instruction's part j: its source's, and its tiles'."""
        branch = branch_of(kind, self.bucket)
        context = _context(kind, self.bucket, row, self.normalise, self.axis)
        kernels, vectors = tiles.of(branch)

        def compute(x, kernels, vectors):
            if branch.bins is not None:
                return branch.bins(x, offset, self.bins)
            if branch.part is not None:
                return branch.part(x, kernels, offset, context)
            return branch.apply(x, kernels, vectors, context)

        x = self.images if kind.source < 0 else self.read(values, kind.source, source)
        _, vjp = jax.vjp(compute, x, kernels, vectors)
        dx, dkernels, dvectors = vjp(g)
        if kind.source >= 0:
            handed = handed._replace(sources=_replace(handed.sources, kind.source, dx))
        new = dict(zip(branch.slots, dkernels, strict=True))
        if branch.part is not None:  # its parts share the tile
            old = handed.tiles.kernels
            new = {slot: jnp.where(j > 0, old[slot] + x, x) for slot, x in new.items()}
        dtiles = handed.tiles._replace(
            kernels={**handed.tiles.kernels, **new},
            vectors=(*dvectors, *handed.tiles.vectors[len(dvectors) :]),
        )
        return handed._replace(tiles=dtiles)

    def _save_tiles(self, row: Instructions, dtiles: Tiles, handed: _InstructionTiles) -> Tiles:
        """Writes the cotangents of an instruction's tiles; only a stem's parts share any."""

        def save(tile, condition, place, value):
            def write(array):
                return _write(array, place, value, row.tile_accumulate)

            dtiles[tile] = _when(condition, write, dtiles[tile])

        dtiles = dict(dtiles)
        for ((tile, _), dkernel), place in zip(handed.kernels.items(), row.kernels, strict=True):
            save(tile, place >= 0, place, dkernel)
        for dvector, place in zip(handed.vectors, row.vectors, strict=True):
            save(VECTOR, place >= 0, place, dvector)
        save(VECTOR, row.norm, row.norm_vector, jnp.roll(handed.norm, row.channel, axis=1))
        return dtiles


class Arenas(NamedTuple):
    """Memory for the states of an architecture and for their cotangents.

    What was there before does not matter, so that the next architecture gets the same.

    Attributes:
      values, gradients: (length * UNIT * B,), lengths as in `Capacity`.
    """

    values: jax.Array
    gradients: jax.Array

    @classmethod
    def shapes(cls, capacity: Capacity, images: int) -> Arenas:
        """Their shapes for a number of images.

        Raises:
          ValueError: they would have more numbers than 32-bit indices reach.
        """
        lengths = [n * UNIT * images for n in (capacity.values, capacity.gradients)]
        if max(lengths) > np.iinfo(np.int32).max:
            raise ValueError(
                f"the states of a network and {images} images are {max(lengths):,} numbers, more "
                "than 2^31; give each device fewer images"
            )
        return cls(*(jax.ShapeDtypeStruct((n,), jnp.float32) for n in lengths))

    @classmethod
    def zeros(cls, capacity: Capacity, images: int) -> Arenas:
        """New ones."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cls.shapes(capacity, images))


def forward(bucket, normalise, tiles: Tiles, table: Instructions, images, values, axis=None):
    """Runs an architecture up to its classifier.

    Args:
      bucket, normalise: static.
      tiles: decoded tiles by kind.
      table: the architecture.
      images: (B, H, W, 3).
      values: the arena that its states are written to.
      axis: of a mesh, if `images` are this device's part of the batch that batch norm sees.

    Returns:
      (values, features): the arena, and (B, bins) the head's binned input.
    """
    program = _Program(bucket, normalise, tiles, table, images, axis)
    features = jnp.zeros((len(images), program.bins), jnp.float32)
    carry = (values, features, program.scratch()), program.start_tiles()
    return program.walk(program.forward_instruction, carry, reverse=False)[0][:2]


def backward(
    bucket,
    normalise,
    tiles: Tiles,
    table: Instructions,
    images,
    arenas,
    dfeatures,
    dtiles,
    axis=None,
):
    """Writes the cotangents of the tiles that an architecture reads into `dtiles`.

    With the name of a mesh axis, those of this device's images: their sum along it is the whole.

    Returns:
      (gradients, dtiles): the arena of cotangents, and those of tiles.
    """
    program = _Program(bucket, normalise, tiles, table, images, axis)
    carry = arenas.gradients, dtiles, program.start_backward(), program.start_tiles()
    run_one = functools.partial(program.backward_instruction, arenas.values, dfeatures)
    return program.walk(run_one, carry, reverse=True)[:2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def features(bucket, capacity, normalise, tiles: Tiles, table: Instructions, images) -> jax.Array:
    """(B, bins) the head's binned input, differentiable with respect to the tiles."""
    return _features_forward(bucket, capacity, normalise, tiles, table, images)[0]


def _features_forward(bucket, capacity, normalise, tiles, table, images):
    arenas = Arenas.zeros(capacity, len(images))
    values, out = forward(bucket, normalise, tiles, table, images, arenas.values)
    return out, (tiles, table, images, arenas._replace(values=values))


def _features_backward(bucket, capacity, normalise, residuals, g):
    tiles, table, images, arenas = residuals
    dtiles = jax.tree.map(jnp.zeros_like, tiles)
    _, dtiles = backward(bucket, normalise, tiles, table, images, arenas, g, dtiles)
    return dtiles, None, None


features.defvjp(_features_forward, _features_backward)


def head_tiles(tiles: Tiles, table: Instructions) -> dict[str, jax.Array]:
    """The tiles of the classifier and of the hidden layer before it."""
    return {
        "classifier": _read(tiles[CLASSIFIER], table.head[0]),
        "classifier_bias": _read(tiles[CLASSIFIER_BIAS], table.head[1]),
        "hidden": _read(tiles[KERNEL], table.head[2])[0],
        "hidden_bias": _read(tiles[VECTOR], table.head[3])[1],
    }


def save_head_tiles(dtiles: Tiles, table: Instructions, gradients: dict[str, jax.Array]) -> Tiles:
    """Writes the cotangents of `head_tiles` into `dtiles`."""
    bias = jnp.zeros(dtiles[VECTOR].shape[1:]).at[1].set(gradients["hidden_bias"])
    used = table.hidden > 0  # without a hidden layer its row belongs to another node
    old = _read(dtiles[KERNEL], table.head[2])
    return {
        **dtiles,
        CLASSIFIER: _write(dtiles[CLASSIFIER], table.head[0], gradients["classifier"]),
        CLASSIFIER_BIAS: _write(
            dtiles[CLASSIFIER_BIAS], table.head[1], gradients["classifier_bias"]
        ),
        KERNEL: _write(
            dtiles[KERNEL], table.head[2], jnp.where(used, gradients["hidden"][None], old)
        ),
        VECTOR: _write(dtiles[VECTOR], table.head[3], bias),
    }


def head(weights: dict[str, jax.Array], table: Instructions, x, dropout=None):
    """The classifier: (B, bins) binned features -> (B, classes) logits.

    Args:
      weights: from `head_tiles`.
      dropout: (B, MAX_HIDDEN) factors of the hidden layer, 0 or 2; None for no dropout.
    """
    bins = x.shape[1]
    bias = tile_axis(weights["hidden_bias"], 0, MAX_HIDDEN, jnp)
    hidden = tile_axis(weights["hidden"], 1, MAX_HIDDEN, jnp) * table.head_scales[1]
    y = nn.relu(x @ hidden + bias)
    if dropout is not None:
        y = y * dropout
    y = jnp.where(jnp.arange(MAX_HIDDEN) < table.hidden, y, 0.0)
    y = y.reshape(len(x), -1, bins).sum(1)  # the classifier's weight repeats along its inputs
    x = jnp.where(table.hidden > 0, y, x)
    return x @ (weights["classifier"] * table.head_scales[0]) + weights["classifier_bias"]


def execute(bucket, capacity, normalise, tiles: Tiles, table: Instructions, images, dropout=None):
    """Runs one architecture: (B, H, W, 3) images -> (B, classes) logits.

    A pure function of arrays, differentiable with respect to `tiles`; it may be vmapped over
    architectures of one bucket and sharded over devices.

    Args:
      bucket, capacity, normalise: static.
      tiles: decoded tiles by kind, from `tiles.decode_tiles`.
      table: the architecture, from `program.compile_instructions`.
      images: normalised images.
      dropout: see `head`.
    """
    x = features(bucket, capacity, normalise, tiles, table, images)
    return head(head_tiles(tiles, table), table, x, dropout)
