"""One update of the hypernetwork on a meta-batch (paper Eq. 2, § 4.3).

The graphs are encoded once; each group of architectures decodes its tiles and runs its
architectures one after another, each as data to its bucket's program; the tiles' cotangents go back
through the decoders and the encoder. Groups run in parallel.
"""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ghn_jax.compilation import crowded, executor_options
from ghn_jax.executor import run
from ghn_jax.executor.bucket import MAX_HIDDEN, Bucket, Capacity
from ghn_jax.executor.program import Instructions
from ghn_jax.executor.run import Arenas, Tiles
from ghn_jax.executor.tiles import decode_tiles
from ghn_jax.ghn import GHN
from ghn_jax.metabatch import Group, MetaBatch, Program


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


def _run_one(
    bucket: Bucket,
    normalise: bool,
    smoothing: float,
    tiles: Tiles,
    dtiles: Tiles,
    arenas: Arenas,
    table: Instructions,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    weight: jax.Array,
):
    """Loss, accuracy and tile cotangents (times `weight`) of one architecture."""
    values, features = run.forward(bucket, normalise, tiles, table, images, arenas.values)
    arenas = arenas._replace(values=values)
    keep = jax.random.bernoulli(key, 0.5, (len(images), MAX_HIDDEN))
    dropout = 2.0 * keep.astype(jnp.float32)

    def head_loss(features, weights):
        logits = run.head(normalise, weights, table, features, dropout)
        return _loss(logits, labels, smoothing), logits

    loss, vjp, logits = jax.vjp(head_loss, features, run.head_tiles(tiles, table), has_aux=True)
    dfeatures, dhead = vjp(weight)
    top1 = (logits.argmax(-1) == labels).mean()
    gradients, dtiles = run.backward(
        bucket, normalise, tiles, table, images, arenas, dfeatures, dtiles
    )
    arenas = arenas._replace(gradients=gradients)
    return loss, top1, run.save_head_tiles(dtiles, table, dhead), arenas


def _signature(program: Program, tiles: Tiles, images: jax.Array):
    """What an executor's program depends on."""
    shapes = tuple((kind, tile.shape) for kind, tile in sorted(tiles.items()))
    return program.bucket, program.capacity, shapes, images.shape


class MetaStep:
    """Updates a hypernetwork on meta-batches; holds its compiled programs and their workspace.

    Args:
      ghn: the hypernetwork.
      optimizer: an optax transformation; see `train/` for the paper's.
      smoothing: label smoothing.
      seed: of the dropout in networks with two fully connected layers.
    """

    def __init__(
        self,
        ghn: GHN,
        optimizer: optax.GradientTransformation,
        *,
        smoothing: float = 0.0,
        seed: int = 0,
    ):
        self.ghn, self.optimizer, self.smoothing = ghn, optimizer, smoothing
        self.key = jax.random.key(seed)
        self._workspace: dict[int, Tiles] = {}
        self._arenas: dict[int, tuple[tuple, Arenas]] = {}
        self._programs: dict[Any, Any] = {}
        self._encode = jax.jit(self._encode_with_vjp)
        self._decode = jax.jit(lambda params, *args: decode_tiles(ghn, {"params": params}, *args))
        self._decode_backward = jax.jit(self._decode_vjp)
        self._run = jax.jit(
            _run_one,
            static_argnums=(0, 1, 2),
            donate_argnums=(4, 5),
            compiler_options=executor_options(),
        )
        self._apply = jax.jit(self._apply_gradients, donate_argnums=0)

    def init(self, seed: int) -> TrainState:
        """The state before the first update, a pure function of the seed."""
        params = self.ghn.init_variables(seed)["params"]
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def _encode_with_vjp(self, params, graph):
        return jax.vjp(lambda p: self.ghn.apply({"params": p}, graph), params)

    def _decode_vjp(self, params, states, rows, dtiles):
        _, vjp = jax.vjp(
            lambda p, s: decode_tiles(self.ghn, {"params": p}, s, rows), params, states
        )
        return vjp(dtiles)

    def _apply_gradients(self, state: TrainState, encode_vjp, gradients, losses, top1s):
        (from_encoder,) = encode_vjp(sum(dstates for _, dstates in gradients))
        grads = functools.reduce(
            functools.partial(jax.tree.map, jnp.add), [g for g, _ in gradients], from_encoder
        )
        norm = optax.global_norm(grads)
        loss = jnp.stack(losses).mean()
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Architectures whose loss is not finite are passed over: nothing of them is kept.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = Metrics(loss, jnp.stack(top1s).mean(), norm, finite)
        return TrainState(params, opt_state, state.step + 1), metrics

    def _workspace_for(self, index: int, tiles: Tiles) -> Tiles:
        """Tile cotangents to write into: rows in use are always written before they are read."""
        space = self._workspace.pop(index, None)
        shapes = jax.tree.map(jnp.shape, tiles)
        if space is None or jax.tree.map(jnp.shape, space) != shapes:
            space = jax.tree.map(jnp.zeros_like, tiles)
        return space

    def _arenas_for(self, index: int, capacity: Capacity, batch_size: int) -> Arenas:
        """A worker's arenas, of the lengths that a program is compiled for."""
        lengths, arenas = self._arenas.pop(index, (None, None))
        if lengths != (capacity.values, capacity.gradients, batch_size):
            arenas = Arenas.zeros(capacity, batch_size)
        return arenas

    def _compile(self, batch: MetaBatch, tiles: list[Tiles], images, labels) -> None:
        """Compiles what the batch needs and no batch before it did, two programs at a time.

        Here and not at the first call, or two groups would compile one program twice.
        """
        needed = {}
        for group, group_tiles in zip(batch.groups, tiles, strict=True):
            for program in group.programs:
                needed[_signature(program, group_tiles, images)] = (program, group_tiles)
        missing = {key: needed[key] for key in needed if key not in self._programs}
        if missing and crowded():
            # Rare: what is needed again comes back from the cache on disk.
            self._programs.clear()
            jax.clear_caches()
            missing = needed

        def compile_one(item):
            key, (program, group_tiles) = item
            arenas = jax.eval_shape(lambda: Arenas.zeros(program.capacity, len(images)))
            lowered = self._run.lower(
                program.bucket, self.ghn.normalise, self.smoothing, group_tiles, group_tiles,
                arenas, program.table, images, labels, self.key, jnp.float32(1),
            )  # fmt: skip
            return key, lowered.compile()

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            self._programs.update(pool.map(compile_one, missing.items()))

    def _run_group(self, index, group: Group, tiles, params, states, images, labels, key, weight):
        dtiles = self._workspace_for(index, tiles)
        losses, top1s = [], []
        for i, program in enumerate(group.programs):
            run_one = self._programs[_signature(program, tiles, images)]
            dropout_key = jax.random.fold_in(key, 1000 * index + i)
            arenas = self._arenas_for(index, program.capacity, len(images))
            loss, top1, dtiles, arenas = run_one(
                tiles, dtiles, arenas, program.table, images, labels, dropout_key, weight
            )
            lengths = program.capacity.values, program.capacity.gradients, len(images)
            self._arenas[index] = lengths, arenas
            losses.append(loss)
            top1s.append(top1)
        gradients = self._decode_backward(params, states, group.rows, dtiles)
        self._workspace[index] = dtiles
        return losses, top1s, jax.block_until_ready(gradients)

    def __call__(
        self, state: TrainState, batch: MetaBatch, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One update.

        Args:
          state: donated.
          batch: the architectures.
          images: (B, H, W, 3) float32 normalised images.
          labels: (B,) int32 classes.

        Returns:
          The new state, and the update's metrics (arrays on the device).
        """
        images, labels = jnp.asarray(images), jnp.asarray(labels)
        states, encode_vjp = self._encode(state.params, batch.graph)
        count = sum(len(group.programs) for group in batch.groups)
        key = jax.random.fold_in(self.key, state.step)
        weight = jnp.float32(1 / count)

        tiles = [self._decode(state.params, states, group.rows) for group in batch.groups]
        self._compile(batch, tiles, images, labels)

        def run_group(index):
            return self._run_group(
                index, batch.groups[index], tiles[index], state.params, states, images, labels, key,
                weight,
            )  # fmt: skip

        with concurrent.futures.ThreadPoolExecutor(len(batch.groups)) as pool:
            results = list(pool.map(run_group, range(len(batch.groups))))
        losses = [loss for result in results for loss in result[0]]
        top1s = [top1 for result in results for top1 in result[1]]
        gradients = [result[2] for result in results]
        return self._apply(state, encode_vjp, gradients, losses, top1s)
