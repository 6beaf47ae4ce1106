"""Squeeze and excitation (Hu et al. 2018) as torchvision has it, in several families."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class SqueezeExcitation(nn.Module):
    """Scales channels by what their averages say.

    Attributes:
      squeeze: channels of the first of its two 1x1 convolutions.
      activation: after the first.
      gate: after the second; what the channels are scaled by.
    """

    squeeze: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    gate: Callable[[jax.Array], jax.Array] = nn.sigmoid

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        y = x.mean((1, 2), keepdims=True)
        y = self.activation(nn.Conv(self.squeeze, (1, 1), kernel_init=_init, name="fc1")(y))
        y = self.gate(nn.Conv(x.shape[-1], (1, 1), kernel_init=_init, name="fc2")(y))
        return x * y
