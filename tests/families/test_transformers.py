"""Transformers and mixers of public Flax repositories: graphs, and that reports are true."""

import jax
import pytest
from families import transformers as nets
from families.invariants import DEAD, Case, check

ZERO = "on purpose, the model fills it with 0"
TOKEN = "concatenated to activations"
DROPOUT = {"train": True, "rngs": {"dropout": jax.random.key(1)}}
SCALE = "a scale without a norm"
PRODUCT = "a product of activations in {} is no attention"
CASES = {
    "big_vision: ViT": Case(
        nets.BigVision,
        {"conv": 19, "bias": 19, "pos_enc": 1, "sum": 6, "ln": 6, "msa": 3},
        {
            "query/bias": "combined with",
            "probe": "combined with",
            "MapHead_0/MultiHeadDotProductAttention_0/query/kernel": "as learned queries are",
            "head/kernel": ZERO,
        },
        training=DROPOUT,
    ),
    "big_vision: ViT, sines": Case(
        lambda: nets.BigVision("sincos2d", "gap"),
        {"conv": 14, "bias": 14, "ln": 5, "msa": 2, "sum": 4, "glob_avg": 1},
        {"head/kernel": ZERO},
    ),
    "vision_transformer: hybrid": Case(
        nets.Hybrid,
        {"conv": 10, "bn": 1, "bias": 9, "pos_enc": 1, "sum": 3, "ln": 3, "msa": 1},
        {"cls": TOKEN},
        ("the group or instance norm in Hybrid/GroupNorm_0",),
        call={"train": False},
        training=DROPOUT,
    ),
    "Mixer": Case(
        nets.Mixer,
        {"conv": 10, "bias": 10, "ln": 5, "sum": 4, "glob_avg": 1},
        training=DROPOUT,
    ),
    "transformers: BEiT": Case(
        nets.Beit,
        {"conv": 8, "bias": 7, "ln": 3, "msa": 1, "sum": 2, "glob_avg": 1},
        {
            "lambda_1": SCALE,
            "lambda_2": SCALE,
            "relative_position_bias_table": "added to attention's scores",
        },
    ),
    "transformers: DINO": Case(
        nets.Dino,
        {
            "conv": 8,
            "bias": 8,
            "pos_enc": 1,
            "sum": 3,
            "ln": 3,
            "msa": 1,
            "glob_avg": 1,
            "concat": 1,
        },
        {
            "cls_token": TOKEN,
            "layer_scale": SCALE,
            "mask_token": DEAD,
            "position_embeddings": "the model applies concatenate to it",
        },
    ),
    "transformers: CLIP": Case(
        nets.Clip,
        {"conv": 8, "pos_enc": 1, "sum": 3, "ln": 4, "bias": 6, "msa": 1},
        {"class_embedding": TOKEN},
        output="image_embeds",
    ),
    "jax-models: Swin": Case(
        nets.Swin,
        {"conv": 11, "bias": 10, "ln": 7, "msa": 2, "sum": 4, "glob_avg": 1},
        training={"deterministic": False, "rngs": {"dropout": jax.random.key(1)}},
    ),
    "jax-models: CaiT": Case(
        nets.Cait,
        {"conv": 10, "bias": 10, "ln": 3, "msa": 2, "sum": 1},
        {"cls_token": TOKEN, "gamma_1": SCALE},
    ),
    "jax-models: PoolFormer": Case(
        nets.PoolFormer,
        {"conv": 6, "bias": 6, "ln": 4, "avg_pool": 2, "sum": 6, "glob_avg": 1},
        {},
        ("4 times: the norm in PoolFormer/GroupNorm_0",),
    ),
    "jax-models: PVT": Case(
        nets.Pyramid,
        {"conv": 10, "bias": 11, "ln": 4, "msa": 1, "sum": 2, "sep_conv": 1, "glob_avg": 1},
    ),
    "XCiT": Case(
        nets.Xcit,
        {"conv": 4, "bias": 4, "ln": 2, "msa": 1, "sum": 1, "glob_avg": 1},
        {"temperature": "a number in Xcit"},
    ),
    "CCT": Case(
        nets.Cct,
        {"conv": 9, "max_pool": 1, "pos_enc": 1, "sum": 3, "ln": 3, "bias": 8, "msa": 1},
        {},
        (PRODUCT.format("Cct"),),
    ),
    "gMLP": Case(
        nets.Gmlp,
        {"conv": 5, "bias": 5, "ln": 2, "sum": 1, "glob_avg": 1},
        {"spatial/bias": "on purpose, the model fills it with 1"},
        ("mul of activations in Gmlp is no primitive",),
    ),
    "LambdaNet": Case(
        nets.Lambda,
        {"conv": 6, "bias": 2, "msa": 1, "sum": 2, "glob_avg": 1},
        {},
        (PRODUCT.format("Lambda/bnhk,bnkv->bnhv"),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers(name):
    check(CASES[name])
