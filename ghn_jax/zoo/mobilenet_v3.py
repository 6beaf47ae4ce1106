"""MobileNet-V3 (Howard et al. 2019) as torchvision has it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.squeeze_excitation import SqueezeExcitation

_Conv = functools.partial(
    nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal")
)
_Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
_BatchNorm = functools.partial(nn.BatchNorm, momentum=0.99, epsilon=1e-3)


class Block(NamedTuple):
    """Settings of a block.

    Attributes:
      kernel: height and width of the depthwise convolution.
      hidden: channels of that.
      channels: of the output.
      squeeze: whether there is squeeze and excitation.
      hard_swish: its activation, in place of ReLU.
      stride: of the depthwise convolution.
    """

    kernel: int
    hidden: int
    channels: int
    squeeze: bool
    hard_swish: bool
    stride: int


SMALL = (
    Block(3, 16, 16, True, False, 2),
    Block(3, 72, 24, False, False, 2),
    Block(3, 88, 24, False, False, 1),
    Block(5, 96, 40, True, True, 2),
    Block(5, 240, 40, True, True, 1),
    Block(5, 240, 40, True, True, 1),
    Block(5, 120, 48, True, True, 1),
    Block(5, 144, 48, True, True, 1),
    Block(5, 288, 96, True, True, 2),
    Block(5, 576, 96, True, True, 1),
    Block(5, 576, 96, True, True, 1),
)
LARGE = (
    Block(3, 16, 16, False, False, 1),
    Block(3, 64, 24, False, False, 2),
    Block(3, 72, 24, False, False, 1),
    Block(5, 72, 40, True, False, 2),
    Block(5, 120, 40, True, False, 1),
    Block(5, 120, 40, True, False, 1),
    Block(3, 240, 80, False, True, 2),
    Block(3, 200, 80, False, True, 1),
    Block(3, 184, 80, False, True, 1),
    Block(3, 184, 80, False, True, 1),
    Block(3, 480, 112, True, True, 1),
    Block(3, 672, 112, True, True, 1),
    Block(5, 672, 160, True, True, 2),
    Block(5, 960, 160, True, True, 1),
    Block(5, 960, 160, True, True, 1),
)


def squeezed(hidden: int) -> int:
    """About a quarter of the hidden channels: a multiple of 8, at most a tenth below it."""
    quarter = hidden // 4
    near = max(8, (quarter + 4) // 8 * 8)
    return near if near >= 0.9 * quarter else near + 8


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection, beside a shortcut.

    Attributes:
      block: its settings.
      stride: of the depthwise convolution; not the block's where images are small.
    """

    block: Block
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        norm = functools.partial(_BatchNorm, use_running_average=not train)
        hidden, k, at, y = self.block.hidden, self.block.kernel, 0, x
        activation = nn.hard_swish if self.block.hard_swish else nn.relu
        if hidden != x.shape[-1]:
            y = _Conv(hidden, (1, 1), name="block_0_0")(y)
            y = activation(norm(name="block_0_1")(y))
            at += 1
        depthwise = functools.partial(_Conv, padding=k // 2, feature_group_count=hidden)
        y = depthwise(hidden, (k, k), self.stride, name=f"block_{at}_0")(y)
        y = activation(norm(name=f"block_{at}_1")(y))
        at += 1
        if self.block.squeeze:
            excite = functools.partial(SqueezeExcitation, gate=nn.hard_sigmoid)
            y = excite(squeezed(hidden), name=f"block_{at}")(y)
            at += 1
        y = _Conv(self.block.channels, (1, 1), name=f"block_{at}_0")(y)
        y = norm(name=f"block_{at}_1")(y)
        # With another stride, what had no shortcut still has none, as in the authors' code.
        return x + y if self.block.stride == 1 and x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """MobileNet-V3 under torchvision's names.

    Attributes:
      blocks: settings of each.
      last: features before the classifier.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the strides
        of torchvision's features[:5] are 1.
    """

    blocks: tuple[Block, ...]
    last: int
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train`: batch statistics and dropout."""
        norm = functools.partial(_BatchNorm, use_running_average=not train)
        small = is_small(self.image_size)
        x = _Conv(16, (3, 3), 1 if small else 2, padding=1, name="features_0_0")(images)
        x = nn.hard_swish(norm(name="features_0_1")(x))
        for at, block in enumerate(self.blocks, 1):
            stride = 1 if small and at < 5 else block.stride
            x = InvertedResidual(block, stride, name=f"features_{at}")(x, train=train)
        at = len(self.blocks) + 1
        x = _Conv(6 * x.shape[-1], (1, 1), name=f"features_{at}_0")(x)
        x = nn.hard_swish(norm(name=f"features_{at}_1")(x)).mean((1, 2))
        x = nn.hard_swish(_Dense(self.last, name="classifier_0")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return _Dense(self.num_classes, name="classifier_3")(x)


def mobilenet_v3_small(num_classes: int = 10, image_size: int = 32) -> MobileNetV3:
    """MobileNet-V3, small."""
    return MobileNetV3(SMALL, 1024, num_classes, image_size)


def mobilenet_v3_large(num_classes: int = 10, image_size: int = 32) -> MobileNetV3:
    """MobileNet-V3, large."""
    return MobileNetV3(LARGE, 1280, num_classes, image_size)
