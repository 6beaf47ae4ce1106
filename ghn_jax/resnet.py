"""ResNet-50: a network outside the design space that the paper predicts parameters for (§ 5.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from ghn_jax.graph import PRIMITIVE_ID, Graph, shortest_paths
from ghn_jax.network import BatchNorm, Conv, he_init, max_pool

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and number of blocks
EXPANSION = 4


def _first_kernel(image_size: int) -> int:
    """Small images keep their resolution: a 3x3 convolution without stride, no pooling."""
    return 7 if image_size > 96 else 3


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions beside a shortcut.

    Attributes:
      width: channels of the 3x3 convolution.
      stride: of the block.
      project: a 1x1 convolution on the shortcut.
    """

    width: int
    stride: int
    project: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, 4 * width)."""
        c, s = self.width, (self.stride, self.stride)
        y = nn.relu(BatchNorm(name="bn1")(Conv(c, (1, 1), name="conv1")(x)))
        y = nn.relu(BatchNorm(name="bn2")(Conv(c, (3, 3), s, name="conv2")(y)))
        y = BatchNorm(name="bn3")(Conv(EXPANSION * c, (1, 1), name="conv3")(y))
        if self.project:
            x = Conv(EXPANSION * c, (1, 1), s, name="downsample_0")(x)
            x = BatchNorm(name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """ResNet-50 under torchvision's names, batch norm on batch statistics.

    Attributes:
      num_classes: number of classes.
      image_size: height and width of the images, in pixels; up to 96 the first layers keep the
        resolution, as in the paper's CIFAR-10 experiments.
    """

    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` changes nothing."""
        k = _first_kernel(self.image_size)
        x = Conv(64, (k, k), (2, 2) if k == 7 else (1, 1), name="conv1")(images)
        x = nn.relu(BatchNorm(name="bn1")(x))
        x = max_pool(x, 2) if k == 7 else x
        for i, (width, blocks) in enumerate(STAGES):
            for j in range(blocks):
                stride = 2 if i and not j else 1
                x = Bottleneck(width, stride, not j, name=f"layer{i + 1}_{j}")(x)
        return nn.Dense(self.num_classes, name="fc", kernel_init=he_init)(x.mean((1, 2)))


def resnet50_graph(
    virtual_edges: int = 50, *, num_classes: int = 10, image_size: int = 32
) -> Graph:
    """The computational graph of `ResNet50`, for `GHN.predict` and `GHN.embed`.

    Args:
      virtual_edges: see `build_graph`.
      num_classes, image_size: of the network.
    """
    rows: list[tuple[str, str, tuple[int, ...] | None, list[int]]] = []

    def add(primitive, name, shape, *sources):
        rows.append((primitive, name or primitive, shape, list(sources)))
        return len(rows) - 1

    def conv_norm(conv, bn, shape, source):
        return add("bn", f"{bn}.weight", shape[:1], add("conv", f"{conv}.weight", shape, source))

    k = _first_kernel(image_size)
    x = conv_norm("conv1", "bn1", (64, 3, k, k), add("input", "", None))
    if k == 7:
        x = add("max_pool", "", (1, 1, 3, 3), x)
    channels = 64
    for i, (width, blocks) in enumerate(STAGES):
        for j in range(blocks):
            at, out, shortcut = f"layer{i + 1}.{j}", EXPANSION * width, x
            if not j:
                names = f"{at}.downsample.0", f"{at}.downsample.1"
                shortcut = conv_norm(*names, (out, channels, 1, 1), x)
            shapes = (width, channels, 1, 1), (width, width, 3, 3), (out, width, 1, 1)
            y = x
            for n, shape in enumerate(shapes, 1):
                y = conv_norm(f"{at}.conv{n}", f"{at}.bn{n}", shape, y)
            x, channels = add("sum", "", None, shortcut, y), out
    weight = add("conv", "fc.weight", (num_classes, channels), add("glob_avg", "", None, x))
    add("bias", "fc.bias", (num_classes,), weight)
    return Graph(
        primitives=np.array([PRIMITIVE_ID[row[0]] for row in rows], np.int32),
        edges=shortest_paths([row[3] for row in rows], virtual_edges),
        param_shapes=[row[2] for row in rows],
        names=[row[1] for row in rows],
        cells=np.zeros(len(rows), np.int32),
    )
