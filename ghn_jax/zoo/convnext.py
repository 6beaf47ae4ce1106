"""ConvNeXt (Liu et al. 2022) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small

_init = nn.initializers.normal(0.02)
_Conv = functools.partial(nn.Conv, kernel_init=_init)
_Dense = functools.partial(nn.Dense, kernel_init=_init)
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class CNBlock(nn.Module):
    """7x7 depthwise convolution, layer norm and two linear layers, scaled, beside a shortcut.

    Attributes:
      drop: probability that training leaves the block out of an image's path.
    """

    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C)."""
        c = x.shape[-1]
        y = _Conv(c, (7, 7), padding=3, feature_group_count=c, name="block_0")(x)
        y = _LayerNorm(name="block_2")(y)
        y = nn.gelu(_Dense(4 * c, name="block_3")(y), approximate=False)
        y = _Dense(c, name="block_5")(y)
        y = y * self.param("layer_scale", nn.initializers.constant(1e-6), (c,))
        return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3), deterministic=not train)(y)


class ConvNeXt(nn.Module):
    """A ConvNeXt under torchvision's names.

    Attributes:
      stages: (channels, blocks) of each stage.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        4x4 convolution has stride 1.
      stochastic_depth: probability that training leaves the last block out, growing linearly up to
        there.
    """

    stages: tuple[tuple[int, int], ...]
    num_classes: int = 10
    image_size: int = 32
    stochastic_depth: float = 0.1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on stochastic depth."""
        stride = 1 if is_small(self.image_size) else 4
        first = _Conv(self.stages[0][0], (4, 4), stride, padding=0, name="features_0_0")
        x = _LayerNorm(name="features_0_1")(first(images))
        done, last = 0, sum(blocks for _, blocks in self.stages) - 1
        for i, (channels, blocks) in enumerate(self.stages):
            if i:
                x = _LayerNorm(name=f"features_{2 * i}_0")(x)
                x = _Conv(channels, (2, 2), 2, padding=0, name=f"features_{2 * i}_1")(x)
            for j in range(blocks):
                drop = self.stochastic_depth * done / last
                x = CNBlock(drop, name=f"features_{2 * i + 1}_{j}")(x, train=train)
                done += 1
        x = _LayerNorm(name="classifier_0")(x.mean((1, 2)))
        return _Dense(self.num_classes, name="classifier_2")(x)


def convnext_tiny(num_classes: int = 10, image_size: int = 32) -> ConvNeXt:
    """ConvNeXt-T."""
    return ConvNeXt(((96, 3), (192, 3), (384, 9), (768, 3)), num_classes, image_size)


def convnext_small(num_classes: int = 10, image_size: int = 32) -> ConvNeXt:
    """ConvNeXt-S."""
    return ConvNeXt(((96, 3), (192, 3), (384, 27), (768, 3)), num_classes, image_size, 0.4)
