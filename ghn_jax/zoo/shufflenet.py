"""ShuffleNet-V2 (Ma et al. 2018) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.zoo.adapt import is_small

DEPTHS = (4, 8, 4)  # blocks of each stage

_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=_init)


def channel_shuffle(x: jax.Array) -> jax.Array:
    """Channels of both halves in turn: (B, H, W, C) -> (B, H, W, C)."""
    return x.reshape(*x.shape[:3], 2, -1).swapaxes(3, 4).reshape(x.shape)


class ShuffleBlock(nn.Module):
    """1x1, depthwise and 1x1 convolutions of one half of the channels, shuffled with the other.

    Attributes:
      channels: of the output.
      stride: of the block; where it is 2, both halves are convolutions of all channels.
    """

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, channels)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        half, s = self.channels // 2, self.stride

        def depthwise(x: jax.Array, name: str) -> jax.Array:
            c = x.shape[-1]
            return _Conv(c, (3, 3), s, padding=1, feature_group_count=c, name=name)(x)

        if s == 1:
            kept, x = jnp.split(x, 2, axis=-1)
        else:
            kept = norm(name="branch1_1")(depthwise(x, "branch1_0"))
            kept = nn.relu(norm(name="branch1_3")(_Conv(half, (1, 1), name="branch1_2")(kept)))
        y = nn.relu(norm(name="branch2_1")(_Conv(half, (1, 1), name="branch2_0")(x)))
        y = norm(name="branch2_4")(depthwise(y, "branch2_3"))
        y = nn.relu(norm(name="branch2_6")(_Conv(half, (1, 1), name="branch2_5")(y)))
        return channel_shuffle(jnp.concatenate([kept, y], axis=-1))


class ShuffleNetV2(nn.Module):
    """ShuffleNet-V2 under torchvision's names.

    Attributes:
      widths: channels of each stage.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; for small ones (`is_small`) no
        max-pooling follows the first convolution, which keeps its stride, as in the authors' code.
    """

    widths: tuple[int, int, int]
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on batch statistics."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = _Conv(24, (3, 3), 2, padding=1, name="conv1_0")(images)
        x = nn.relu(norm(name="conv1_1")(x))
        if not is_small(self.image_size):
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, (depth, channels) in enumerate(zip(DEPTHS, self.widths, strict=True), 2):
            for i in range(depth):
                block = ShuffleBlock(channels, 1 if i else 2, name=f"stage{stage}_{i}")
                x = block(x, train=train)
        x = nn.relu(norm(name="conv5_1")(_Conv(1024, (1, 1), name="conv5_0")(x)))
        return nn.Dense(self.num_classes, kernel_init=_init, name="fc")(x.mean((1, 2)))


def shufflenet_v2_x0_5(num_classes: int = 10, image_size: int = 32) -> ShuffleNetV2:
    """ShuffleNet-V2 of half the width."""
    return ShuffleNetV2((48, 96, 192), num_classes, image_size)


def shufflenet_v2_x1_0(num_classes: int = 10, image_size: int = 32) -> ShuffleNetV2:
    """ShuffleNet-V2."""
    return ShuffleNetV2((116, 232, 464), num_classes, image_size)
