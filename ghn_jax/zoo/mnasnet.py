"""MNASNet-B1 (Tan et al. 2019) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small

# (kernel, stride of the first, expansion, blocks) of each stack
STACKS = ((3, 2, 3, 3), (5, 2, 3, 3), (5, 2, 6, 3), (3, 1, 6, 2), (5, 2, 6, 4), (3, 1, 6, 1))

_Conv = functools.partial(
    nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal")
)
# TensorFlow's share of the old statistics.
_BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9997)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and linear projection, beside a shortcut where one fits.

    Attributes:
      channels: of the output.
      kernel: height and width of the depthwise one.
      stride: of the depthwise convolution.
      expansion: hidden channels per input channel.
    """

    channels: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        norm = functools.partial(_BatchNorm, use_running_average=not train)
        hidden, k = x.shape[-1] * self.expansion, self.kernel
        y = nn.relu(norm(name="layers_1")(_Conv(hidden, (1, 1), name="layers_0")(x)))
        depthwise = functools.partial(_Conv, padding=k // 2, feature_group_count=hidden)
        y = depthwise(hidden, (k, k), self.stride, name="layers_3")(y)
        y = nn.relu(norm(name="layers_4")(y))
        y = norm(name="layers_7")(_Conv(self.channels, (1, 1), name="layers_6")(y))
        return x + y if self.stride == 1 and x.shape == y.shape else y


class MNASNet(nn.Module):
    """MNASNet under torchvision's names.

    Attributes:
      widths: channels of the first convolution, of the separable one after it, and of each stack.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        convolution has stride 1.
    """

    widths: tuple[int, ...]
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train`: batch statistics and dropout."""
        norm = functools.partial(_BatchNorm, use_running_average=not train)
        first, second, *widths = self.widths
        stride = 1 if is_small(self.image_size) else 2
        x = _Conv(first, (3, 3), stride, padding=1, name="layers_0")(images)
        x = nn.relu(norm(name="layers_1")(x))
        x = _Conv(first, (3, 3), padding=1, feature_group_count=first, name="layers_3")(x)
        x = nn.relu(norm(name="layers_4")(x))
        x = norm(name="layers_7")(_Conv(second, (1, 1), name="layers_6")(x))
        for at, (stack, channels) in enumerate(zip(STACKS, widths, strict=True), 8):
            kernel, stride, expansion, blocks = stack
            for i in range(blocks):
                s, name = 1 if i else stride, f"layers_{at}_{i}"
                x = InvertedResidual(channels, kernel, s, expansion, name=name)(x, train=train)
        x = _Conv(1280, (1, 1), name="layers_14")(x)
        x = nn.relu(norm(name="layers_15")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_out", "uniform")
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="classifier_1")(x)


def mnasnet0_5(num_classes: int = 10, image_size: int = 32) -> MNASNet:
    """MNASNet of half the width."""
    return MNASNet((16, 8, 16, 24, 40, 48, 96, 160), num_classes, image_size)


def mnasnet1_0(num_classes: int = 10, image_size: int = 32) -> MNASNet:
    """MNASNet."""
    return MNASNet((32, 16, 24, 40, 80, 96, 192, 320), num_classes, image_size)
