"""Vision transformer (Dosovitskiy et al. 2021) as torchvision has it."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ghn_jax.zoo.adapt import is_small

_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)
_Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())


class EncoderBlock(nn.Module):
    """Self-attention, then two linear layers with GELU between, each beside a shortcut.

    Attributes:
      heads: of attention.
      hidden: features between the linear layers.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, N, C) -> (B, N, C)."""
        kernel_init = nn.initializers.xavier_uniform()
        attention = nn.MultiHeadDotProductAttention(
            self.heads, kernel_init=kernel_init, name="self_attention"
        )
        x = x + attention(_LayerNorm(name="ln_1")(x))
        y = _Dense(self.hidden, name="mlp_0")(_LayerNorm(name="ln_2")(x))
        return x + _Dense(x.shape[-1], name="mlp_3")(nn.gelu(y, approximate=False))


class Layers(nn.Module):
    """The encoder's blocks; attributes as in `VisionTransformer`."""

    layers: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, N, C) -> (B, N, C)."""
        for i in range(self.layers):
            x = EncoderBlock(self.heads, self.hidden, name=f"encoder_layer_{i}")(x)
        return x


class Encoder(nn.Module):
    """Adds an embedding of each position, and applies all blocks; attributes as in `Layers`."""

    layers: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, N, C) -> (B, N, C)."""
        init = nn.initializers.normal(0.02)
        x = x + self.param("pos_embedding", init, (1, *x.shape[1:]))
        x = Layers(self.layers, self.heads, self.hidden, name="layers")(x)
        return _LayerNorm(name="ln")(x)


class Heads(nn.Module):
    """The classifier.

    Attributes:
      num_classes: number of classes.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, C) -> (B, num_classes)."""
        # Not with zeros, as in torchvision: `predict_model` leaves what is filled with them.
        init = nn.initializers.truncated_normal(0.02)
        return nn.Dense(self.num_classes, kernel_init=init, name="head")(x)


class VisionTransformer(nn.Module):
    """A vision transformer under torchvision's names.

    Attributes:
      patch: height and width of a patch, in pixels, unless images are small.
      layers: blocks of the encoder.
      heads: of attention.
      features: of a token.
      num_classes: number of classes.
      image_size: height and width of the images, in pixels, a multiple of the patch's; small ones
        (`is_small`) are cut into patches of 4x4, so that 32x32 become 64 tokens.
    """

    patch: int
    layers: int
    heads: int
    features: int
    num_classes: int = 10
    image_size: int = 32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> (B, num_classes) logits; `train` changes nothing: no dropout.

        Raises:
          ValueError: the images are not those of image_size, or no multiple of the patches.
        """
        p = 4 if is_small(self.image_size) else self.patch
        if images.shape[1:3] != (self.image_size,) * 2 or self.image_size % p:
            raise ValueError(
                f"images are {images.shape[1]}x{images.shape[2]} and image_size is "
                f"{self.image_size}; allowed: the same multiple of {p} pixels"
            )
        c, init = self.features, nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        x = nn.Conv(c, (p, p), p, padding=0, kernel_init=init, name="conv_proj")(images)
        x = x.reshape(len(x), -1, c)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c)), x], axis=1)
        x = Encoder(self.layers, self.heads, 4 * c, name="encoder")(x)
        return Heads(self.num_classes, name="heads")(x[:, 0])


def vit_b_16(num_classes: int = 10, image_size: int = 32) -> VisionTransformer:
    """ViT-B/16."""
    return VisionTransformer(16, 12, 12, 768, num_classes, image_size)


def vit_s_16(num_classes: int = 10, image_size: int = 32) -> VisionTransformer:
    """ViT-S/16 (Touvron et al. 2021), of which torchvision has none: its names, timm's numbers."""
    return VisionTransformer(16, 12, 6, 384, num_classes, image_size)
