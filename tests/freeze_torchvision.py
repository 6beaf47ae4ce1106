"""What torchvision's models expect and compute, for tests that run without torchvision.

    python tests/freeze_torchvision.py           # writes tests/data/torchvision.json.xz
    python tests/freeze_torchvision.py swin_t    # of some models; what it has of others stays

Needs torch, torchvision and timm. For each model of the zoo, as ImageNet's (1000 classes, 224
pixels) and as CIFAR-10's (10, 32): the name and shape of every tensor of its state dict, and the
settings of every norm layer; and the logits of CIFAR-10's on `images` with the weights of
`random_variables`. Of ResNet-18, logits of larger images too, which meet its max-pooling. Of timm,
names and shapes of its vision transformers.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ghn_jax
from ghn_jax import zoo

PATH = Path(__file__).parent / "data" / "torchvision.json.xz"
IMAGENET, CIFAR10, LARGER = (1000, 224), (10, 32), (10, 128)  # classes, pixels
# One of each family and of each kind of block.
FAMILIES = [
    *("resnet18", "resnet50", "vgg11_bn", "alexnet", "googlenet", "mobilenet_v2"),
    *("mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "densenet121", "squeezenet1_1"),
    *("efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t"),
]
# Heads and features of vision transformers, and what timm calls them; torchvision has no small one.
VITS = {"vit_b_16": (12, 768), "vit_s_16": (6, 384)}
TIMM_VITS = {"vit_b_16": "vit_base_patch16_224", "vit_s_16": "vit_small_patch16_224"}


def import_torchvision():
    """torch and torchvision, which may be built for GPUs where torch is not."""
    import torch

    register = torch.library.register_fake

    def skip_missing(name, *args, **kwargs):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *args, **kwargs)

    torch.library.register_fake = skip_missing
    try:
        import torchvision
    finally:
        torch.library.register_fake = register
    return torch, torchvision


def reference(name: str, num_classes: int, image_size: int):
    """torchvision's model, for small images with the first layers changed as in the zoo."""
    torch, torchvision = import_torchvision()
    models, nn = torchvision.models, torch.nn
    if name in VITS:
        patch, (heads, features) = 16 if image_size > 96 else 4, VITS[name]
        return models.VisionTransformer(
            image_size, patch, 12, heads, features, 4 * features, num_classes=num_classes
        ).eval()
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    net = getattr(models, name)(num_classes=num_classes, **options)
    if image_size > 96:
        return net.eval()

    def first_conv():
        return nn.Conv2d(3, 64, 3, padding=1, bias=False)

    def without_stride(modules):
        for module in modules.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)

    if isinstance(net, models.ResNet):
        net.conv1, net.maxpool = first_conv(), nn.Identity()
    elif isinstance(net, models.DenseNet):
        net.features.conv0, net.features.pool0 = first_conv(), nn.Identity()
    elif isinstance(net, models.MobileNetV2 | models.MobileNetV3):
        without_stride(net.features[:5])
    elif isinstance(net, models.EfficientNet):
        without_stride(net.features[:4])
    elif isinstance(net, models.VGG):
        net.features[3] = net.features[7] = nn.Identity()
    elif isinstance(net, models.SqueezeNet):
        pass  # the authors' code leaves it as it is
    elif isinstance(net, models.ConvNeXt | models.SwinTransformer):
        without_stride(net.features[0])
    elif isinstance(net, models.AlexNet):
        net.features[0].stride, net.features[2] = (1, 1), nn.Identity()
    elif isinstance(net, models.MNASNet):
        net.layers[0].stride = (1, 1)
    elif isinstance(net, models.ShuffleNetV2):
        net.conv1.stride = 1  # as the authors' code has it: of the block, it changes nothing
        net.maxpool = nn.Identity()
    elif isinstance(net, models.GoogLeNet):
        net.conv1.stride = 1  # as well
        net.maxpool1 = nn.Identity()
    elif isinstance(net, models.RegNet):
        without_stride(net.stem)
        without_stride(net.trunk_output.block1)
    else:
        raise ValueError(f"{name} has no change for small images here; add one")
    return net.eval()


def random_variables(model: zoo.Model) -> dict:
    """Random weights and running statistics that no wrong epsilon, layout or activation survives.

    Variances go down to 1e-6 and so do those that layer norms meet first: epsilons matter.
    """
    rng = np.random.default_rng(0)
    # Drawing 130 million numbers takes longer than the network; repeating a million does not.
    numbers = rng.standard_normal(1_000_003, np.float32)
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    layer_norms = isinstance(model, zoo.ConvNeXt | zoo.VisionTransformer | zoo.SwinTransformer)
    epsilon = np.float32(1e-3 if isinstance(model, zoo.GoogLeNet | zoo.MobileNetV3) else 1e-5)

    def draw(shape):
        return np.resize(np.roll(numbers, rng.integers(len(numbers))), shape)

    def statistics(path, x):
        z = draw(x.shape)
        return 0.1 * z if path[-1].key == "mean" else 10 ** (3 * np.minimum(np.abs(z), 2) - 6)

    def parameter(path, x):
        z = draw(x.shape)
        *modules, leaf = (part.key for part in path)
        if leaf == "kernel":
            split = modules[-1] in ("query", "key", "value")
            fan_in = x.shape[0] if split else np.prod(x.shape[:-1])
            z *= np.float32(np.sqrt(2 / fan_in))
        elif leaf in ("scale", "layer_scale"):
            z = 1 + 0.1 * z
        elif leaf == "relative_position_bias_table":
            pass
        else:
            z *= 0.1
        first = (
            leaf == "pos_embedding" or not modules or modules[0] in ("conv_proj", "features_0_0")
        )
        return (1e-3 * z if layer_norms and first else z).astype(np.float32)

    variables = dict(shapes)
    if "batch_stats" in shapes:
        variables["batch_stats"] = jax.tree_util.tree_map_with_path(
            statistics, shapes["batch_stats"]
        )
    variables["params"] = jax.tree_util.tree_map_with_path(parameter, shapes["params"])

    def temper(params, stats):
        """Scales that undo the small variances, or activations would grow without end."""
        for name, value in stats.items():
            if "var" in value:
                params[name]["scale"] *= np.sqrt(value["var"] + epsilon)
            else:
                temper(params[name], value)

    temper(variables["params"], variables.get("batch_stats", {}))
    return variables


def images(image_size: int) -> np.ndarray:
    """(2, H, W, 3): two images that differ in more than noise, with patches of their own."""
    rng = np.random.default_rng(1)
    patches = rng.standard_normal((2, 4, 4, 3), np.float32)
    size = image_size // 4
    noise = rng.standard_normal((2, image_size, image_size, 3), np.float32)
    return patches.repeat(size, 1).repeat(size, 2) + 0.5 * noise


def load(net, arrays: dict[str, np.ndarray]) -> None:
    """Loads a state dict, strictly."""
    torch, _ = import_torchvision()
    state = net.state_dict()
    assert state.keys() == arrays.keys()
    state.update({k: torch.tensor(x) for k, x in arrays.items()})
    net.load_state_dict(state, strict=True)  # with its metadata: MNASNet asks for its version


def torch_logits(net, x: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) -> (B, classes)."""
    torch, _ = import_torchvision()
    with torch.no_grad():
        return net(torch.tensor(x.transpose(0, 3, 1, 2).copy())).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Relative error of the logits of two images, or that of the difference between the two.

    The larger of both: logits that hardly depend on the image hide errors.
    """

    def relative(x, y):
        return np.linalg.norm(x - y) / np.linalg.norm(y)

    return float(max(relative(a, b), relative(a[0] - a[1], b[0] - b[1])))


def describe(net) -> dict:
    """Names, shapes and settings of norm layers: (epsilon, share of the old statistics kept)."""
    norms = {}
    for name, module in net.named_modules():
        if hasattr(module, "running_mean"):
            norms[name] = [module.eps, 1 - module.momentum]
        elif "LayerNorm" in type(module).__name__:
            norms[name] = [module.eps]
    shapes = {name: list(x.shape) for name, x in net.state_dict().items()}
    return {"shapes": shapes, "norms": norms}


def random_logits(net, name: str, size: tuple[int, int]) -> list:
    """Logits of a model on `images` with the weights of `random_variables`."""
    model = zoo.MODELS[name](*size)
    load(net, ghn_jax.to_torch(random_variables(model), model))
    return torch_logits(net, images(size[1])).tolist()


def main() -> None:
    """Writes the file, or those of its entries that are named."""
    _, torchvision = import_torchvision()
    named = sys.argv[1:]
    found = json.loads(lzma.decompress(PATH.read_bytes())) if named else {}
    for name in named or zoo.MODELS:
        small = reference(name, *CIFAR10)
        found[name] = {
            "version": torchvision.__version__,
            "imagenet": describe(reference(name, *IMAGENET)),
            "cifar10": describe(small),
            "logits": {"32": random_logits(small, name, CIFAR10)},
        }
        if name == "resnet18":
            large = reference(name, *LARGER)
            found[name]["logits"]["128"] = random_logits(large, name, LARGER)
        if name in TIMM_VITS:
            import timm

            of_timm = describe(timm.create_model(TIMM_VITS[name]))["shapes"]
            found.setdefault("timm", {})[name] = of_timm
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_bytes(lzma.compress(json.dumps(found).encode(), preset=9))


if __name__ == "__main__":
    main()
