"""One update of the hypernetwork on a meta-batch (paper Eq. 2, § 4.3).

The hypernetwork encodes the graphs of all architectures and decodes their tiles; the engine runs
the networks one after another, forwards and backwards, each as steps that the host issues; the
tiles' cotangents go back through decoders and encoder. `meta_loss.py` is the definition of all that
in a page.

Where there are several processes, each runs architectures of its own on its own devices, which
share the images. What crosses processes is one sum of one vector: loss, accuracy and gradient.
"""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ghn_jax.deepnets1m.units import Arrays
from ghn_jax.engine.engine import Engine, Prepared
from ghn_jax.engine.programs import Program, Programs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.identity_start import near_identity
from ghn_jax.hypernet.sharding import param_shardings
from ghn_jax.training.decoding import TilePrograms, Tiles
from ghn_jax.training.mesh import ARCH, DATA, make_mesh
from ghn_jax.training.meta_batch import MetaBatch
from ghn_jax.training.meta_loss import cross_entropy
from ghn_jax.training.stopping import NOTHING, SAVE, STOP


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
      params: of the hypernetwork.
      opt_state: of the optimizer.
      step: () int32, updates so far.
      average: parameters' moving average, None where nobody wants one.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    average: Any = None

    @property
    def trained(self) -> Any:
        """The parameters to use: their average where there is one."""
        return self.params if self.average is None else self.average


class Metrics(NamedTuple):
    """Of one update: scalars, means over its architectures.

    Attributes:
      loss: cross-entropy.
      top1: fraction of images classified right.
      grad_norm: global norm of the gradient before clipping.
      applied: whether all numbers were finite; otherwise the update was passed over.
      request: the most that a process asked for; see `stopping.py`.
    """

    loss: jax.Array
    top1: jax.Array
    grad_norm: jax.Array
    applied: jax.Array
    request: jax.Array


class Update(NamedTuple):
    """A meta-batch with the programs that it needs, from `MetaStep.prepare`."""

    batch: MetaBatch
    networks: tuple[Prepared, ...]
    loss: Program
    encode: Program
    decode: tuple[Program, ...]
    decode_backward: tuple[Program, ...]
    encode_backward: Program


class MetaStep:
    """Updates a hypernetwork on meta-batches.

    Args:
      ghn: the hypernetwork.
      optimizer: an optax transformation; see `train/` for the paper's.
      mesh: all devices, from `mesh.make_mesh`; JAX's first device if not given. Every process calls
        the step with the same arguments, but for its own architectures.
      smoothing: label smoothing.
      norm_penalty: weight of the sum of the norms of each network's predicted tensors; it is in the
        gradient, not in the metrics' loss. 0 but for GHN-3 and LoGAH.
      average: decay of a moving average of the parameters, at first their mean; 0 for none.
      identity: on the diagonals of kernels at the start; see `hypernet/identity_start.py`.
      seed: of the dropout in networks with two fully connected layers.
      workers: networks that run at once; more than one where a CPU is one device.
      dtype: that networks compute in; see `engine.Engine`.
      shard: keep the state in parts, one on each device, but for the time of an update: for
        hypernetworks whose optimizer state does not fit a device.
      programs: see `engine.Engine`; whoever gives them closes them.
    """

    def __init__(
        self,
        ghn: GHN,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        smoothing: float = 0.0,
        norm_penalty: float = 0.0,
        average: float = 0.0,
        identity: float = 0.0,
        seed: int = 0,
        workers: int = 1,
        dtype=jnp.float32,
        shard: bool = False,
        programs: Programs | None = None,
    ):
        self.ghn, self.optimizer, self.smoothing = ghn, optimizer, smoothing
        self.average, self.identity, self._shard = average, identity, shard
        self.mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
        self.replicated = NamedSharding(self.mesh, P())
        here = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        self.engine = Engine(here, dtype=dtype, programs=programs)
        self._owns_programs = programs is None
        self.seed, self.workers = seed, workers
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, "network")
        self.form = Tiles(ghn)
        state = jax.eval_shape(self._make_state, 0)
        self.placement = (
            param_shardings(state, self.mesh, ARCH, DATA)
            if shard
            else jax.tree.map(lambda _: self.replicated, state)
        )
        self._init = jax.jit(self._make_state, out_shardings=self.placement)
        self._whole = jax.jit(lambda tree: tree, out_shardings=self.replicated)
        self._apply = jax.jit(
            self._apply_gradient, donate_argnums=0, out_shardings=(self.placement, self.replicated)
        )
        shapes = state.params
        self._tiles = TilePrograms(ghn, self.engine, shapes, norm_penalty)
        self._zeros = jax.jit(
            lambda n: (
                jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["decoder"]),
                jnp.zeros((n, ghn.features)),
            ),
            static_argnums=0, out_shardings=self.engine.whole,
        )  # fmt: skip

    def init(self, seed: int) -> TrainState:
        """The state before the first update, a pure function of the seed; on every device."""
        return self._init(seed)

    def _make_state(self, seed) -> TrainState:
        params = self.ghn.init_variables(seed)["params"]
        params = near_identity(self.ghn, params, self.identity)
        average = params if self.average else None
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32), average)

    def place(self, state: TrainState) -> TrainState:
        """As updates take it, of a state that is whole on every device."""
        if not self._shard:
            return state
        return jax.jit(lambda tree: tree, out_shardings=self.placement)(state)

    def whole(self, tree: Any) -> Any:
        """A state, or a part of it, whole on every device."""
        return self._whole(tree) if self._shard else tree

    def close(self) -> None:
        """Compiles nothing more."""
        if self._owns_programs:
            self.engine.programs.close()
        self._pool.shutdown()

    # --- Before an update -------------------------------------------------------------------------

    def prepare(self, batch: MetaBatch, images: int) -> Update:
        """Looks up the programs of a meta-batch; those that are new are compiled from here on.

        Called some meta-batches ahead, updates do not wait for the compiler.

        Args:
          batch: the architectures of this process.
          images: number of images that an update takes.

        Raises:
          ValueError: the images cannot be divided between the devices.
        """
        columns = self.engine.mesh.size
        if images % columns:
            raise ValueError(
                f"{images} images cannot be divided between {columns} devices; allowed: a multiple"
            )
        n_node = len(batch.graph.nodes["primitive"])
        # The largest first: they take longest to compile.
        encode_backward = self._tiles.encode_backward(batch.graph, self.workers)
        encode = self._tiles.encode(batch.graph)
        decode = tuple(self._tiles.decode(chunk, n_node) for chunk in batch.chunks)
        networks = tuple(
            self.engine.prepare(
                plan, images, self.form, gradient=True, dropout=len(plan.wiring.head.dims) > 2
            )
            for plan in batch.plans
        )
        back = tuple(self._tiles.decode_backward(chunk, n_node) for chunk in batch.chunks)
        return Update(batch, networks, self._loss(images), encode, decode, back, encode_backward)

    def _loss(self, images: int) -> Program:
        """(logits, labels, weight) -> (2,) loss and accuracy times weight, cotangent of logits."""
        engine, smoothing, classes = self.engine, self.smoothing, self.ghn.num_classes

        def loss(logits, labels, weight):
            value, dlogits = jax.value_and_grad(
                lambda x: cross_entropy(x, labels, smoothing) * weight
            )(logits)
            top1 = (logits.argmax(-1) == labels).mean() * weight
            return jnp.stack([value, top1]), dlogits

        single, integer = jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)
        logits = ((images, classes), single, engine.split)
        specs = logits, ((images,), integer, engine.split), ((), single, engine.whole)
        return engine.program(("loss", smoothing), loss, specs, (engine.whole, engine.split))

    # --- An update --------------------------------------------------------------------------------

    def _local(self, tree):
        """A replicated tree's copies on this process's devices, which are not copied again."""

        def view(leaf):
            copies = [shard.data for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, self.engine.whole, copies)

        return jax.tree.map(view, tree)

    def _predict(self, update: Update, params) -> tuple[jax.Array, Any, list[dict[str, Arrays]]]:
        """Node states, residuals of encoding them, and the tiles of each network."""
        batch = update.batch
        states, residuals = update.encode(params, batch.graph)

        def decode(i):
            return update.decode[i](params["decoder"], states, batch.chunks[i].nodes)

        tiles: list[dict[str, Arrays]] = [{} for _ in batch.members]
        found = self._share(decode, len(batch.chunks))
        for chunk, arrays in zip(batch.chunks, found, strict=True):
            for (member, name), tile in zip(chunk.owners, arrays, strict=False):
                tiles[member][name] = (tile,)
        return states, residuals, tiles

    def _share(self, function, count: int) -> list:
        """`function(i)` for i below a count, by all workers."""
        if self.workers == 1:
            return [function(i) for i in range(count)]
        return list(self._pool.map(function, range(count)))

    def _decode_backward(self, update: Update, params, states, dtiles, worker: int):
        """The sums of a worker's share of the chunks."""
        batch = update.batch
        sums = self._zeros(len(batch.graph.nodes["primitive"]))
        share = np.float32(self._tiles.norm_penalty / len(batch.architectures))
        for i in range(worker, len(batch.chunks), self.workers):
            chunk = batch.chunks[i]
            given = [dtiles[member].pop(name)[0] for member, name in chunk.owners]
            given += given[:1] * (len(chunk.nodes) - len(given))
            penalty = (chunk.norms, share) if self._tiles.norm_penalty else ()
            sums = update.decode_backward[i](
                params["decoder"], states, chunk.nodes, tuple(given), sums, *penalty
            )
        return sums

    def _forward(self, network: Prepared, tiles, images, step, member: int):
        """(B, classes) of a network with its dropout, and the trace for the way back."""
        dropout = len(network.plan.wiring.head.dims) > 2
        seed = (np.int32(self.seed), step, np.int32(member)) if dropout else None
        return self.engine.forward(network, tiles, images, keep=True, seed=seed)

    def gradient(
        self, params, update: Update, images: jax.Array, labels: jax.Array, step
    ) -> tuple[list[jax.Array], jax.Array]:
        """(2,) loss and accuracy of each network, and the (P,) gradient of their share of the mean.

        Args:
          params: of the hypernetwork, on the engine's devices.
          update: from `prepare`.
          images, labels: on the engine's devices.
          step: () int32 number of the update, which dropout's random numbers follow from.
        """
        batch = update.batch
        states, residuals, tiles = self._predict(update, params)
        weight = np.float32(1 / len(batch.architectures))

        def run(i):
            network, own = update.networks[i], tiles[i]
            tiles[i] = None
            logits, trace = self._forward(network, own, images, step, batch.members[i])
            totals, dlogits = update.loss(logits, labels, weight)
            return totals, self.engine.backward(network, own, trace, dlogits)

        # Long ones first, so that nobody waits for them at the end.
        order = sorted(range(len(batch.members)), key=lambda i: -batch.costs[i])
        ran = dict(zip(order, self._share(lambda k: run(order[k]), len(order)), strict=True))
        results = [ran[i] for i in range(len(order))]
        dtiles = [gradient for _, gradient in results]
        sums = self._share(
            lambda worker: self._decode_backward(update, params, states, dtiles, worker),
            self.workers,
        )
        gradient = update.encode_backward(params, batch.graph, residuals, tuple(sums))
        return [totals for totals, _ in results], gradient

    def values(
        self, params, update: Update, images: jax.Array, step
    ) -> list[tuple[dict[str, Arrays], dict[int, jax.Array], jax.Array]]:
        """All that an update computes forwards: of each network tiles, values and logits.

        Args:
          params, update, images, step: see `gradient`.
        """
        *_, tiles = self._predict(update, params)
        found = []
        for network, own, member in zip(update.networks, tiles, update.batch.members, strict=True):
            logits, trace = self._forward(network, own, images, step, member)
            found.append((own, trace.values, logits))
        return found

    def logits(self, params, update: Update, images: jax.Array) -> list[jax.Array]:
        """(B, classes) of each network, without dropout."""
        *_, tiles = self._predict(update, params)
        engine, plans = self.engine, update.batch.plans
        networks = [engine.prepare(p, len(images), self.form, gradient=False) for p in plans]
        pairs = zip(networks, tiles, strict=True)
        return [engine.forward(network, own, images)[0] for network, own in pairs]

    def _global(self, array: jax.Array) -> jax.Array:
        """(rows, ...) over the mesh, of what the devices of each row have."""
        copies = [shard.data[None] for shard in array.addressable_shards]
        shape = (self.mesh.shape[ARCH], *array.shape)
        where = NamedSharding(self.mesh, P(ARCH))
        return jax.make_array_from_single_device_arrays(shape, where, copies)

    def _apply_gradient(
        self, state: TrainState, totals: jax.Array, gradient: jax.Array, requests: jax.Array
    ):
        """Adds up (rows, 2), (rows, P) and (rows, 2), in one exchange, and updates."""
        loss, top1 = totals.sum(0)
        grads = ravel_pytree(state.params)[1](gradient.sum(0))
        norm = optax.global_norm(grads)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # What is not finite is passed over, whatever made it so: nothing of it is kept.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        for leaf in jax.tree.leaves((params, opt_state)):
            finite &= jnp.isfinite(leaf).all()
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        average = state.average
        if average is not None:
            # As long as there are few, all updates count alike.
            decay = jnp.minimum(self.average, state.step / (state.step + 1))
            average = jax.tree.map(lambda a, p: p + decay * (a - p), average, params)
        save, stop = requests.sum(0) > 0
        request = jnp.where(stop, STOP, jnp.where(save, SAVE, NOTHING))
        metrics = Metrics(loss, top1, norm, finite, request)
        return TrainState(params, opt_state, state.step + 1, average), metrics

    def __call__(
        self,
        state: TrainState,
        update: Update,
        images: jax.Array,
        labels: jax.Array,
        request: int = NOTHING,
    ) -> tuple[TrainState, Metrics]:
        """One update.

        Args:
          state: donated.
          update: from `prepare`.
          images: (B, H, W, 3) float32 normalised images, all of them in every process.
          labels: (B,) int32 classes.
          request: what this process asks all of them for; see `stopping.py`.

        Returns:
          The new state, and the update's metrics (arrays on all devices).
        """
        self.engine.programs.make_room()
        images, labels = jax.device_put((images, labels), self.engine.split)
        params, step = self._local(self.whole((state.params, state.step)))
        totals, gradient = self.gradient(params, update, images, labels, step)
        total = functools.reduce(jnp.add, totals)
        asks = np.array([request == SAVE, request == STOP], np.float32)
        asks = jax.device_put(asks, self.engine.whole)
        return self._apply(state, *map(self._global, (total, gradient, asks)))
