"""ResNet (He et al. 2016), Wide ResNet (Zagoruyko & Komodakis 2016) and ResNeXt (Xie et al. 2017).

As torchvision has them.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from ghn_jax.zoo.adapt import is_small

_Conv = functools.partial(
    nn.Conv, use_bias=False, kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal")
)
_fc_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Attributes:
      planes: channels.
      stride: of the block.
      project: a 1x1 convolution on the shortcut.
      base_width, groups: as in `ResNet`; always 64 and 1 here.
    """

    planes: int
    stride: int
    project: bool
    base_width: int = 64
    groups: int = 1

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, planes)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        c, s = self.planes, self.stride
        y = _Conv(c, (3, 3), s, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = norm(name="bn2")(_Conv(c, (3, 3), padding=1, name="conv2")(y))
        if self.project:
            x = norm(name="downsample_1")(_Conv(c, (1, 1), s, name="downsample_0")(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions beside a shortcut.

    Attributes:
      planes: a quarter of the output channels.
      stride: of the block.
      project: a 1x1 convolution on the shortcut.
      base_width, groups: as in `ResNet`.
      shortcut: whether there is one, as in every ResNet; the paper compares with one without.
    """

    planes: int
    stride: int
    project: bool
    base_width: int = 64
    groups: int = 1
    shortcut: bool = True

    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, 4 * planes)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        width = self.planes * self.base_width // 64 * self.groups
        out, s = 4 * self.planes, self.stride
        y = nn.relu(norm(name="bn1")(_Conv(width, (1, 1), name="conv1")(x)))
        grouped = functools.partial(_Conv, feature_group_count=self.groups)
        y = grouped(width, (3, 3), s, padding=1, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(_Conv(out, (1, 1), name="conv3")(y))
        if not self.shortcut:
            return nn.relu(y)
        if self.project:
            x = norm(name="downsample_1")(_Conv(out, (1, 1), s, name="downsample_0")(x))
        return nn.relu(x + y)


class PlainBottleneck(Bottleneck):
    """A `Bottleneck` without its shortcut."""

    shortcut: bool = False


class ResNet(nn.Module):
    """A residual network under torchvision's names.

    Attributes:
      block: `BasicBlock` or `Bottleneck`.
      depths: blocks of each stage.
      base_width: width of the bottlenecks of the first stage (Wide ResNet-50-2: 128), per group.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; small ones (`is_small`) keep their
        resolution: a 3x3 convolution without stride, no max-pooling.
      head: whether pooling and the classifier follow; detectors read the last feature map.
      groups: of the 3x3 convolutions (ResNeXt's cardinality).
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    base_width: int = 64
    num_classes: int = 10
    image_size: int = 32
    head: bool = True
    groups: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` turns on batch statistics.

        Without `head`: -> (B, h, w, C) features.
        """
        if is_small(self.image_size):
            x = _Conv(64, (3, 3), padding=1, name="conv1")(images)
        else:
            x = _Conv(64, (7, 7), 2, padding=3, name="conv1")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")(x))
        if not is_small(self.image_size):
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, depth in enumerate(self.depths):
            planes = 64 * 2**i
            for j in range(depth):
                stride = 2 if i and not j else 1
                project = not j and (stride > 1 or x.shape[-1] != planes * self.block.expansion)
                name = f"layer{i + 1}_{j}"
                block = self.block(planes, stride, project, self.base_width, self.groups, name=name)
                x = block(x, train=train)
        if not self.head:
            return x
        return nn.Dense(self.num_classes, kernel_init=_fc_init, name="fc")(x.mean((1, 2)))


def resnet18(num_classes: int = 10, image_size: int = 32) -> ResNet:
    """ResNet-18."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, image_size=image_size)


def resnet34(num_classes: int = 10, image_size: int = 32) -> ResNet:
    """ResNet-34."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, image_size=image_size)


def resnet50(num_classes: int = 10, image_size: int = 32) -> ResNet:
    """ResNet-50."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, image_size=image_size)


def resnet101(num_classes: int = 10, image_size: int = 32) -> ResNet:
    """ResNet-101."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, image_size=image_size)


def wide_resnet50_2(num_classes: int = 10, image_size: int = 32) -> ResNet:
    """Wide ResNet-50-2: ResNet-50 with 3x3 convolutions of twice the width."""
    return ResNet(Bottleneck, (3, 4, 6, 3), 128, num_classes=num_classes, image_size=image_size)


def resnext50_32x4d(num_classes: int = 10, image_size: int = 32) -> ResNet:
    """ResNeXt-50 32x4d: ResNet-50 with 3x3 convolutions in 32 groups."""
    return ResNet(Bottleneck, (3, 4, 6, 3), 4, num_classes, image_size, groups=32)
