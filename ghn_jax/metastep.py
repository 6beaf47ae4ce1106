"""One update of the hypernetwork on a meta-batch (paper Eq. 2, § 4.3), on a mesh of devices.

The architectures of a meta-batch are divided between groups, one or more for each row of the mesh.
A group does everything for its own: it encodes their graphs, decodes their tiles, runs them one
after another, each as data to its bucket's program, and takes the tiles' cotangents back through
decoders and encoder. Groups run from threads of their own: rows run different programs at the same
time, and XLA's loops of a length that is data keep the thread that started them busy on GPUs.

Images are divided between the devices of a row. What they exchange is the statistics of batch norm,
nothing else: cotangents of tiles, and what they become in decoders and encoder, are linear in the
images' shares of the loss, so every device takes its images' share back to the parameters by
itself. One all-reduce over the whole mesh then adds up one vector of each device: loss, accuracy
and the gradient of all parameters.
"""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ghn_jax.compilation import crowded, executor_options
from ghn_jax.executor import run
from ghn_jax.executor.bucket import MAX_HIDDEN, Bucket, Capacity
from ghn_jax.executor.program import Instructions
from ghn_jax.executor.run import Arenas, Tiles
from ghn_jax.executor.tiles import decode_tiles
from ghn_jax.ghn import GHN
from ghn_jax.mesh import ARCH, DATA, Row, local_rows, make_mesh
from ghn_jax.metabatch import Group, MetaBatch
from ghn_jax.row_programs import RowFunction, RowPrograms


class TrainState(NamedTuple):
    """What training changes: parameters, optimizer state, () int32 number of updates."""

    params: Any
    opt_state: Any
    step: jax.Array


class Metrics(NamedTuple):
    """Of one update: scalars, means over its architectures.

    Attributes:
      loss: cross-entropy.
      top1: fraction of images classified right.
      grad_norm: global norm of the gradient before clipping.
      applied: whether all numbers were finite; otherwise the update was passed over.
    """

    loss: jax.Array
    top1: jax.Array
    grad_norm: jax.Array
    applied: jax.Array


def _loss(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def _dropout(key: jax.Array, images: int, axis: str | None) -> jax.Array:
    """(images, MAX_HIDDEN) factors 0 or 2 for this device's images, of one draw for all images."""
    here, parts = (0, 1) if axis is None else (lax.axis_index(axis), lax.axis_size(axis))
    keep = jax.random.bernoulli(key, 0.5, (images * parts, MAX_HIDDEN))
    return 2.0 * lax.dynamic_slice_in_dim(keep, here * images, images).astype(jnp.float32)


def _run_one(
    bucket: Bucket,
    normalise: bool,
    smoothing: float,
    axis: str | None,
    tiles: Tiles,
    dtiles: Tiles,
    arenas: Arenas,
    totals: jax.Array,
    table: Instructions,
    images: jax.Array,
    labels: jax.Array,
    seed: jax.Array,
    step: jax.Array,
    member: jax.Array,
    weight: jax.Array,
):
    """Runs one architecture on this device's images.

    Adds its loss and accuracy, times `weight`, to the (2,) `totals`, and writes its cotangents of
    tiles; the arenas are memory to work in. Random numbers depend on the update and on the
    architecture's place in the meta-batch.
    """
    values, features = run.forward(bucket, normalise, tiles, table, images, arenas.values, axis)
    arenas = arenas._replace(values=values)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), member)
    dropout = _dropout(key, len(images), axis)

    def head_loss(features, weights):
        logits = run.head(weights, table, features, dropout)
        return _loss(logits, labels, smoothing), logits

    loss, vjp, logits = jax.vjp(head_loss, features, run.head_tiles(tiles, table), has_aux=True)
    dfeatures, dhead = vjp(weight)
    top1 = (logits.argmax(-1) == labels).mean()
    gradients, dtiles = run.backward(
        bucket, normalise, tiles, table, images, arenas, dfeatures, dtiles, axis
    )
    totals += weight * jnp.stack([loss, top1])
    dtiles = run.save_head_tiles(dtiles, table, dhead)
    return dtiles, arenas._replace(gradients=gradients), totals


def _predict(ghn: GHN, params, graph, rows) -> Tiles:
    """The tiles of a group's architectures."""
    variables = {"params": params}
    return decode_tiles(ghn, variables, ghn.apply(variables, graph), rows)


def _predict_backward(ghn: GHN, params, graph, rows, dtiles, totals):
    """The (2 + P,) vector that is added up over all devices: `totals`, then the gradient."""
    _, vjp = jax.vjp(lambda p: _predict(ghn, p, graph, rows), params)
    return jnp.concatenate([totals, ravel_pytree(*vjp(dtiles))[0]])


class MetaStep:
    """Updates a hypernetwork on meta-batches; holds its compiled programs and their workspace.

    Args:
      ghn: the hypernetwork.
      optimizer: an optax transformation; see `train/` for the paper's.
      mesh: the devices, from `mesh.make_mesh`; JAX's first device if not given. Every process calls
        the step with the same arguments, but for the groups of its own rows.
      smoothing: label smoothing.
      seed: of the dropout in networks with two fully connected layers.
    """

    def __init__(
        self,
        ghn: GHN,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        smoothing: float = 0.0,
        seed: int = 0,
    ):
        self.ghn, self.optimizer, self.smoothing = ghn, optimizer, smoothing
        self.mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
        self.rows = local_rows(self.mesh)
        self.replicated = NamedSharding(self.mesh, P())
        self.seed = np.uint32(seed)
        self._memory: dict[int, tuple[Tiles, Arenas]] = {}
        self._programs, self._programs_seen = RowPrograms(), 0
        same, part = P(), P(DATA)
        self._predict = RowFunction(_predict, (same, same, same), same)
        self._run = RowFunction(
            _run_one,
            (same, part, part, part, same, part, part, same, same, same, same),
            (part, part, part),
            donate=(1, 2),
            options=executor_options(),
        )
        backward = (same, same, same, part, part)
        self._predict_backward = RowFunction(_predict_backward, backward, part)
        self._init = jax.jit(self._make_state, out_shardings=self.replicated)
        self._apply = jax.jit(self._apply_gradient, donate_argnums=0, out_shardings=self.replicated)

    def init(self, seed: int) -> TrainState:
        """The state before the first update, a pure function of the seed; on every device."""
        return self._init(seed)

    def _make_state(self, seed) -> TrainState:
        params = self.ghn.init_variables(seed)["params"]
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def _apply_gradient(self, state: TrainState, vectors: list[jax.Array]):
        """Adds up (devices * (2 + P),) vectors, in which every device has its own, and updates."""
        devices = self.mesh.size
        total = sum(vectors).reshape(devices, -1).sum(0)
        loss, top1 = total[:2]
        grads = ravel_pytree(state.params)[1](total[2:])
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Architectures whose loss is not finite are passed over: nothing of them is kept.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        return TrainState(params, opt_state, state.step + 1), Metrics(loss, top1, norm, finite)

    def _on_row(self, row: Row, tree):
        """A replicated tree's copies on a row's devices, which are not copied again."""

        def view(leaf):
            copies = {shard.device: shard.data for shard in leaf.addressable_shards}
            return jax.make_array_from_single_device_arrays(
                leaf.shape, row.sharding(P()), [copies[d] for d in row.devices]
            )

        return jax.tree.map(view, tree)

    def _memory_for(self, index: int, row: Row, tiles: Tiles, capacity: Capacity, images: int):
        """What a group writes to: cotangents of its tiles, and arenas for so many images.

        It is what the group wrote to before, where that has the size that is needed. Nothing is
        read there before it is written.
        """

        def needed(x):
            return jax.ShapeDtypeStruct((row.mesh.size * x.shape[0], *x.shape[1:]), np.float32)

        def zeros(x):  # copied there: a program that makes them would be one more to compile
            return jax.device_put(np.zeros(x.shape, x.dtype), row.sharding(P(DATA)))

        new = jax.tree.map(needed, (tiles, Arenas.shapes(capacity, images)))
        old = self._memory.pop(index, (None, None))
        return tuple(
            o
            if jax.tree.map(jnp.shape, o) == jax.tree.map(jnp.shape, n)
            else jax.tree.map(zeros, n)
            for o, n in zip(old, new, strict=True)
        )

    def _run_group(self, index: int, row: Row, group: Group, params, step, images, labels, count):
        """The vector of a group's architectures, on each of its row's devices."""
        call = functools.partial(self._programs, row)
        ghn = (self.ghn,)
        tiles = call(self._predict, ghn, params, group.graph, group.rows)
        totals = np.zeros(2 * row.mesh.size, np.float32)
        # Of the mean over all architectures and over all of the row's devices.
        weight = np.float32(1 / (count * row.mesh.size))
        static = (self.ghn.normalise, self.smoothing, row.axis)
        size = len(images) // row.mesh.size
        for member, program in zip(group.members, group.programs, strict=True):
            dtiles, arenas = self._memory_for(index, row, tiles, program.capacity, size)
            dtiles, arenas, totals = call(
                self._run, (program.bucket, *static), tiles, dtiles, arenas, totals, program.table,
                images, labels, self.seed, step, np.int32(member), weight,
            )  # fmt: skip
            self._memory[index] = dtiles, arenas
        return call(self._predict_backward, ghn, params, group.graph, group.rows, dtiles, totals)

    def _whole(self, vectors: list[jax.Array]) -> jax.Array:
        """One array over the mesh of what its rows' devices have, row after row."""
        parts = [shard.data for vector in vectors for shard in vector.addressable_shards]
        return jax.make_array_from_single_device_arrays(
            (self.mesh.size * len(parts[0]),), NamedSharding(self.mesh, P((ARCH, DATA))), parts
        )

    def __call__(
        self, state: TrainState, batch: MetaBatch, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One update.

        Args:
          state: donated.
          batch: the architectures, in as many groups as this process has rows; or a multiple, where
            a row is one device.
          images: (B, H, W, 3) float32 normalised images, all of them in every process.
          labels: (B,) int32 classes.

        Returns:
          The new state, and the update's metrics (arrays on all devices).

        Raises:
          ValueError: the groups or the images cannot be divided between the rows.
        """
        workers, left = divmod(len(batch.groups), len(self.rows))
        columns = self.mesh.shape[DATA]
        # Groups that share several devices would wait for each other's exchanges for ever.
        if left or not workers or (workers > 1 and columns > 1):
            allowed = "as many" if columns > 1 else "a multiple"
            raise ValueError(
                f"the meta-batch has {len(batch.groups)} groups for {len(self.rows)} rows of "
                f"{columns} devices; allowed: {allowed}"
            )
        if len(images) % columns:
            raise ValueError(
                f"{len(images)} images cannot be divided between {columns} devices; allowed: a "
                "multiple"
            )
        if self._programs.count > self._programs_seen and crowded():
            # What is needed again comes back from the cache on disk.
            self._programs.forget_half()
        self._programs_seen = self._programs.count

        rows = []
        for row in self.rows:
            data = jax.device_put((images, labels), row.sharding(P(DATA)))
            rows.append((row, self._on_row(row, state.params), self._on_row(row, state.step), data))
        count = len(batch.architectures)

        def run_group(index):
            row, params, step, (images, labels) = rows[index // workers]
            group = batch.groups[index]
            return self._run_group(index, row, group, params, step, images, labels, count)

        with concurrent.futures.ThreadPoolExecutor(len(batch.groups)) as pool:
            vectors = list(pool.map(run_group, range(len(batch.groups))))
        return self._apply(state, [self._whole(vectors[w::workers]) for w in range(workers)])
