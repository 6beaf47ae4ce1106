"""RegNet-Y (Radosavovic et al. 2020) as torchvision has it."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from ghn_jax.zoo.adapt import is_small
from ghn_jax.zoo.squeeze_excitation import SqueezeExcitation

STEM = 32  # channels of the first convolution
SQUEEZE = 0.25  # channels that excitation squeezes to, per channel of a block's input

_Conv = functools.partial(
    nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal")
)


class Stage(NamedTuple):
    """Settings of a stage: blocks, their channels, channels of a group."""

    depth: int
    width: int
    group_width: int


def stages(
    depth: int, width: int, slope: float, step: float, group_width: int
) -> tuple[Stage, ...]:
    """The stages of a RegNet (their § 3.3): widths grow linearly, rounded to powers of `step`.

    Args:
      depth: blocks in all.
      width: channels of the first block (w_0).
      slope: by how many channels each block would be wider than the one before (w_a).
      step: how many times wider the blocks of a stage are than those of the one before (w_m).
      group_width: channels of a group, in every stage but narrower ones.
    """
    steps = np.round(np.log((width + slope * np.arange(depth)) / width) / np.log(step))
    widths = 8 * np.round(width * step**steps / 8).astype(int)
    found = []
    for channels, blocks in itertools.groupby(widths.tolist()):
        group = min(group_width, channels)
        near = max(group, (channels + group // 2) // group * group)
        near += group if near < 0.9 * channels else 0
        found.append(Stage(len(list(blocks)), near, group))
    return tuple(found)


class Transform(nn.Module):
    """1x1, grouped 3x3 (strided) convolution, squeeze and excitation, 1x1 convolution.

    Attributes:
      width: channels.
      group_width: channels of a group.
      stride: of the 3x3 convolution.
    """

    width: int
    group_width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        c = self.width
        y = nn.relu(norm(name="a_1")(_Conv(c, (1, 1), name="a_0")(x)))
        grouped = functools.partial(_Conv, padding=1, feature_group_count=c // self.group_width)
        y = nn.relu(norm(name="b_1")(grouped(c, (3, 3), self.stride, name="b_0")(y)))
        # A quarter of what comes into the block, not of its own channels.
        y = SqueezeExcitation(round(SQUEEZE * x.shape[-1]), name="se")(y)
        return norm(name="c_1")(_Conv(c, (1, 1), name="c_0")(y))


class ResidualBlock(nn.Module):
    """A `Transform`, with its attributes, beside a shortcut."""

    width: int
    group_width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        y = Transform(self.width, self.group_width, self.stride, name="f")(x, train=train)
        if x.shape[-1] != self.width or self.stride != 1:
            x = _Conv(self.width, (1, 1), self.stride, name="proj_0")(x)
            norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
            x = norm(name="proj_1")(x)
        return nn.relu(x + y)


class Blocks(nn.Module):
    """The blocks of a stage.

    Attributes:
      number: of the stage, from 1.
      stage: its settings.
      stride: of its first block.
    """

    number: int
    stage: Stage
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        for i in range(self.stage.depth):
            s, name = 1 if i else self.stride, f"block{self.number}-{i}"
            block = ResidualBlock(self.stage.width, self.stage.group_width, s, name=name)
            x = block(x, train=train)
        return x


class Trunk(nn.Module):
    """All stages.

    Attributes:
      stages: their settings.
      strides: of each.
    """

    stages: tuple[Stage, ...]
    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H', W', C')."""
        for i, (stage, stride) in enumerate(zip(self.stages, self.strides, strict=True), 1):
            x = Blocks(i, stage, stride, name=f"block{i}")(x, train=train)
        return x


class RegNet(nn.Module):
    """A RegNet with squeeze and excitation under torchvision's names.

    Attributes:
      stages: their settings (`stages`).
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) the first
        two strides are 1, as in ResNet.
    """

    stages: tuple[Stage, ...]
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on batch statistics."""
        first, *rest = (1 if is_small(self.image_size) else 2, *[2] * (len(self.stages) - 1))
        x = _Conv(STEM, (3, 3), first, padding=1, name="stem_0")(images)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="stem_1")(x))
        x = Trunk(self.stages, (first, *rest), name="trunk_output")(x, train=train)
        kernel_init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="fc")(x.mean((1, 2)))


def regnet_y_400mf(num_classes: int = 10, image_size: int = 32) -> RegNet:
    """RegNet-Y of 0.4 billion multiplications."""
    return RegNet(stages(16, 48, 27.89, 2.09, 8), num_classes, image_size)


def regnet_y_8gf(num_classes: int = 10, image_size: int = 32) -> RegNet:
    """RegNet-Y of 8 billion multiplications."""
    return RegNet(stages(17, 192, 76.82, 2.19, 56), num_classes, image_size)
