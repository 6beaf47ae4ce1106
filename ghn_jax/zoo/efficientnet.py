"""EfficientNet-B0 (Tan & Le 2019) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.squeeze_excitation import SqueezeExcitation

# (expansion, kernel, channels, blocks, stride of the first) of each stage
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
STOCHASTIC_DEPTH = 0.2  # probability that the last block is left out, growing linearly up to there

_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=_init)


class MBConv(nn.Module):
    """Expansion, depthwise convolution, squeeze & excitation, projection, beside a shortcut.

    Attributes:
      channels: of the output.
      kernel: height and width of the depthwise one.
      stride: of the depthwise convolution.
      expansion: hidden channels per input channel.
      drop: probability that training leaves the block out of an image's path.
    """

    channels: int
    kernel: int
    stride: int
    expansion: int
    drop: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        c, k = x.shape[-1], self.kernel
        hidden, at, y = c * self.expansion, 0, x
        if self.expansion > 1:
            y = _Conv(hidden, (1, 1), name="block_0_0")(y)
            y = nn.silu(norm(name="block_0_1")(y))
            at = 1
        depthwise = functools.partial(_Conv, padding=k // 2, feature_group_count=hidden)
        y = depthwise(hidden, (k, k), self.stride, name=f"block_{at}_0")(y)
        y = nn.silu(norm(name=f"block_{at}_1")(y))
        # A quarter of what comes into the block, not of the hidden channels.
        y = SqueezeExcitation(max(1, c // 4), nn.silu, name=f"block_{at + 1}")(y)
        y = _Conv(self.channels, (1, 1), name=f"block_{at + 2}_0")(y)
        y = norm(name=f"block_{at + 2}_1")(y)
        if self.stride == 1 and x.shape == y.shape:
            return x + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3), deterministic=not train)(y)
        return y


class EfficientNet(nn.Module):
    """EfficientNet-B0 under torchvision's names.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        three strides are 1, as in MobileNet-V2.
    """

    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train`: batch statistics and dropout."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        small = is_small(self.image_size)
        x = _Conv(32, (3, 3), 1 if small else 2, padding=1, name="features_0_0")(images)
        x = nn.silu(norm(name="features_0_1")(x))
        done, total = 0, sum(stage[3] for stage in STAGES)
        for at, (expansion, kernel, channels, blocks, stride) in enumerate(STAGES, 1):
            for i in range(blocks):
                s = stride if i == 0 and not (small and at < 4) else 1
                drop = STOCHASTIC_DEPTH * done / total
                block = MBConv(channels, kernel, s, expansion, drop, name=f"features_{at}_{i}")
                x = block(x, train=train)
                done += 1
        x = _Conv(1280, (1, 1), name="features_8_0")(x)
        x = nn.silu(norm(name="features_8_1")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="classifier_1")(x)


def efficientnet_b0(num_classes: int = 10, image_size: int = 32) -> EfficientNet:
    """EfficientNet-B0."""
    return EfficientNet(num_classes, image_size)
