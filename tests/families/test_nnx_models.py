"""NNX models of public repositories: their graphs, and that reports are true."""

import jax
import jax.numpy as jnp
import pytest
from families import nnx_models as nets
from families.invariants import Case, check
from flax import nnx

SCALE = "a scale without a norm"
TOKEN = "concatenated to activations"


def of(net):
    return lambda: net(nnx.Rngs(0))


def vit(training):
    model = nets.Vit(nets.VitConfig(), nnx.Rngs(0))
    model.train() if training else model.eval()
    return model


CASES = {
    "Flax: MNIST": Case(
        of(nets.Mnist),
        {"conv": 3, "bias": 3, "bn": 1, "avg_pool": 1},
        call={"rngs": nnx.Rngs(1)},
    ),
    "bonsai: ViT": Case(
        lambda: vit(True),
        {"conv": 14, "bias": 14, "pos_enc": 1, "sum": 5, "ln": 5, "msa": 2},
        {"token": TOKEN},
        call={"rngs": nnx.Rngs(1)},
    ),
    "bonsai: ViT, evaluated": Case(
        lambda: vit(False),
        {"conv": 14, "bias": 14, "pos_enc": 1, "sum": 5, "ln": 5, "msa": 2},
        {"token": TOKEN},
    ),
    "bonsai: ResNet": Case(
        of(nets.ResNet),
        {"conv": 7, "bn": 6, "max_pool": 1, "sum": 2, "glob_avg": 1, "bias": 1},
    ),
    "bonsai: ConvNeXt": Case(
        of(nets.ConvNext),
        {"conv": 6, "bias": 8, "ln": 4, "sep_conv": 2, "sum": 2, "glob_avg": 1},
        {"gamma": SCALE},
        training={"train": True, "key": jax.random.key(0)},
    ),
    "bonsai: EfficientNet": Case(
        of(nets.EfficientNet),
        {"conv": 10, "bn": 7, "sep_conv": 2, "bias": 5, "cse": 2, "sum": 2, "glob_avg": 1},
        training={"training": True},
    ),
    "bonsai: DINOv3": Case(
        of(nets.Dino),
        {"conv": 7, "bias": 6, "ln": 3, "msa": 1, "sum": 2},
        {"cls_token": TOKEN},
        ("mul of activations in the model is no primitive",),
        sample=jax.ShapeDtypeStruct((2, 3, 16, 16), jnp.float32),
    ),
    "bonsai: U-Net": Case(
        of(nets.UNet),
        {"conv": 5, "bias": 5, "bn": 1, "max_pool": 1, "concat": 1},
        {},
        ("the transposed convolution in up",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_nnx_models(name):
    check(CASES[name])
