"""Well-known networks as Flax modules under torchvision's names.

model = ghn_jax.zoo.resnet50(num_classes=10, image_size=32)
variables = model.init(key, images)
logits = model.apply(variables, images)
state_dict = ghn_jax.to_torch(variables, model)

Every constructor takes num_classes and image_size. Images of up to 96 pixels change the first
layers (`adapt`), as the paper's CIFAR-10 experiments do.
"""

from ghn_jax.zoo.convnext import ConvNeXt, convnext_tiny
from ghn_jax.zoo.densenet import DenseNet, densenet121
from ghn_jax.zoo.efficientnet import EfficientNet, efficientnet_b0
from ghn_jax.zoo.mobilenet import MobileNetV2, mobilenet_v2
from ghn_jax.zoo.resnet import ResNet, resnet18, resnet34, resnet50, resnet101, wide_resnet50_2
from ghn_jax.zoo.squeezenet import SqueezeNet, squeezenet1_1
from ghn_jax.zoo.vgg import VGG, vgg11_bn
from ghn_jax.zoo.vit import VisionTransformer, vit_b_16

MODELS = {
    constructor.__name__: constructor
    for constructor in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        wide_resnet50_2,
        vgg11_bn,
        mobilenet_v2,
        densenet121,
        squeezenet1_1,
        efficientnet_b0,
        convnext_tiny,
        vit_b_16,
    )
}  # torchvision's name -> constructor

Model = (
    ConvNeXt | DenseNet | EfficientNet | MobileNetV2 | ResNet | SqueezeNet | VGG | VisionTransformer
)

__all__ = [
    "MODELS",
    "ConvNeXt",
    "DenseNet",
    "EfficientNet",
    "MobileNetV2",
    "Model",
    "ResNet",
    "SqueezeNet",
    "VGG",
    "VisionTransformer",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "squeezenet1_1",
    "vgg11_bn",
    "vit_b_16",
    "wide_resnet50_2",
]
