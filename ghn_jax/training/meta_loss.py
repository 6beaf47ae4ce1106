"""The meta-objective (paper Eq. 2), as one reads it: the definition of what `update.py` computes.

Every architecture is traced and compiled with it, so it is for reading, for small experiments, and
for checking the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.hypernet.ghn import GHN


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The mean over images, with label smoothing."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def meta_loss(
    ghn: GHN,
    params,
    architectures: Sequence[Architecture],
    images: jax.Array,
    labels: jax.Array,
    *,
    smoothing: float = 0.0,
    norm_penalty: float = 0.0,
    dropout: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """The mean loss of networks whose parameters the hypernetwork predicts, differentiable.

    Args:
      ghn, params: the hypernetwork.
      architectures: the meta-batch.
      images: (B, H, W, 3), the batch that all of them see.
      labels: (B,) classes.
      smoothing: of labels.
      norm_penalty: weight of the sum of the Frobenius norms of a network's predicted tensors, which
        GHN-3 adds to its loss.
      dropout: a key for each network's classifier; no dropout without.
    """
    losses = []
    for i, arch in enumerate(architectures):
        weights = ghn.predict({"params": params}, arch, image_size=images.shape[1])
        network = build_network(arch, ghn.num_classes, images.shape[1])
        rngs = {"dropout": dropout[i]} if dropout else {}
        logits = network.apply({"params": weights}, images, train=bool(rngs), rngs=rngs)
        norms = [jnp.linalg.norm(w.ravel()) for w in jax.tree.leaves(weights)]
        loss = cross_entropy(cast(jax.Array, logits), labels, smoothing)
        losses.append(loss + norm_penalty * sum(norms) if norm_penalty else loss)
    return jnp.stack(losses).mean()
