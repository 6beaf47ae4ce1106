"""Trains one network of the design space by gradient descent, with nothing compiled for it.

The engine gives the gradient; the optimizer works on each array by itself, so that its programs
depend on shapes alone, as the engine's do. A thousand networks are trained by the same programs.

    training = NetworkTraining(engine, arch, optax.sgd(0.1, momentum=0.9), batch_size=64)
    state = training.init(params)  # predicted ones, or `evaluation.random_parameters`
    for images, labels in batches:
        state, loss, top1 = training.step(state, images, labels)
    logits = training.logits(state, images)  # batch norm on running averages
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.deepnets1m.units import Arrays, NormSum
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.engine.engine import Engine, Trace, tree_of, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.training.meta_loss import cross_entropy


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
      seed: of the dropout between fully connected layers.

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
        seed: int = 0,
    ):
        self.engine, self.clip, self.momentum, self.seed = engine, clip, momentum, seed
        wiring = wire(arch, Task(num_classes, image_size))
        self.plan = make_plan(wiring)
        self.dropout = len(wiring.head.dims) > 2
        self.network = engine.prepare(self.plan, batch_size, gradient=True, dropout=self.dropout)
        self._running = make_plan(wiring, running=True)
        self._norms = {
            i: step.names
            for i, step in enumerate(self.plan.steps)
            if isinstance(step.unit, NormSum)
        }
        self._init_array = jax.jit(optimizer.init)
        self._loss = jax.jit(
            jax.value_and_grad(lambda logits, labels: cross_entropy(logits, labels, smoothing))
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(array, opt_state, gradient, scale):
            changes, opt_state = optimizer.update(gradient * scale, opt_state, array)
            return optax.apply_updates(array, changes), opt_state

        self._update = update

    def init(self, params: Mapping[str, Any]) -> NetworkState:
        """The state before the first update.

        Args:
          params: the `params` tree of `build_network(arch)`; copied.
        """
        tree = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        weights = jax.device_put(weights_of(self.plan, tree), self.engine.whole)
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
        self, state: NetworkState, images, labels
    ) -> tuple[NetworkState, jax.Array, jax.Array]:
        """One update.

        Args:
          state: used up.
          images: (B, H, W, 3) float32.
          labels: (B,) int32.

        Returns:
          The new state, and the loss and accuracy on the batch before the update.
        """
        images, labels = jax.device_put((images, labels), self.engine.split)
        seed = (np.int32(self.seed), np.int32(state.step), np.int32(0)) if self.dropout else None
        logits, trace = self.engine.forward(
            self.network, state.weights, images, keep=True, seed=seed
        )
        loss, dlogits = self._loss(logits, labels)
        statistics = self._averaged(state.statistics, trace, len(images))
        gradient = self.engine.backward(self.network, state.weights, trace, dlogits)
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
