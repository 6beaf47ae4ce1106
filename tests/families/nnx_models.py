"""NNX models, written as bonsai and Flax's guides write them, small."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 12


class Mnist(nnx.Module):
    """Random numbers of dropout are given to the call."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.1)
        self.pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(8 * 8 * 4, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, rngs):
        x = self.pool(nnx.relu(self.norm1(self.drop(self.conv1(x), rngs=rngs))))
        return self.linear2(self.drop(nnx.relu(self.linear1(x.reshape(len(x), -1))), rngs=rngs))


@dataclasses.dataclass(frozen=True)
class VitConfig:
    image: int = 16
    patch: int = 4
    layers: int = 2
    heads: int = 2
    rate: float = 0.1


class Encoder(nnx.Module):
    def __init__(self, cfg, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            cfg.heads, WIDTH, dropout_rate=cfg.rate, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, WIDTH, rngs=rngs)
        )

    def __call__(self, x, rngs):
        x = x + self.attention(self.norm1(x), rngs=rngs)
        return x + self.mlp(self.norm2(x))


class Vit(nnx.Module):
    def __init__(self, cfg, rngs):
        patches = (cfg.image // cfg.patch) ** 2
        normal = jax.nn.initializers.truncated_normal(0.02)
        self.projection = nnx.Conv(3, WIDTH, (cfg.patch,) * 2, (cfg.patch,) * 2, rngs=rngs)
        self.positions = nnx.Param(normal(rngs.params(), (1, patches + 1, WIDTH), jnp.float32))
        self.token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.blocks = nnx.List([Encoder(cfg, rngs) for _ in range(cfg.layers)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.classifier = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.projection(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = jnp.tile(self.token[...], [x.shape[0], 1, 1])
        x = jnp.concatenate([token, x], 1) + self.positions[...]
        for block in self.blocks:
            x = block(x, rngs)
        return self.classifier(self.norm(x)[:, 0])


class Downsample(nnx.Module):
    def __init__(self, n, out, rngs):
        self.conv = nnx.Conv(n, out, (1, 1), (2, 2), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(out, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.conv(x))


class Basic(nnx.Module):
    def __init__(self, n, out, rngs):
        conv = partial(nnx.Conv, kernel_size=(3, 3), padding=1, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.conv0, self.bn0 = conv(n, out, strides=2 if n != out else 1), norm(out)
        self.conv1, self.bn1 = conv(out, out), norm(out)
        self.downsample = Downsample(n, out, rngs) if n != out else None

    def __call__(self, x):
        y = self.bn1(self.conv1(nnx.relu(self.bn0(self.conv0(x)))))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (7, 7), (2, 2), padding=3, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.layers = nnx.Sequential(Basic(4, 4, rngs), Basic(4, 8, rngs))
        self.fc = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.bn(self.stem(x))), (3, 3), (2, 2), ((1, 1), (1, 1)))
        return self.fc(self.layers(x).mean((1, 2)))


class ConvNextBlock(nnx.Module):
    def __init__(self, rngs):
        self.dwconv = nnx.Conv(8, 8, (7, 7), feature_group_count=8, padding=3, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.pwconv1 = nnx.Linear(8, 16, rngs=rngs)
        self.pwconv2 = nnx.Linear(16, 8, rngs=rngs)
        self.gamma = nnx.Param(1e-6 * jnp.ones((8,)))

    def __call__(self, x, key, train):
        y = self.pwconv2(nnx.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        y = y * self.gamma[...].reshape(1, 1, 1, -1)
        if train:
            y = y * jax.random.bernoulli(key, 0.9, (x.shape[0], 1, 1, 1)) / 0.9
        return x + y


class ConvNext(nnx.Module):
    """Takes a random key where it is called."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (4, 4), (4, 4), rngs=rngs)
        self.stem_norm = nnx.LayerNorm(8, rngs=rngs)
        self.blocks = nnx.List([ConvNextBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x, *, key=None, train=False):
        x = self.stem_norm(self.stem(x))
        for i, block in enumerate(self.blocks):
            x = block(x, jax.random.fold_in(key, i) if train else None, train)
        return self.head(self.norm(x.mean((1, 2))))


class MbConv(nnx.Module):
    def __init__(self, n, hidden, rngs):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = partial(nnx.BatchNorm, rngs=rngs)
        self.expand, self.bn0 = conv(n, hidden, (1, 1)), norm(hidden)
        self.depthwise = conv(hidden, hidden, (3, 3), feature_group_count=hidden)
        self.bn1 = norm(hidden)
        self.reduce = nnx.Conv(hidden, 2, (1, 1), rngs=rngs)
        self.restore = nnx.Conv(2, hidden, (1, 1), rngs=rngs)
        self.project, self.bn2 = conv(hidden, n, (1, 1)), norm(n)

    def __call__(self, x, training):
        mean = not training
        y = nnx.silu(self.bn0(self.expand(x), use_running_average=mean))
        y = nnx.silu(self.bn1(self.depthwise(y), use_running_average=mean))
        gate = self.restore(nnx.silu(self.reduce(y.mean((1, 2), keepdims=True))))
        y = self.bn2(self.project(y * nnx.sigmoid(gate)), use_running_average=mean)
        return x + y


class EfficientNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), (2, 2), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.List([MbConv(8, 16, rngs) for _ in range(2)])
        self.classifier = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x, training=False):
        x = nnx.silu(self.bn(self.stem(x), use_running_average=not training))
        for block in self.blocks:
            x = block(x, training)
        return self.classifier(x.mean((1, 2)))


def turned(x, sines, cosines):
    """RoPE of all tokens but the first: half of the channels is turned against the other half."""
    first, rest = x[:, :, :1], x[:, :, 1:]
    a, b = jnp.split(rest, 2, -1)
    rest = rest * cosines + jnp.concatenate([-b, a], -1) * sines
    return jnp.concatenate([first, rest], 2)


class Dino(nnx.Module):
    """DINOv3: registers, rotary positions, gated layers; takes and gives what its config says."""

    def __init__(self, rngs):
        self.patch = nnx.Conv(3, WIDTH, (4, 4), (4, 4), rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 16, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 16, rngs=rngs)
        self.down = nnx.Linear(16, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images):
        x = self.patch(images.transpose(0, 2, 3, 1))
        b, h, w, c = x.shape
        token = jnp.broadcast_to(self.cls_token[...], (b, 1, c))
        x = jnp.concatenate([token, x.reshape(b, h * w, c)], 1)
        angles = np.arange(h * w)[:, None] * np.tile(np.float32([1, 0.1, 0.01]), 2)[None]
        sines, cosines = (jnp.asarray(f(angles), x.dtype)[None, None] for f in (np.sin, np.cos))
        q, k, v = self.qkv(self.norm1(x)).reshape(b, -1, 3, 2, 6).transpose(2, 0, 3, 1, 4)
        q, k = turned(q, sines, cosines), turned(k, sines, cosines)
        scores = nnx.softmax(q @ k.swapaxes(2, 3) / 6**0.5)
        x = x + self.out((scores @ v).swapaxes(1, 2).reshape(b, -1, c))
        y = self.norm2(x)
        x = self.norm(x + self.down(nnx.silu(self.gate(y)) * self.up(y)))
        return {"last_hidden_state": x, "logits": self.head(x[:, 0])}


class UNet(nnx.Module):
    """Up by transposed convolutions."""

    def __init__(self, rngs):
        self.down0 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.down1 = nnx.Conv(4, 8, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(8, 4, (2, 2), (2, 2), rngs=rngs)
        self.last = nnx.Conv(8, 4, (3, 3), rngs=rngs)
        self.out = nnx.Conv(4, 10, (1, 1), rngs=rngs)

    def __call__(self, x):
        a = nnx.relu(self.bn(self.down0(x)))
        b = nnx.relu(self.down1(nnx.max_pool(a, (2, 2), (2, 2))))
        return self.out(nnx.relu(self.last(jnp.concatenate([a, self.up(b)], -1))))
