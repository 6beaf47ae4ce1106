"""Where training begins: predicted layers that hand their channels on.

At its random start a hypernetwork predicts layers that mix channels at random, and every
architecture mixes them in another way; a classifier that is right for one is wrong for the next. If
kernels begin as the identity and some noise, a channel means the same in all networks and at all
depths, and what is learned for one serves all.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ghn_jax.hypernet.ghn import GHN


def check_identity(ghn: GHN, amount: float) -> None:
    """Raises ValueError where kernels cannot begin near the identity."""
    if amount and ghn.decoder != "conv":
        raise ValueError(
            f"--identity is {amount}, but a decoder {ghn.decoder!r} cannot begin near the "
            "identity; allowed: 0, or --decoder conv"
        )


def near_identity(ghn: GHN, params: Any, amount: float) -> Any:
    """Parameters of a hypernetwork, with an identity added to all kernels that it predicts.

    It is in the bias of the decoder's last layer, so that a kernel of k x k positions begins as a
    mean over them; wider kernels repeat it (B.1).

    Args:
      ghn: the hypernetwork.
      params: its parameters as they are at random, where numbers of tiles have a deviation of 0.1.
      amount: on the diagonals of tiles, (in, out) channels.

    Raises:
      ValueError: the decoder has no such bias.
    """
    check_identity(ghn, amount)
    if not amount:
        return params
    out, in_ = ghn.max_shape[:2]
    layer = params["decoder"]["conv_1"]
    bias = layer["bias"] + amount * jnp.eye(in_, out).ravel()
    return {**params, "decoder": {**params["decoder"], "conv_1": {**layer, "bias": bias}}}
