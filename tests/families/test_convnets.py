"""Convolutional networks of public Flax repositories: their graphs, and that reports are true."""

import jax
import pytest
from families import convnets as nets
from families.invariants import DEAD, Case, check

ZERO = "on purpose, the model fills it with 0"
RESCALED = "rescales"
GROUPED = "group or instance norm"
STATS = {"mutable": ["batch_stats"]}
DROPOUT = {"train": True, "rngs": {"dropout": jax.random.key(1)}, **STATS}

CLASSES = "the classifier is for 4 classes"

CASES = {
    "Flax: MNIST": Case(nets.Mnist, {"conv": 4, "bias": 4, "avg_pool": 2}),
    "Flax: ImageNet": Case(
        nets.ImageNet,
        {"conv": 10, "bn": 9, "max_pool": 1, "sum": 2, "glob_avg": 1, "bias": 1},
        {"BatchNorm_2/scale": ZERO},
        call={"train": False},
        training={"train": True, **STATS},
    ),
    "Flax: VAE": Case(
        nets.Vae, {"conv": 5, "bias": 5, "sum": 1}, call={"z_rng": jax.random.key(0)}, output=0
    ),
    "Flax: VAE's mean": Case(
        nets.Vae,
        {"conv": 2, "bias": 2},
        {"mean/kernel": CLASSES, "mean/bias": CLASSES, "": DEAD},
        call={"z_rng": jax.random.key(0)},
        output=1,
    ),
    "big_vision: BiT": Case(
        nets.Bit,
        {"conv": 6, "max_pool": 1, "bn": 5, "sum": 2, "glob_avg": 1, "bias": 1},
        {"head/kernel": ZERO},
        (RESCALED, GROUPED),
    ),
    "jax-resnet: ResNeSt": Case(
        nets.resnest,
        {
            "conv": 9,
            "bn": 7,
            "max_pool": 1,
            "bias": 2,
            "cse": 1,
            "avg_pool": 2,
            "sum": 1,
            "glob_avg": 1,
        },
    ),
    "flaxmodels: VGG": Case(
        nets.Vgg, {"conv": 4, "bias": 4, "max_pool": 2}, call={"train": False}, training=DROPOUT
    ),
    "flaxmodels: VGG, activations": Case(
        lambda: nets.Vgg("activations"),
        {"conv": 4, "bias": 4, "max_pool": 2},
        call={"train": False},
        output="fc7",
    ),
    "Inception": Case(
        nets.Inception,
        {"conv": 7, "bn": 6, "avg_pool": 1, "max_pool": 1, "concat": 1, "glob_avg": 1, "bias": 1},
        training={"train": True, **STATS},
    ),
    "EfficientNet": Case(
        nets.EfficientNet,
        {"conv": 10, "bn": 7, "sep_conv": 2, "bias": 5, "cse": 2, "sum": 2, "glob_avg": 1},
        training=DROPOUT,
    ),
    "NFNet": Case(
        nets.NfNet,
        {"conv": 3, "bias": 3, "sum": 1, "glob_avg": 1},
        {
            "gain0": "combined with kernel0",
            "gain1": "combined with kernel1",
            "skip_gain0": DEAD,
            "skip_gain1": "a number in NfNet: no primitive",
        },
        (RESCALED,),
    ),
    "FixUp": Case(
        nets.FixUp,
        {"conv": 4, "sum": 1, "glob_avg": 1, "bias": 1},
        {
            "bias1a": "a number added",
            "bias1b": "a number added",
            "bias2": "a number added",
            "conv2/kernel": ZERO,
            "scale": "a number in FixUp",
        },
    ),
    "Shake-Shake": Case(nets.ShakeShake, {"conv": 4, "bias": 2, "bn": 2, "sum": 2, "glob_avg": 1}),
    "Shake-Shake, training": Case(
        nets.ShakeShake,
        {
            **{"conv": 4, "bias": 2, "bn": 2, "sum": 2, "glob_avg": 1},
            "sum": 5,
        },  # also of the two ways to mix the branches
        call={"train": True, "rngs": {"shake": jax.random.key(1)}},
    ),
    "U-Net": Case(nets.UNet, {"conv": 5, "bias": 5, "max_pool": 1, "concat": 1}),
    "RepVGG": Case(
        nets.RepVgg,
        {"conv": 6, "bn": 6, "sum": 4, "glob_avg": 1, "bias": 1},
        training={"train": True, **STATS},
    ),
    "highway": Case(
        nets.Highway,
        {"conv": 4, "bias": 4, "sum": 1, "glob_avg": 1},
        {"Conv_1/bias": "on purpose, the model fills it with -1"},
        ("mul of activations in Highway is no primitive",),
    ),
    "PixelCNN": Case(nets.MaskedConvolutions, {"conv": 3, "bias": 3}),
    "transformers: RegNet": Case(
        lambda: nets.Pretrained(nets.RegNetModule()),
        {"conv": 6, "bn": 4, "sep_conv": 1, "bias": 3, "cse": 1, "sum": 1, "glob_avg": 1},
        training={"deterministic": False, **STATS},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_convnets(name):
    check(CASES[name])
