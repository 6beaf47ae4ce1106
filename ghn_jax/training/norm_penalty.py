"""The sum of the norms of predicted tensors, which GHN-3 adds to its loss (arXiv:2303.04143).

A tensor repeats its tile along channels, so its norm follows from the tile and from how often each
channel is repeated: numbers, not programs, depend on the networks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.deepnets1m.graph import PRIMITIVES, Graph
from ghn_jax.hypernet.tiling import TileKind, weight_scale


def node_norms(
    graph: Graph, node: int, kind: TileKind, normalise: bool, fan: str = "in"
) -> np.ndarray:
    """What the norms of a node's tensors depend on beside its tile.

    Returns:
      (4,) float32: output and input channels, and factors of the norms. A weight has one; a vector
      one for each row of its tile, of which a bias reads the second.
    """
    shape = graph.param_shapes[node] or ()
    sizes = shape[0], (*shape, 1)[1]
    if kind.decoder == "vector":
        factors = float(PRIMITIVES[graph.primitives[node]] in ("bn", "ln")), 1.0
    elif kind.decoder in ("classifier_bias", "position", "scale") or not normalise:
        factors = 1.0, 0.0
    else:
        factors = weight_scale(shape, fan), 0.0
    return np.array([*sizes, *factors], np.float32)


def _repeats(have: int, size: jax.Array) -> jax.Array:
    """(have,) how often each channel of a tile is in an axis of some size."""
    return jnp.maximum(0, jnp.ceil((size - jnp.arange(have)) / have))


def sum_of_norms(tiles: jax.Array, norms: jax.Array, kind: TileKind) -> jax.Array:
    """The sum of the Frobenius norms of tensors.

    Args:
      tiles: (n, ...) of one kind, behind `tiling.squash` where parameters are normalised.
      norms: (n, 4) from `node_norms`, zeros for tiles that nobody uses.
      kind: of the tiles.
    """

    def one(tile, norm):
        out, in_, factors = norm[0], norm[1], norm[2:]
        squares = tile**2
        if kind.decoder == "position":
            squares = squares * _repeats(tile.shape[-1], in_)
        else:
            squares = squares * _repeats(tile.shape[-1], out)
        if kind.decoder in ("kernel", "classifier"):
            squares = squares * _repeats(tile.shape[-2], in_)[:, None]
        if kind.decoder == "vector":
            sums = squares.sum(-1)
        else:
            sums, factors = squares.sum()[None], factors[:1]
        positive = sums > 0  # the root of 0 has no derivative
        roots = jnp.where(positive, jnp.sqrt(jnp.where(positive, sums, 1)), 0)
        return (roots * factors).sum()

    return jax.vmap(one)(tiles, norms).sum()
