"""Well-known networks as Flax modules under torchvision's names.

model = ghn_jax.zoo.resnet50(num_classes=10, image_size=32)
variables = model.init(key, images)
logits = model.apply(variables, images)
state_dict = ghn_jax.to_torch(variables, model)

Every constructor takes num_classes and image_size. Images of up to 96 pixels change the first
layers (`adapt`), as the paper's CIFAR-10 experiments do.
"""

from ghn_jax.zoo.alexnet import AlexNet, alexnet
from ghn_jax.zoo.convnext import ConvNeXt, convnext_small, convnext_tiny
from ghn_jax.zoo.densenet import DenseNet, densenet121
from ghn_jax.zoo.efficientnet import EfficientNet, efficientnet_b0
from ghn_jax.zoo.googlenet import GoogLeNet, googlenet
from ghn_jax.zoo.mnasnet import MNASNet, mnasnet0_5, mnasnet1_0
from ghn_jax.zoo.mobilenet import MobileNetV2, mobilenet_v2
from ghn_jax.zoo.mobilenet_v3 import MobileNetV3, mobilenet_v3_large, mobilenet_v3_small
from ghn_jax.zoo.regnet import RegNet, regnet_y_8gf, regnet_y_400mf
from ghn_jax.zoo.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnext50_32x4d,
    wide_resnet50_2,
)
from ghn_jax.zoo.shufflenet import ShuffleNetV2, shufflenet_v2_x0_5, shufflenet_v2_x1_0
from ghn_jax.zoo.squeezenet import SqueezeNet, squeezenet1_1
from ghn_jax.zoo.swin import SwinTransformer, swin_t
from ghn_jax.zoo.vgg import VGG, vgg11_bn
from ghn_jax.zoo.vit import VisionTransformer, vit_b_16, vit_s_16

MODELS = {
    constructor.__name__: constructor
    for constructor in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        wide_resnet50_2,
        resnext50_32x4d,
        vgg11_bn,
        alexnet,
        googlenet,
        mobilenet_v2,
        mobilenet_v3_small,
        mobilenet_v3_large,
        mnasnet0_5,
        mnasnet1_0,
        shufflenet_v2_x0_5,
        shufflenet_v2_x1_0,
        densenet121,
        squeezenet1_1,
        efficientnet_b0,
        regnet_y_400mf,
        regnet_y_8gf,
        convnext_tiny,
        convnext_small,
        vit_s_16,
        vit_b_16,
        swin_t,
    )
}  # torchvision's name -> constructor

Model = (
    AlexNet
    | ConvNeXt
    | DenseNet
    | EfficientNet
    | GoogLeNet
    | MNASNet
    | MobileNetV2
    | MobileNetV3
    | RegNet
    | ResNet
    | ShuffleNetV2
    | SqueezeNet
    | SwinTransformer
    | VGG
    | VisionTransformer
)

__all__ = [
    "MODELS",
    "Model",
    "AlexNet",
    "ConvNeXt",
    "DenseNet",
    "EfficientNet",
    "GoogLeNet",
    "MNASNet",
    "MobileNetV2",
    "MobileNetV3",
    "RegNet",
    "ResNet",
    "ShuffleNetV2",
    "SqueezeNet",
    "SwinTransformer",
    "VGG",
    "VisionTransformer",
    "alexnet",
    "convnext_small",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mnasnet1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "regnet_y_8gf",
    "resnet101",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "swin_t",
    "vgg11_bn",
    "vit_b_16",
    "vit_s_16",
    "wide_resnet50_2",
]
