"""Decodes the tiles of a group of architectures, as many rows as there are.

How many kernels of each size a group needs varies from batch to batch; its arrays have room for
the most. The decoder runs over them in chunks, in a loop whose length is data, so that rows that
nobody needs cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ghn_jax.decoder import Decoder
from ghn_jax.executor.branches import VECTOR
from ghn_jax.executor.program import TileRows
from ghn_jax.executor.run import CLASSIFIER_BIAS, Tiles
from ghn_jax.ghn import GHN
from ghn_jax.parameters import TileKind, squash_bias, squash_norm_weight

# Kernel positions that a chunk decodes at once: enough for the matrix products to be efficient.
_POSITIONS = 64


def _chunk(kind: TileKind, rows: int) -> int:
    """Rows decoded at once; a power of two, as the arrays' sizes are."""
    chunk = 1
    while 2 * chunk * kind.height * kind.width <= _POSITIONS and 2 * chunk <= rows:
        chunk *= 2
    return chunk


def _slice(x, start, chunk):
    return lax.dynamic_slice_in_dim(x, start, chunk, 0)


def _for_chunks(count, chunk: int, body: Callable, carry):
    """`body(start, carry)` for every chunk of the first `count` rows.

    The loop counts chunks, not rows: where `count` is the constant 1, XLA's CPU backend leaves out
    a loop of larger steps than 1 (jax 0.10.2).
    """
    chunks = (count + chunk - 1) // chunk

    def step(state):
        i, carry = state
        return i + 1, body(i * chunk, carry)

    start = (jnp.zeros_like(chunks), carry)
    return lax.while_loop(lambda s: s[0] < chunks, step, start)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def decode(
    decoder: Decoder, kind: TileKind, params, states: jax.Array, count: jax.Array
) -> jax.Array:
    """Decodes the first `count` of (n, d) node states to (n, ...) tiles; the rest are zero."""
    chunk = _chunk(kind, len(states))

    def body(start, out):
        tiles = decoder.apply(params, _slice(states, start, chunk), kind)
        return lax.dynamic_update_slice_in_dim(out, tiles, start, 0)

    shape = jax.eval_shape(lambda p, s: decoder.apply(p, s, kind), params, states)
    return _for_chunks(count, chunk, body, jnp.zeros(shape.shape, shape.dtype))


def _decode_forward(decoder, kind, params, states, count):
    return decode(decoder, kind, params, states, count), (params, states, count)


def _decode_backward(decoder, kind, residuals, g):
    params, states, count = residuals
    chunk = _chunk(kind, len(states))

    def body(start, carry):
        dparams, dstates = carry
        used = (start + jnp.arange(chunk)) < count
        part = _slice(g, start, chunk)
        # Rows beyond the last in use hold anything: a chunk may end in some.
        part = jnp.where(used.reshape(-1, *[1] * (part.ndim - 1)), part, 0)
        _, vjp = jax.vjp(
            lambda p, s: decoder.apply(p, s, kind),
            params,
            _slice(states, start, chunk),
        )
        dp, ds = vjp(part)
        dstates = lax.dynamic_update_slice_in_dim(dstates, ds, start, 0)
        return jax.tree.map(jnp.add, dparams, dp), dstates

    zeros = jax.tree.map(jnp.zeros_like, params)
    dparams, dstates = _for_chunks(count, chunk, body, (zeros, jnp.zeros_like(states)))
    return dparams, dstates, None


decode.defvjp(_decode_forward, _decode_backward)


def normalise_vectors(tiles: Tiles) -> Tiles:
    """Applies what Table 2 has for norm layers and biases; it depends on nothing but the tile."""
    scale, bias = jnp.moveaxis(tiles[VECTOR], 1, 0)
    vectors = jnp.stack([squash_norm_weight(scale, jnp), squash_bias(bias, jnp)], axis=1)
    classifier = squash_bias(tiles[CLASSIFIER_BIAS], jnp)
    return {**tiles, VECTOR: vectors, CLASSIFIER_BIAS: classifier}


def decode_tiles(ghn: GHN, variables, states: jax.Array, rows: TileRows) -> Tiles:
    """Decodes the tiles of a group of architectures.

    Args:
      ghn: the hypernetwork (static).
      variables: of the hypernetwork.
      states: (N, d) node states of the padded batch.
      rows: the nodes that need each kind of tile.

    Returns:
      Tiles by kind, vectors normalised where the hypernetwork says so; rows not in use hold
      anything.
    """
    decoder = Decoder(ghn.features, ghn.max_shape, ghn.num_classes)
    params = {"params": variables["params"]["decoder"]}
    tiles = {
        kind: decode(decoder, kind, params, states[nodes], rows.counts[kind])
        for kind, nodes in rows.nodes.items()
    }
    return normalise_vectors(tiles) if ghn.normalise else tiles
