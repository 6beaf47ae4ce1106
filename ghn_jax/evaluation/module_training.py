"""Trains any Linen module by gradient descent (Eq. 1), with the calls of `network_training`.

One program is compiled for the module. Networks of the design space are better trained by
`NetworkTraining`, which compiles none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ghn_jax.files.messages import what_is
from ghn_jax.training.meta_loss import cross_entropy


class ModuleState(NamedTuple):
    """What training changes.

    Attributes:
      variables: of the module, statistics included.
      opt_state: of the optimizer.
      step: number of updates so far.
    """

    variables: Mapping[str, Any]
    opt_state: Any
    step: int


class ModuleTraining:
    """Updates of one module, whose call takes `train`, as those of the zoo do.

    Args:
      module: the network.
      optimizer: an optax transformation.
      image_size: height and width of the images, in pixels.
      clip: largest global norm of the gradient; None for any.
      smoothing: of labels.
      seed: of its dropout and of the parameters that `init` is not given.

    Raises:
      TypeError: the network is no Linen module.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: optax.GradientTransformation,
        *,
        image_size: int = 32,
        clip: float | None = None,
        smoothing: float = 0.0,
        seed: int = 0,
    ):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"the network is {what_is(module)}; allowed: an instance of a Linen module; an "
                "Architecture is trained by NetworkTraining"
            )
        self.module, self.image_size, self.seed = module, image_size, seed
        if clip is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
        self._optimizer = optimizer

        def loss(params, others, images, labels, key):
            logits, others = module.apply(
                {"params": params, **others}, images, train=True,
                mutable=list(others), rngs={"dropout": key},
            )  # fmt: skip
            return cross_entropy(logits, labels, smoothing), (logits, others)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(variables, opt_state, images, labels, step):
            others = {name: tree for name, tree in variables.items() if name != "params"}
            key = jax.random.fold_in(jax.random.key(seed), step)
            (value, (logits, others)), gradient = jax.value_and_grad(loss, has_aux=True)(
                variables["params"], others, images, labels, key
            )
            changes, opt_state = optimizer.update(gradient, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], changes)
            top1 = (logits.argmax(-1) == labels).mean()
            return {"params": params, **others}, opt_state, value, top1

        self._update = update
        self._logits = jax.jit(functools.partial(module.apply))

    def init(self, params: Mapping[str, Any] | None = None) -> ModuleState:
        """The state before the first update.

        Args:
          params: of the module; the module's own initial ones if not given.
        """
        images = jnp.zeros((2, self.image_size, self.image_size, 3))
        key = jax.random.key(self.seed)
        variables = dict(jax.jit(self.module.init)(key, images))
        if params is not None:
            variables["params"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return ModuleState(variables, self._optimizer.init(variables["params"]), 0)

    def params(self, state: ModuleState) -> Mapping:
        """The module's parameters."""
        return state.variables["params"]

    def step(
        self, state: ModuleState, images, labels, *, drop_path: float = 0.0
    ) -> tuple[ModuleState, jax.Array, jax.Array]:
        """One update; see `NetworkTraining.step`.

        Raises:
          ValueError: drop path is asked for, which only networks of the design space have.
        """
        if drop_path:
            raise ValueError("drop path is for networks of the design space only")
        variables, opt_state, loss, top1 = self._update(
            state.variables, state.opt_state, images, labels, state.step
        )
        return ModuleState(variables, opt_state, state.step + 1), loss, top1

    def logits(self, state: ModuleState, images) -> jax.Array:
        """(B, classes) with batch norm on its running averages."""
        return self._logits(state.variables, images)
