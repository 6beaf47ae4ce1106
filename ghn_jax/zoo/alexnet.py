"""AlexNet (Krizhevsky 2014) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.pooling import adaptive_avg_pool

GRID = 6  # height and width of what the classifier sees

_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_Conv = functools.partial(nn.Conv, kernel_init=_init)
_Dense = functools.partial(nn.Dense, kernel_init=_init)


class AlexNet(nn.Module):
    """AlexNet under torchvision's names.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        11x11 convolution has stride 1 and no max-pooling follows it.
    """

    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on dropout."""
        small = is_small(self.image_size)
        pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
        first = _Conv(64, (11, 11), 1 if small else 4, padding=2, name="features_0")
        x = nn.relu(first(images))
        x = x if small else pool(x)
        x = pool(nn.relu(_Conv(192, (5, 5), padding=2, name="features_3")(x)))
        for at, channels in ((6, 384), (8, 256), (10, 256)):
            x = nn.relu(_Conv(channels, (3, 3), padding=1, name=f"features_{at}")(x))
        x = adaptive_avg_pool(pool(x), GRID)
        # Flattened channel by channel, so that weights interchange with PyTorch.
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        for at in (1, 4):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            x = nn.relu(_Dense(4096, name=f"classifier_{at}")(x))
        return _Dense(self.num_classes, name="classifier_6")(x)


def alexnet(num_classes: int = 10, image_size: int = 32) -> AlexNet:
    """AlexNet."""
    return AlexNet(num_classes, image_size)
