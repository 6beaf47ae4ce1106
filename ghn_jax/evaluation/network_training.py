"""Trains one network of the design space by gradient descent, with nothing compiled for it (Eq. 1).

The engine gives the gradient; the optimizer works on each array by itself, so that its programs
depend on shapes alone, as the engine's do. A thousand networks are trained by the same programs,
if they are given the same engine and the same optimizer.

    optimizer = optax.sgd(0.1, momentum=0.9)
    training = NetworkTraining(engine, arch, optimizer, batch_size=64)
    state = training.init(params)  # predicted ones, or `evaluation.random_parameters`
    for images, labels in batches:
        state, loss, top1 = training.step(state, images, labels)
    logits = training.logits(state, images)  # batch norm on running averages
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.layers import concatenate
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import Arrays, NormSum
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.engine.engine import Engine, Trace, tree_of, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.evaluation.auxiliary_head import AuxiliaryHead
from ghn_jax.training.meta_loss import cross_entropy

_AUXILIARY = "auxiliary_head"  # its name among the weights; no official parameter is called so


class NetworkState(NamedTuple):
    """What training changes.

    Attributes:
      weights: official parameter name -> its arrays.
      opt_state: the same names -> the optimizer's state for each array.
      statistics: name of a batch norm -> (2, C) running mean and variance.
      step: number of updates so far.
    """

    weights: dict[str, Arrays]
    opt_state: dict[str, tuple]
    statistics: dict[str, jax.Array]
    step: int


@functools.partial(jax.jit, donate_argnums=0)
def _average(old: jax.Array, new: jax.Array, momentum, count) -> jax.Array:
    # As PyTorch: the variance of the batch is divided by one less than its numbers.
    new = new.at[1].multiply(count / jnp.maximum(count - 1, 1))
    return momentum * old + (1 - momentum) * new


@jax.jit
def _squares(total: jax.Array, array: jax.Array) -> jax.Array:
    return total + jnp.square(array).sum()


@functools.lru_cache(maxsize=32)
def _optimizer_programs(optimizer: optax.GradientTransformation):
    """(array -> state), and (array, state, gradient, scale) -> (array, state), by shape."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(array, opt_state, gradient, scale):
        changes, opt_state = optimizer.update(gradient * scale, opt_state, array)
        return optax.apply_updates(array, changes), opt_state

    return jax.jit(optimizer.init), update


@functools.lru_cache(maxsize=32)
def _loss_program(smoothing: float):
    return jax.jit(
        jax.value_and_grad(lambda logits, labels: cross_entropy(logits, labels, smoothing))
    )


@functools.lru_cache(maxsize=32)
def _auxiliary_program(head: AuxiliaryHead, weight: float, smoothing: float):
    """(params, parts, labels) -> cotangents of the first two, for the head's share of the loss."""

    def loss(params, parts, labels):
        logits = head.apply({"params": params}, concatenate(parts).astype(jnp.float32))
        return weight * cross_entropy(cast(jax.Array, logits), labels, smoothing)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


class NetworkTraining:
    """Updates of one network.

    Args:
      engine: that runs it.
      arch: the network.
      optimizer: an optax transformation; it sees every array by itself, so that what it takes over
        all arrays (a global norm) is that of one.
      batch_size: images in an update.
      num_classes, image_size: of the images.
      clip: largest global norm of the gradient, over all arrays; None for any.
      smoothing: of labels.
      momentum: of batch norm's running averages.
      drop_path: whether updates may drop what cells' operations compute (C.2.3).
      auxiliary: weight in the loss of a second classifier, after two thirds of the cells (C.2.3);
        0 for none.
      seed: of the dropout between fully connected layers, of drop path and of the auxiliary head.

    Raises:
      DisconnectedError: no path leads from the images to the logits.
    """

    def __init__(
        self,
        engine: Engine,
        arch: Architecture,
        optimizer: optax.GradientTransformation,
        *,
        batch_size: int,
        num_classes: int = 10,
        image_size: int = 32,
        clip: float | None = None,
        smoothing: float = 0.0,
        momentum: float = 0.9,
        drop_path: bool = False,
        auxiliary: float = 0.0,
        seed: int = 0,
    ):
        self.engine, self.clip, self.momentum, self.seed = engine, clip, momentum, seed
        wiring = wire(arch, Task(num_classes, image_size))
        self.plan = make_plan(wiring, drop_path=drop_path)
        self.dropout = len(wiring.head.dims) > 2
        self.network = engine.prepare(self.plan, batch_size, gradient=True, dropout=self.dropout)
        self._running = make_plan(wiring, running=True)
        self._norms = {
            i: step.names
            for i, step in enumerate(self.plan.steps)
            if isinstance(step.unit, NormSum)
        }
        self._init_array, self._update = _optimizer_programs(optimizer)
        self._loss = _loss_program(smoothing)
        self._auxiliary = None
        if auxiliary:
            self._head = AuxiliaryHead(num_classes)
            self._auxiliary = _auxiliary_program(self._head, auxiliary, smoothing)
            # Of two thirds of the cells; what no path leads on from is not computed.
            feature = wiring.outputs[2 * arch.n_cells // 3] or ()
            states = [s for s in feature if s in self.plan.states]
            self._parts = [self.plan.states[s] for s in states if s is not None]

    def init(self, params: Mapping[str, Any]) -> NetworkState:
        """The state before the first update.

        Args:
          params: the `params` tree of `build_network(arch)`; copied.
        """
        tree = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        weights = weights_of(self.plan, tree)
        if self._auxiliary:
            values = [self.plan.values[v] for v in self._parts]
            shape = (2, values[0].size, values[0].size, sum(v.channels for v in values))
            head = self._head.init(jax.random.key(self.seed), jnp.zeros(shape))["params"]
            weights[_AUXILIARY] = tuple(jax.tree.leaves(head))
            self._tree = jax.tree.structure(head)
        weights = jax.device_put(weights, self.engine.whole)
        opt_state = {n: tuple(map(self._init_array, arrays)) for n, arrays in weights.items()}
        statistics = {
            name: jax.device_put(
                np.stack([np.zeros(len(weights[name][0]), np.float32),
                          np.ones(len(weights[name][0]), np.float32)]),
                self.engine.whole,
            )
            for names in self._norms.values()
            for name in names
        }  # fmt: skip
        return NetworkState(weights, opt_state, statistics, 0)

    def params(self, state: NetworkState) -> dict:
        """The `params` tree of `build_network(arch)`."""
        return tree_of(self.plan, state.weights)

    def step(
        self, state: NetworkState, images, labels, *, drop_path: float = 0.0
    ) -> tuple[NetworkState, jax.Array, jax.Array]:
        """One update.

        Args:
          state: used up.
          images: (B, H, W, 3) float32.
          labels: (B,) int32.
          drop_path: how likely an operation of a cell is dropped, for each image by itself.

        Returns:
          The new state, and the loss and accuracy on the batch before the update.
        """
        images, labels = jax.device_put((images, labels), self.engine.split)
        seed = (np.int32(self.seed), np.int32(state.step), np.int32(0)) if self.dropout else None
        logits, trace = self.engine.forward(
            self.network, state.weights, images, keep=True, seed=seed,
            drop=self._drop(state.step, len(images), drop_path),
        )  # fmt: skip
        loss, dlogits = self._loss(logits, labels)
        statistics = self._averaged(state.statistics, trace, len(images))
        dvalues, dhead = {}, None
        if self._auxiliary:
            head = jax.tree.unflatten(self._tree, state.weights[_AUXILIARY])
            parts = [trace.values[v] for v in self._parts]
            dhead, dparts = self._auxiliary(head, parts, labels)
            dvalues = dict(zip(self._parts, dparts, strict=True))
        gradient = self.engine.backward(self.network, state.weights, trace, dlogits, dvalues)
        if dhead is not None:
            gradient[_AUXILIARY] = tuple(jax.tree.leaves(dhead))
        scale: np.float32 | jax.Array = np.float32(1)
        if self.clip is not None:
            every = (array for some in gradient.values() for array in some)
            total = functools.reduce(_squares, every, np.float32(0))
            scale = jnp.minimum(1, self.clip / (jnp.sqrt(total) + 1e-6))
        weights, opt_state = {}, {}
        for name, arrays in state.weights.items():
            pairs = [
                self._update(array, old, g, scale)
                for array, old, g in zip(arrays, state.opt_state[name], gradient[name], strict=True)
            ]
            weights[name], opt_state[name] = zip(*pairs, strict=True)
        state = NetworkState(weights, opt_state, statistics, state.step + 1)
        return state, loss, (logits.argmax(-1) == labels).mean()

    def _drop(self, step: int, images: int, probability: float) -> dict[int, np.ndarray]:
        """Factors of the terms of each state: 0 where dropped, else such that the mean stays 1."""
        rng = np.random.default_rng([self.seed, step])
        scales = {}
        for i, droppable in self.plan.droppable.items():
            kept = rng.random((len(droppable), images)) >= probability
            kept |= ~np.array(droppable)[:, None]
            scale = np.where(droppable, 1 / (1 - probability), 1)[:, None]
            scales[i] = (kept * scale).astype(np.float32)
        return scales

    def _averaged(self, old: dict[str, jax.Array], trace: Trace, images: int) -> dict:
        new = {}
        for i, names in self._norms.items():
            size = self.plan.values[self.plan.steps[i].output].size
            count = np.float32(images * size**2)
            for name, batch in zip(names, trace.statistics[i], strict=True):
                new[name] = _average(old[name], batch, np.float32(self.momentum), count)
        return new

    def logits(self, state: NetworkState, images) -> jax.Array:
        """(B, classes) with batch norm on its running averages; any number of images."""
        images = jax.device_put(images, self.engine.split)
        network = self.engine.prepare(self._running, len(images), gradient=False)
        return self.engine.forward(network, state.weights, images, statistics=state.statistics)[0]
