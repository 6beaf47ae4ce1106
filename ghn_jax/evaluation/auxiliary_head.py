"""The second classifier of the final training of found networks (paper C.2.3; DARTS)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SIZE = 8  # height that its input is averaged to


def _averages(size: int) -> np.ndarray:
    """(8, size) weights of adaptive average pooling, as in PyTorch."""
    weights = np.zeros((_SIZE, size), np.float32)
    for i, row in enumerate(weights):
        row[i * size // _SIZE : -(-(i + 1) * size // _SIZE)] = 1
    return weights / weights.sum(1, keepdims=True)


def _norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * (scale * lax.rsqrt(variance + 1e-5)) + bias


class _NormRelu(nn.Module):
    """Batch norm on the statistics of the batch, as the head runs in training only; a ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, c)
        return nn.relu(_norm(x, scale, self.param("bias", nn.initializers.zeros, c)))


class AuxiliaryHead(nn.Module):
    """Pooling to 8x8, then to 2x2; convolutions to 128 and 768 channels; a linear layer.

    Attributes:
      num_classes: number of classes.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, S, S, C) -> (B, num_classes) logits."""
        if x.shape[1] != _SIZE:
            weights = jnp.asarray(_averages(x.shape[1]))
            x = jnp.einsum("ih,jw,bhwc->bijc", weights, weights, x)
        x = nn.avg_pool(nn.relu(x), (5, 5), (3, 3))
        x = _NormRelu(name="norm1")(nn.Conv(128, (1, 1), use_bias=False, name="conv1")(x))
        x = nn.Conv(768, (2, 2), padding="VALID", use_bias=False, name="conv2")(x)
        x = _NormRelu(name="norm2")(x)
        return nn.Dense(self.num_classes, name="classifier")(x.reshape(len(x), -1))
