"""Well-known networks as Flax modules under torchvision's names.

model = ghn_jax.zoo.resnet50(num_classes=10, image_size=32)
logits = model.apply(variables, images)
state_dict = ghn_jax.to_torch(variables, model)
"""

from ghn_jax.zoo.resnet import resnet18, resnet34, resnet50, resnet101, wide_resnet50_2
from ghn_jax.zoo.vgg import vgg11_bn

__all__ = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "vgg11_bn",
    "wide_resnet50_2",
]
