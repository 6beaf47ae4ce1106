"""Vision transformers and mixers, written as public Flax repositories write them, small."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

WIDTH = 12


def param(module, name, *shape, init=None):
    return module.param(name, init or nn.initializers.normal(), shape)


def patches(x, size=4):
    x = nn.Conv(WIDTH, (size, size), (size, size), padding="VALID", name="embedding")(x)
    return x.reshape(x.shape[0], -1, WIDTH)


class Mlp(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.width)(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        y = nn.MultiHeadDotProductAttention(2, deterministic=deterministic)(nn.LayerNorm()(x))
        x = x + nn.Dropout(0.1)(y, deterministic)
        return x + Mlp()(nn.LayerNorm()(x)), None


# --- big_vision, vision_transformer ---------------------------------------------------------------


class MapHead(nn.Module):
    """Pools by attention of a learned probe."""

    @nn.compact
    def __call__(self, x):
        probe = param(self, "probe", 1, 1, WIDTH, init=nn.initializers.xavier_uniform())
        x = nn.MultiHeadDotProductAttention(2)(jnp.tile(probe, [x.shape[0], 1, 1]), x)
        return (x + Mlp()(nn.LayerNorm()(x)))[:, 0]


class BigVision(nn.Module):
    """Scanned blocks, fixed or learned positions, a head that starts at zero; logits and a dict."""

    positions: str = "learn"
    pool: str = "map"

    @nn.compact
    def __call__(self, image, *, train=False):
        out = {}
        x = out["stem"] = patches(image)
        if self.positions == "learn":
            scale = nn.initializers.normal(stddev=1 / np.sqrt(WIDTH))
            x = x + param(self, "pos_embedding", 1, x.shape[1], WIDTH, init=scale)
        else:
            y, x_ = jnp.mgrid[:4, :4]
            omega = 1.0 / (10_000 ** jnp.linspace(0, 1, WIDTH // 4))
            angles = [g.flatten()[:, None] * omega[None] for g in (x_, y)]
            table = jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], 1)
            x = x + jnp.asarray(table, x.dtype)[None, :, :]
        block = nn.remat(Block, prevent_cse=False, static_argnums=(2,))
        keys = {"params": True, "dropout": True}
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs=keys, in_axes=nn.broadcast, length=2
        )
        x, _ = blocks(name="encoderblock")(x, not train)
        x = out["encoded"] = nn.LayerNorm(name="encoder_norm")(x)
        x = out["pre_logits"] = MapHead()(x) if self.pool == "map" else x.mean(1)
        zeros = nn.initializers.zeros
        x = out["logits"] = nn.Dense(10, name="head", kernel_init=zeros)(x)
        return x, out


class Hybrid(nn.Module):
    """A convolutional stem, a class token, positions, a layer before the head."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        x = patches(x, 2)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(cls, [x.shape[0], 1, 1]), x], axis=1)
        x = x + param(self, "pos_embedding", 1, x.shape[1], WIDTH)
        x = nn.Dropout(0.1)(x, deterministic=not train)
        x = nn.LayerNorm()(Block()(x, not train)[0])[:, 0]
        return nn.Dense(10, name="head")(nn.tanh(nn.Dense(WIDTH, name="pre_logits")(x)))


class Mixer(nn.Module):
    """Layers along the tokens, layers along the channels; whole branches are dropped."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = patches(x)
        for _ in range(2):
            y = Mlp(8)(nn.LayerNorm()(x).swapaxes(1, 2)).swapaxes(1, 2)
            keep = 1.0
            if train:
                shape = (x.shape[0], 1, 1)
                keep = jax.random.bernoulli(self.make_rng("dropout"), 0.9, shape).astype(x.dtype)
            x = x + y * keep
            x = x + Mlp()(nn.LayerNorm()(x)) * keep
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


# --- transformers ---------------------------------------------------------------------------------


class Beit(nn.Module):
    """Biases of relative positions, scaled branches, no bias of keys."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        n, heads = x.shape[1], 2
        grid = np.stack(np.divmod(np.arange(n), 4), -1)
        apart = grid[:, None] - grid[None] + 3
        index = (apart[..., 0] * 7 + apart[..., 1]).reshape(-1)
        table = param(self, "relative_position_bias_table", 49, heads)
        bias = table[index].reshape(n, n, heads).transpose(2, 0, 1)[None]
        y = nn.LayerNorm()(x)
        q, k, v = [
            nn.Dense(WIDTH, use_bias=name != "key", name=name)(y).reshape(-1, n, heads, 6)
            for name in ("query", "key", "value")
        ]
        weights = nn.dot_product_attention_weights(q, k, bias=bias)
        y = jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(-1, n, WIDTH)
        scale = 0.1 * jnp.ones((WIDTH,))
        x = x + self.param("lambda_1", lambda _: scale).reshape(1, 1, -1) * nn.Dense(WIDTH)(y)
        y = Mlp()(nn.LayerNorm()(x))
        x = x + self.param("lambda_2", lambda _: scale).reshape(1, 1, -1) * y
        return nn.Dense(10, name="classifier")(nn.LayerNorm()(x.mean(1)))


class Dino(nn.Module):
    """A token and the mean of patches; gated layers; positions for images of another size."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        cls = param(self, "cls_token", 1, 1, WIDTH)
        param(self, "mask_token", 1, WIDTH)
        table = param(self, "position_embeddings", 1, 26, WIDTH)
        grid = jax.image.resize(table[:, 1:].reshape(1, 5, 5, WIDTH), (1, 4, 4, WIDTH), "bicubic")
        positions = jnp.concatenate([table[:, :1], grid.reshape(1, 16, WIDTH)], 1)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, WIDTH)), x], 1) + positions
        y = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + y * self.param("layer_scale", nn.initializers.ones, (WIDTH,)).reshape(1, 1, -1)
        a, b = jnp.split(nn.Dense(16, name="weights_in")(nn.LayerNorm()(x)), 2, -1)
        x = nn.LayerNorm()(x + nn.Dense(WIDTH, name="weights_out")(nn.silu(a) * b))
        return nn.Dense(10)(jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], -1))


class Clip(nn.Module):
    """The vision tower: positions are looked up; a norm before; a projection."""

    @nn.compact
    def __call__(self, pixel_values):
        x = nn.Conv(WIDTH, (4, 4), (4, 4), "VALID", use_bias=False)(pixel_values)
        x = x.reshape(x.shape[0], -1, WIDTH)
        token = param(self, "class_embedding", WIDTH)
        x = jnp.concatenate([jnp.tile(token.reshape(1, 1, -1), (x.shape[0], 1, 1)), x], 1)
        ids = jnp.expand_dims(jnp.arange(17, dtype="i4"), 0)
        x = nn.LayerNorm(name="pre")(x + nn.Embed(17, WIDTH, name="position_embedding")(ids))
        x, _ = Block()(x)
        pooled = nn.LayerNorm(name="post")(x[:, 0, :])
        embeds = nn.Dense(10, use_bias=False, name="projection")(pooled)
        return {"last_hidden_state": x, "pooler_output": pooled, "image_embeds": embeds}


# --- jax-models -----------------------------------------------------------------------------------


class Swin(nn.Module):
    """Attention within windows, shifted in every other block; patches are merged."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.LayerNorm()(nn.Conv(8, (2, 2), (2, 2), name="embedding")(x))
        for shift in (0, 2):
            b, h, w, c = x.shape
            y = jnp.roll(nn.LayerNorm()(x), (-shift, -shift), (1, 2))
            y = y.reshape(b, h // 4, 4, w // 4, 4, c).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
            q, k, v = nn.Dense(3 * c)(y).reshape(-1, 16, 3, 2, c // 2).transpose(2, 0, 3, 1, 4)
            scores = q @ k.swapaxes(-1, -2)
            if shift:
                far = (np.arange(16)[:, None] // 8 != np.arange(16)[None] // 8) * -100.0
                mask = jnp.asarray(np.tile(far, (h * w // 16, 1, 1)), x.dtype)
                scores = scores.reshape(b, -1, 2, 16, 16) + mask[None, :, None]
                scores = scores.reshape(-1, 2, 16, 16)
            weights = nn.Dropout(0.1)(nn.softmax(scores), deterministic)
            y = nn.Dense(c)((weights @ v).swapaxes(1, 2).reshape(-1, 16, c))
            y = y.reshape(b, h // 4, w // 4, 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
            x = x + jnp.roll(y.reshape(b, h, w, c), (shift, shift), (1, 2))
            x = x + Mlp()(nn.LayerNorm()(x))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = nn.Dense(16, use_bias=False)(nn.LayerNorm()(jnp.concatenate(corners, -1)))
        return nn.Dense(10)(nn.LayerNorm()(x).mean((1, 2)))


class Cait(nn.Module):
    """Heads that talk to each other before and after the softmax; attention of the class token."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = patches(x)
        n = x.shape[1]
        qkv = nn.Dense(3 * WIDTH, name="qkv")(nn.LayerNorm()(x)).reshape(-1, n, 3, 2, 6)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bqkh", q, k)
        scores = nn.Dense(2, name="talk_after")(nn.softmax(nn.Dense(2, name="talk")(scores), 2))
        y = jnp.einsum("bqkh,bkhd->bqhd", scores, v).reshape(-1, n, WIDTH)
        gamma = self.param("gamma_1", nn.initializers.constant(1e-4), (1, 1, WIDTH))
        x = x + gamma * nn.Dense(WIDTH)(y)
        token = jnp.broadcast_to(param(self, "cls_token", 1, 1, WIDTH), (x.shape[0], 1, WIDTH))
        both = nn.LayerNorm()(jnp.concatenate([token, x], 1))
        token = token + nn.MultiHeadDotProductAttention(2)(both[:, :1], both)
        return nn.Dense(10)(nn.LayerNorm()(token)[:, 0])


class PoolFormer(nn.Module):
    """Pooling in place of attention, on small maps too: windows are larger than they are."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (7, 7), (8, 8), padding=[(2, 2), (2, 2)])(x)  # 2x2
        for _ in range(2):
            y = nn.GroupNorm(1)(x)
            x = x + nn.avg_pool(y, (3, 3), (1, 1), "SAME", count_include_pad=False) - y
            x = x + Mlp()(nn.GroupNorm(1)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Pyramid(nn.Module):
    """PVT's and SegFormer's attention: keys of a smaller map; the last map is a single pixel."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(patches(x))
        small = nn.Conv(WIDTH, (2, 2), (2, 2))(x.reshape(-1, 4, 4, WIDTH))
        small = nn.LayerNorm()(small.reshape(-1, 4, WIDTH))
        x = x + nn.MultiHeadDotProductAttention(2)(x, small)
        y = nn.Dense(16)(nn.LayerNorm()(x)).reshape(-1, 4, 4, 16)
        y = nn.gelu(nn.Conv(16, (3, 3), feature_group_count=16)(y)).reshape(-1, 16, 16)
        x = (x + nn.Dense(WIDTH)(y)).reshape(-1, 4, 4, WIDTH)
        x = nn.Conv(16, (4, 4), (4, 4))(x).reshape(x.shape[0], -1, 16)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Xcit(nn.Module):
    """Attention among channels, with a temperature; unit queries and keys."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        q, k, v = jnp.split(nn.Dense(3 * WIDTH)(nn.LayerNorm()(x)).swapaxes(1, 2), 3, 1)
        q, k = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
        temperature = self.param("temperature", nn.initializers.ones, (1, 1, 1))
        y = nn.softmax(q @ k.swapaxes(1, 2) * temperature) @ v
        x = x + nn.Dense(WIDTH)(y.swapaxes(1, 2))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


# --- Others ---------------------------------------------------------------------------------------


class Cct(nn.Module):
    """A convolutional tokeniser; tokens are pooled by weights of their own."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(WIDTH, (3, 3), use_bias=False)(x)), (4, 4), (4, 4))
        x = x.reshape(x.shape[0], -1, WIDTH)
        x, _ = Block()(x + param(self, "positions", 1, x.shape[1], WIDTH))
        x = nn.LayerNorm()(x)
        weights = nn.softmax(nn.Dense(1, name="pool")(x), 1)
        return nn.Dense(10)((weights.swapaxes(1, 2) @ x).squeeze(1))


class Gmlp(nn.Module):
    """Half of the channels gate the other half, mixed along the tokens."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        a, b = jnp.split(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))), 2, -1)
        mix = nn.Dense(x.shape[1], bias_init=nn.initializers.ones, name="spatial")
        x = x + nn.Dense(WIDTH)(a * mix(nn.LayerNorm()(b).swapaxes(1, 2)).swapaxes(1, 2))
        return nn.Dense(10)(x.mean(1))


class Lambda(nn.Module):
    """Linear functions made of the context and of positions, applied to queries."""

    @nn.compact
    def __call__(self, x):
        x = patches(x)
        q = nn.Dense(8, use_bias=False, name="q")(x).reshape(-1, 16, 2, 4)
        k = nn.softmax(nn.Dense(4, use_bias=False, name="k")(x), 1)
        v = nn.Dense(6, use_bias=False, name="v")(x)
        content = jnp.einsum("bmk,bmv->bkv", k, v)
        positions = jnp.einsum("nmk,bmv->bnkv", param(self, "embedding_", 16, 16, 4), v)
        y = jnp.einsum("bnhk,bkv->bnhv", q, content) + jnp.einsum("bnhk,bnkv->bnhv", q, positions)
        return nn.Dense(10)((x + y.reshape(-1, 16, 12)).mean(1))
