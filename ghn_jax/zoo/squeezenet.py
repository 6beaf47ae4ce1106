"""SqueezeNet 1.1 (Iandola et al. 2016) as torchvision has it."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.pooling import max_pool

POOL: Literal["pool"] = "pool"
# Channels of each fire module's squeeze, max-pooling between; places in torchvision's sequence
# follow from the order, after the first convolution and its ReLU.
LAYERS: tuple[int | Literal["pool"], ...] = (POOL, 16, 16, POOL, 32, 32, POOL, 48, 48, 64, 64)

_init = nn.initializers.he_uniform()


class Fire(nn.Module):
    """A narrow 1x1 convolution, then 1x1 and 3x3 convolutions beside each other.

    Attributes:
      squeeze: channels of the narrow one; the others have four times as many each.
    """

    squeeze: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, 8 * squeeze)."""
        wide = 4 * self.squeeze
        x = nn.relu(nn.Conv(self.squeeze, (1, 1), kernel_init=_init, name="squeeze")(x))
        a = nn.Conv(wide, (1, 1), kernel_init=_init, name="expand1x1")(x)
        b = nn.Conv(wide, (3, 3), padding=1, kernel_init=_init, name="expand3x3")(x)
        return jnp.concatenate([nn.relu(a), nn.relu(b)], axis=-1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 under torchvision's names.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; small ones change nothing, as in the
        authors' code.
    """

    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on dropout."""
        is_small(self.image_size)  # not below what is allowed
        x = nn.relu(nn.Conv(64, (3, 3), 2, padding=0, kernel_init=_init, name="features_0")(images))
        for at, layer in enumerate(LAYERS, 2):
            if layer != POOL:
                x = Fire(layer, name=f"features_{at}")(x)
            else:
                x = max_pool(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        kernel_init = nn.initializers.normal(0.01)
        x = nn.Conv(self.num_classes, (1, 1), kernel_init=kernel_init, name="classifier_1")(x)
        return nn.relu(x).mean((1, 2))


def squeezenet1_1(num_classes: int = 10, image_size: int = 32) -> SqueezeNet:
    """SqueezeNet 1.1."""
    return SqueezeNet(num_classes, image_size)
