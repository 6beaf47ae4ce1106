"""VGG (Simonyan & Zisserman 2015) with batch norm, as torchvision has it."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.pooling import adaptive_avg_pool

Layer = int | Literal["pool"]
POOL: Literal["pool"] = "pool"
VGG11: tuple[Layer, ...] = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
GRID = 7  # height and width of what the classifier sees

_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_dense_init = nn.initializers.normal(0.01)


class VGG(nn.Module):
    """A VGG network under torchvision's names.

    Attributes:
      layers: channels of each 3x3 convolution, 'pool' for max-pooling.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; small ones (`is_small`) pass the first
        two max-poolings over.
    """

    layers: tuple[Layer, ...] = VGG11
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on batch statistics, dropout."""
        x, at = images, 0  # at: place in torchvision's sequence
        for layer in self.layers:
            if layer == POOL:
                if not (is_small(self.image_size) and at < 10):
                    x = nn.max_pool(x, (2, 2), (2, 2))
                at += 1
            else:
                name, norm = f"features_{at}", f"features_{at + 1}"
                x = nn.Conv(layer, (3, 3), padding=1, kernel_init=_conv_init, name=name)(x)
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=norm)(x)
                x = nn.relu(x)
                at += 3
        x = adaptive_avg_pool(x, GRID)
        # Flattened channel by channel, so that weights interchange with PyTorch.
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        for i in (0, 3):
            x = nn.relu(nn.Dense(4096, kernel_init=_dense_init, name=f"classifier_{i}")(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=_dense_init, name="classifier_6")(x)


def vgg11_bn(num_classes: int = 10, image_size: int = 32) -> VGG:
    """VGG-11 with batch norm."""
    return VGG(VGG11, num_classes, image_size)
