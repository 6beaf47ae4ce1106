"""DenseNet (Huang et al. 2017) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.zoo.adapt import is_small

GROWTH = 32  # channels that a layer adds
BOTTLENECK = 4 * GROWTH

_Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 and batch norm, ReLU, 3x3 convolution."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, 32), the new channels."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="norm1")(x))
        x = _Conv(BOTTLENECK, (1, 1), name="conv1")(x)
        x = nn.relu(norm(name="norm2")(x))
        return _Conv(GROWTH, (3, 3), padding=1, name="conv2")(x)


class DenseBlock(nn.Module):
    """Layers that each see the channels of all before.

    Attributes:
      layers: their number.
    """

    layers: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C + 32 * layers)."""
        # One concatenation of all features for each layer, as in torchvision: that is what the
        # computational graph has.
        features = [x]
        for i in range(self.layers):
            x = jnp.concatenate(features, axis=-1)
            features.append(DenseLayer(name=f"denselayer{i + 1}")(x, train=train))
        return jnp.concatenate(features, axis=-1)


class Transition(nn.Module):
    """Halves channels and resolution."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / 2, W / 2, C / 2)."""
        c = x.shape[-1]
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = _Conv(c // 2, (1, 1), name="conv")(x)
        return nn.avg_pool(x, (2, 2), (2, 2))


class Features(nn.Module):
    """All of DenseNet but its classifier; attributes as in `DenseNet`."""

    blocks: tuple[int, ...]
    image_size: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, 3) -> (B, H', W', C)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        if is_small(self.image_size):
            x = _Conv(64, (3, 3), padding=1, name="conv0")(x)
        else:
            x = _Conv(64, (7, 7), 2, padding=3, name="conv0")(x)
        x = nn.relu(norm(name="norm0")(x))
        if not is_small(self.image_size):
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, layers in enumerate(self.blocks, 1):
            x = DenseBlock(layers, name=f"denseblock{i}")(x, train=train)
            if i < len(self.blocks):
                x = Transition(name=f"transition{i}")(x, train=train)
        return nn.relu(norm(name="norm5")(x))


class DenseNet(nn.Module):
    """A densely connected network under torchvision's names.

    Attributes:
      blocks: layers of each dense block.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; small ones (`is_small`) keep their
        resolution: a 3x3 convolution without stride, no max-pooling.
    """

    blocks: tuple[int, ...]
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on batch statistics."""
        x = Features(self.blocks, self.image_size, name="features")(images, train=train)
        x = x.mean((1, 2))
        return nn.Dense(self.num_classes, kernel_init=_dense_init, name="classifier")(x)


def densenet121(num_classes: int = 10, image_size: int = 32) -> DenseNet:
    """DenseNet-121."""
    return DenseNet((6, 12, 24, 16), num_classes, image_size)
