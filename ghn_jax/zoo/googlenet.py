"""GoogLeNet (Szegedy et al. 2015) as torchvision has it: batch norm, no auxiliary heads."""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.pooling import max_pool

# (1x1, 3x3's 1x1, 3x3, 5x5's 1x1, 5x5, pooling's 1x1): channels of a block's convolutions
Widths = tuple[int, int, int, int, int, int]
# By name; an int is max-pooling of that size between them.
BLOCKS: tuple[tuple[str, Widths] | Literal[2, 3], ...] = (
    ("3a", (64, 96, 128, 16, 32, 32)),
    ("3b", (128, 128, 192, 32, 96, 64)),
    3,
    ("4a", (192, 96, 208, 16, 48, 64)),
    ("4b", (160, 112, 224, 24, 64, 64)),
    ("4c", (128, 128, 256, 24, 64, 64)),
    ("4d", (112, 144, 288, 32, 64, 64)),
    ("4e", (256, 160, 320, 32, 128, 128)),
    2,
    ("5a", (256, 160, 320, 32, 128, 128)),
    ("5b", (384, 192, 384, 48, 128, 128)),
)

_init = nn.initializers.normal(0.01)


class BasicConv(nn.Module):
    """Convolution, batch norm and ReLU.

    Attributes:
      channels: of the output.
      kernel: height and width.
      stride: of the convolution.
    """

    channels: int
    kernel: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        k = self.kernel
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=_init, name="conv")
        x = conv(self.channels, (k, k), self.stride, padding=k // 2)(x)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        return nn.relu(norm(epsilon=1e-3, name="bn")(x))


class Inception(nn.Module):
    """Convolutions of several sizes and max-pooling beside each other.

    Attributes:
      widths: channels of its convolutions.
    """

    widths: Widths

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, C')."""
        one, three_in, three, five_in, five, pooled = self.widths
        y1 = BasicConv(one, name="branch1")(x, train=train)
        y2 = BasicConv(three_in, name="branch2_0")(x, train=train)
        y2 = BasicConv(three, 3, name="branch2_1")(y2, train=train)
        y3 = BasicConv(five_in, name="branch3_0")(x, train=train)
        # 3x3 where the paper has 5x5: torchvision's bug, which its weights are of.
        y3 = BasicConv(five, 3, name="branch3_1")(y3, train=train)
        y4 = nn.max_pool(x, (3, 3), padding=((1, 1), (1, 1)))
        y4 = BasicConv(pooled, name="branch4_1")(y4, train=train)
        return jnp.concatenate([y1, y2, y3, y4], axis=-1)


class GoogLeNet(nn.Module):
    """GoogLeNet under torchvision's names, without the auxiliary heads aux1 and aux2.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) no
        max-pooling follows the first convolution, which keeps its stride, as in the authors' code.
    """

    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train`: batch statistics and dropout."""
        x = BasicConv(64, 7, 2, name="conv1")(images, train=train)
        x = x if is_small(self.image_size) else max_pool(x)
        x = BasicConv(64, name="conv2")(x, train=train)
        x = max_pool(BasicConv(192, 3, name="conv3")(x, train=train))
        for block in BLOCKS:
            if isinstance(block, int):
                x = max_pool(x, block)
            else:
                x = Inception(block[1], name=f"inception{block[0]}")(x, train=train)
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, kernel_init=_init, name="fc")(x)


def googlenet(num_classes: int = 10, image_size: int = 32) -> GoogLeNet:
    """GoogLeNet."""
    return GoogLeNet(num_classes, image_size)
