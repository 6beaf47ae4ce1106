"""MobileNet-V2 (Sandler et al. 2018) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small

# (expansion, channels, blocks, stride of the first) of each stage
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

_Conv = functools.partial(
    nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal")
)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection, beside a shortcut where one fits.

    Attributes:
      channels: of the output.
      stride: of the depthwise convolution.
      expansion: hidden channels per input channel.
    """

    channels: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        hidden, at, y = x.shape[-1] * self.expansion, 0, x
        if self.expansion > 1:
            y = _Conv(hidden, (1, 1), name="conv_0_0")(y)
            y = nn.relu6(norm(name="conv_0_1")(y))
            at = 1
        depthwise = functools.partial(_Conv, padding=1, feature_group_count=hidden)
        y = depthwise(hidden, (3, 3), self.stride, name=f"conv_{at}_0")(y)
        y = nn.relu6(norm(name=f"conv_{at}_1")(y))
        y = _Conv(self.channels, (1, 1), name=f"conv_{at + 1}")(y)
        y = norm(name=f"conv_{at + 2}")(y)
        return x + y if self.stride == 1 and x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNet-V2 under torchvision's names.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        three strides, those of torchvision's features[:5], are 1.
    """

    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train`: batch statistics and dropout."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        small = is_small(self.image_size)
        x = _Conv(32, (3, 3), 1 if small else 2, padding=1, name="features_0_0")(images)
        x = nn.relu6(norm(name="features_0_1")(x))
        at = 1
        for expansion, channels, blocks, stride in STAGES:
            for i in range(blocks):
                s = stride if i == 0 and not (small and at < 5) else 1
                x = InvertedResidual(channels, s, expansion, name=f"features_{at}")(x, train=train)
                at += 1
        x = _Conv(1280, (1, 1), name=f"features_{at}_0")(x)
        x = nn.relu6(norm(name=f"features_{at}_1")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        kernel_init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="classifier_1")(x)


def mobilenet_v2(num_classes: int = 10, image_size: int = 32) -> MobileNetV2:
    """MobileNet-V2."""
    return MobileNetV2(num_classes, image_size)
