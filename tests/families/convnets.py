"""Convolutional networks, written as public Flax repositories write them, small."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp


def pooled(x):
    return x.mean((1, 2))


# --- Flax's examples ------------------------------------------------------------------------------


class Mnist(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (4, 8):
            x = nn.avg_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(16)(x.reshape(x.shape[0], -1))))


class Bottleneck(nn.Module):
    """Layers are handed in as partials; the last norm starts at zero."""

    filters: int
    conv: Any
    norm: Any
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.conv(2 * self.filters, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(
                self.conv(2 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            )
        return self.act(x + y)


class ImageNet(nn.Module):
    """With batch norm over all devices."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="batch"
        )
        x = conv(4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), (2, 2), "SAME")
        for i in range(2):
            x = Bottleneck(4 * 2**i, conv, norm, nn.relu, strides=(1 + i, 1 + i))(x)
        return jnp.asarray(nn.Dense(10)(pooled(x)), jnp.float32)


class Vae(nn.Module):
    """Draws its code from what the encoder says; the decoder's output is the first of three."""

    @nn.compact
    def __call__(self, x, z_rng):
        h = nn.relu(nn.Dense(16, name="fc1")(x.reshape(x.shape[0], -1)))
        mean, logvar = nn.Dense(4, name="mean")(h), nn.Dense(4, name="logvar")(h)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(z_rng, mean.shape)
        return nn.Dense(10, name="fc3")(nn.relu(nn.Dense(16, name="fc2")(z))), mean, logvar


# --- big_vision -----------------------------------------------------------------------------------


class StdConv(nn.Conv):
    """Standardises its kernel."""

    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        if name == "kernel":
            value = value - jnp.mean(value, (0, 1, 2), keepdims=True)
            value = value / (jnp.std(value, (0, 1, 2), keepdims=True) + 1e-5)
        return value


class Bit(nn.Module):
    """Group norms before activations; the logits come with all that was computed."""

    @nn.compact
    def __call__(self, x, *, train=False):
        out = {}
        x = StdConv(8, (3, 3), use_bias=False, name="conv_root")(x)
        x = out["root"] = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i in range(2):
            y = nn.relu(nn.GroupNorm(2, name=f"gn{i}a")(x))
            y = StdConv(8, (3, 3), use_bias=False, name=f"conv{i}a")(y)
            y = nn.relu(nn.GroupNorm(2, name=f"gn{i}b")(y))
            x = out[f"block{i}"] = x + StdConv(8, (1, 1), use_bias=False, name=f"conv{i}b")(y)
        x = out["pre_logits"] = pooled(nn.relu(nn.GroupNorm(4, name="norm")(x)))
        head = nn.Dense(10, kernel_init=nn.initializers.zeros, name="head")
        x = out["logits"] = head(x)
        return x, out


# --- jax-resnet -----------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    features: int
    kernel: int = 3
    strides: int = 1
    act: bool = True

    @nn.compact
    def __call__(self, x):
        kernel, strides = (self.kernel,) * 2, (self.strides,) * 2
        x = nn.Conv(self.features, kernel, strides, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.relu(x) if self.act else x


class SplitAttention(nn.Module):
    """As in ResNeSt: two parts of the channels, weighed against each other by their global mean."""

    features: int

    @nn.compact
    def __call__(self, x):
        b, h, w, _ = x.shape
        splits = ConvBlock(2 * self.features)(x).reshape(b, h, w, 2, self.features)
        gap = sum(splits[..., i, :] for i in range(2)).mean((1, 2), keepdims=True)
        gate = nn.Conv(2 * self.features, (1, 1))(ConvBlock(4, 1)(gap))
        gate = nn.softmax(gate.reshape(b, 1, 1, 2, self.features), -2)
        return (splits * gate).sum(-2)


class SplitBlock(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        y = SplitAttention(self.features)(ConvBlock(self.features, 1)(x))
        y = ConvBlock(2 * self.features, 1, act=False)(nn.avg_pool(y, (3, 3), (2, 2), "SAME"))
        x = nn.avg_pool(x, (2, 2), (2, 2), "SAME")  # of ResNet-D
        return nn.relu(y + ConvBlock(2 * self.features, 1, act=False)(x))


def resnest():
    """Modules and functions one after another."""
    pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME")
    stem = [ConvBlock(4, strides=2), ConvBlock(8), pool]
    return nn.Sequential([*stem, SplitBlock(8), functools.partial(jnp.mean, axis=(1, 2)),
                          nn.Dense(10)])  # fmt: skip


# --- flaxmodels -----------------------------------------------------------------------------------


class Vgg(nn.Module):
    """Returns probabilities, or what all layers computed."""

    output: str = "softmax"

    @nn.compact
    def __call__(self, x, train=True):
        act = {}
        mean = jnp.array([0.485, 0.456, 0.406]).reshape((1, 1, 1, -1))
        x = (x - mean) / jnp.array([0.229, 0.224, 0.225]).reshape((1, 1, 1, -1))
        for i in range(2):
            x = act[f"conv{i}"] = nn.Conv(8, (3, 3))(x)
            x = act[f"relu{i}"] = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = act["fc6"] = nn.relu(nn.Dense(16)(x.reshape((-1, x.shape[1] * x.shape[2] * 8))))
        x = act["fc7"] = nn.Dense(10)(nn.Dropout(0.5, deterministic=not train)(x))
        return nn.softmax(x) if self.output == "softmax" else act


# --- Others ---------------------------------------------------------------------------------------


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)

        def conv(x, features, kernel):
            return nn.relu(norm()(nn.Conv(features, kernel, use_bias=False)(x)))

        x = conv(x, 8, (3, 3))
        branches = [
            conv(x, 4, (1, 1)),
            conv(conv(conv(x, 4, (1, 1)), 4, (1, 7)), 4, (7, 1)),
            conv(nn.avg_pool(x, (3, 3), padding="SAME"), 4, (1, 1)),
            nn.max_pool(x, (3, 3), padding="SAME"),
        ]
        return nn.Dense(10)(pooled(jnp.concatenate(branches, -1)))


class EfficientNet(nn.Module):
    """Depthwise convolutions, excitation, swish, stochastic depth."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.swish(norm()(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        for _ in range(2):
            y = nn.swish(norm()(nn.Conv(16, (1, 1), use_bias=False)(x)))
            y = norm()(nn.Conv(16, (3, 3), feature_group_count=16, use_bias=False)(y))
            y = nn.swish(y)
            gate = nn.Conv(2, (1, 1))(y.mean((1, 2), keepdims=True))
            y = y * nn.sigmoid(nn.Conv(16, (1, 1))(nn.swish(gate)))
            y = norm()(nn.Conv(8, (1, 1), use_bias=False)(y))
            x = x + nn.Dropout(0.2, broadcast_dims=(1, 2, 3), deterministic=not train)(y)
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not train)(pooled(x)))


class NfNet(nn.Module):
    """No norms: kernels are standardised and scaled by gains, branches by numbers."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            kernel = self.param(f"kernel{i}", nn.initializers.he_normal(), (3, 3, x.shape[-1], 8))
            gain = self.param(f"gain{i}", nn.initializers.ones, (8,))
            mean = kernel.mean((0, 1, 2), keepdims=True)
            scale = jax.lax.rsqrt(jnp.maximum(kernel.var((0, 1, 2), keepdims=True) * 72, 1e-4))
            kernel = (kernel - mean) * (scale * gain.reshape((1, 1, 1, -1)))
            y = jax.lax.conv_general_dilated(
                nn.gelu(x) * 1.7, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = y + self.param(f"bias{i}", nn.initializers.zeros, (8,)).reshape((1, 1, 1, -1))
            skip = self.param(f"skip_gain{i}", nn.initializers.zeros, ())
            x = x + 0.2 * y * skip if i else y
        return nn.Dense(10)(pooled(x))


class FixUp(nn.Module):
    """No norms: single numbers are added and multiplied with."""

    @nn.compact
    def __call__(self, x):
        def shifted(x, name):
            return x + self.param(name, nn.initializers.zeros, (1,)).reshape((1, 1, 1, 1))

        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        y = nn.Conv(8, (3, 3), use_bias=False, name="conv1")(shifted(x, "bias1a"))
        y = nn.relu(shifted(y, "bias1b"))
        zeros = nn.initializers.zeros
        y = nn.Conv(8, (3, 3), use_bias=False, kernel_init=zeros, name="conv2")(y)
        y = y * self.param("scale", nn.initializers.ones, (1,)).reshape((1, 1, 1, 1))
        return nn.Dense(10, name="head")(pooled(nn.relu(x + shifted(y, "bias2"))))


class ShakeShake(nn.Module):
    """Two branches, in training mixed at random, another way backwards."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3))(x)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        a, b = [norm()(nn.Conv(8, (3, 3), use_bias=False)(nn.relu(x))) for _ in range(2)]
        if train:
            forth, back = jax.random.uniform(self.make_rng("shake"), (2, x.shape[0], 1, 1, 1))
            ahead, behind = (r * a + (1.0 - r) * b for r in (forth, back))
            mixed = behind + jax.lax.stop_gradient(ahead - behind)
        else:
            mixed = (a + b) * 0.5
        return nn.Dense(10)(pooled(x + mixed))


class UNet(nn.Module):
    """Down, up by a resize, and the skip; a map of classes."""

    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(4, (3, 3))(x))
        b = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(a, (2, 2), (2, 2))))
        up = jax.image.resize(b, (*a.shape[:3], 8), "bilinear")
        x = jnp.concatenate([a, nn.Conv(4, (1, 1))(up)], -1)
        return nn.Conv(10, (1, 1), name="head")(nn.relu(nn.Conv(4, (3, 3))(x)))


class RepVgg(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for _ in range(2):
            wide = norm()(nn.Conv(8, (3, 3), use_bias=False)(x))
            narrow = norm()(nn.Conv(8, (1, 1), use_bias=False)(x))
            x = nn.relu(wide + narrow + norm()(x))
        return nn.Dense(10)(pooled(x))


class Highway(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        gate = nn.sigmoid(nn.Conv(8, (3, 3), bias_init=nn.initializers.constant(-1.0))(x))
        x = nn.relu(nn.Conv(8, (3, 3))(x)) * gate + x * (1.0 - gate)
        return nn.Dense(10)(pooled(x))


class MaskedConvolutions(nn.Module):
    """As in PixelCNN: kernels see what is above alone; two halves of channels gate each other."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            mask = jnp.ones((3, 3, 1, 1)).at[2].set(0).at[1, 1 + i :].set(0)
            mask = jnp.broadcast_to(mask, (3, 3, x.shape[-1], 16))
            x = nn.Conv(16, (3, 3), mask=mask, name=f"conv{i}")(x)
            a, b = jnp.split(x, 2, -1)
            x = jnp.tanh(a) * nn.sigmoid(b)
        return nn.Conv(10, (1, 1), name="head")(x)


# --- transformers ---------------------------------------------------------------------------------


@flax.struct.dataclass
class ClassifierOutput:
    logits: jax.Array
    hidden_states: tuple | None = None


class RegNetModule(nn.Module):
    @nn.compact
    def __call__(self, pixel_values, deterministic=True, output_hidden_states=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=deterministic, momentum=0.9)(x)

        x = nn.relu(norm(nn.Conv(8, (3, 3), 2, padding=1, use_bias=False)(pixel_values)))
        hidden = (x.transpose(0, 3, 1, 2),)
        y = nn.relu(norm(nn.Conv(8, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False)(y)))
        gate = nn.avg_pool(y, y.shape[1:3], y.shape[1:3])
        y = y * nn.sigmoid(nn.Conv(8, (1, 1))(nn.relu(nn.Conv(4, (1, 1))(gate))))
        x = nn.relu(x + norm(nn.Conv(8, (1, 1), use_bias=False)(y)))
        hidden += (x.transpose(0, 3, 1, 2),)
        x = nn.avg_pool(x, x.shape[1:3], x.shape[1:3]).transpose(0, 3, 1, 2)
        logits = nn.Dense(10, name="classifier")(x[:, :, 0, 0])
        return ClassifierOutput(logits, hidden if output_hidden_states else None)


class Pretrained:
    """A module and its parameters, as Hugging Face's models hold them; takes (B, C, H, W)."""

    def __init__(self, module):
        self.module = module
