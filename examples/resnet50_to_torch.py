"""Checkpoint in, ResNet-50 predicted, weights out, run in PyTorch: the same logits.

    python examples/resnet50_to_torch.py ghn2_cifar10.pt

Needs PyTorch (a CPU build will do). Takes under a minute on two CPU cores. The PyTorch network
below stands in for torchvision's, whose names it has.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
import torch
from torch import nn

import ghn_jax

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and number of blocks


class Bottleneck(nn.Module):
    """torchvision's bottleneck block."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = (
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        if stride != 1 or inputs != 4 * width:
            conv = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))
        else:
            self.downsample = nn.Identity()

    def forward(self, x):
        """(B, C, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def torch_resnet50(num_classes: int) -> nn.Module:
    """ResNet-50 for 32x32 images under torchvision's names."""
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    channels = 64
    for i, (width, blocks) in enumerate(STAGES):
        layer = []
        for j in range(blocks):
            layer.append(Bottleneck(channels, width, 2 if i and not j else 1))
            channels = 4 * width
        net.add_module(f"layer{i + 1}", nn.Sequential(*layer))
    net.fc = nn.Linear(channels, num_classes)
    return net


def main(checkpoint: str) -> None:
    """Predicts, exports, runs both and compares."""
    ghn, variables = ghn_jax.load_torch_ghn(checkpoint)
    network = ghn_jax.zoo.resnet50(ghn.num_classes)
    images = np.random.default_rng(0).standard_normal((64, 32, 32, 3), np.float32)
    predicted, _ = ghn_jax.predict_model(ghn, variables, network, images, strict=True)
    params = {"params": predicted["params"]}  # what batch norm estimates is not predicted
    logits = jax.jit(lambda p, x: ghn_jax.apply_on_batch(network, p, x))(params, images)

    weights = ghn_jax.to_torch(params, network)
    net = torch_resnet50(ghn.num_classes)
    result = net.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=False)
    assert all(".running_" in k or "num_batches" in k for k in result.missing_keys), result
    assert not result.unexpected_keys, result
    net.train()
    with torch.no_grad():
        x = torch.tensor(images.transpose(0, 3, 1, 2))
        x = torch.relu(net.bn1(net.conv1(x)))
        x = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        theirs = net.fc(x.mean((2, 3))).numpy()
    error = np.linalg.norm(theirs - logits) / np.linalg.norm(theirs)
    count = sum(x.size for x in weights.values())
    print(f"{count:,} parameters; logits in PyTorch and JAX differ by {error:.1e} of their norm")
    if error > 1e-3:
        sys.exit("they should agree to 1e-3")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
