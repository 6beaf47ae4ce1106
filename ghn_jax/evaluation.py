"""Evaluates networks with predicted parameters (paper § 5.1, C.1).

Batch norm uses the statistics of each batch of 64 images, as in the paper. A network is compiled
once and runs over the whole test set: `docs/design.md` has the measurement behind that choice.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax.architecture import DARTS, PDARTS, VIT, Architecture
from ghn_jax.ghn import GHN
from ghn_jax.images import Images, eval_batches
from ghn_jax.network import build_network


class Accuracy(NamedTuple):
    """Of one network: fractions of the images, their number, and seconds with compilation."""

    top1: float
    top5: float
    images: int
    seconds: float


@functools.partial(jax.jit, static_argnums=0)
def _count_correct(network: nn.Module, params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """(2,) how often the right class is the first, and among the first five."""
    logits = network.apply({"params": params}, images)
    # The right class's rank; a class that ties with it counts as ahead of it.
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)
    rank = (logits >= target).sum(1) - 1
    # Logits that are not finite are never right.
    rank = jnp.where(jnp.isfinite(logits).all(1), rank, logits.shape[1])
    return jnp.stack([(rank < 1).sum(), (rank < 5).sum()])


def _full(images: np.ndarray, labels: np.ndarray, size: int):
    """Repeats a last, smaller batch to full size where that leaves its statistics as they are."""
    repeats = size // len(images)
    if repeats > 1 and size % len(images) == 0:
        return np.concatenate([images] * repeats), np.concatenate([labels] * repeats), repeats
    return images, labels, 1


def evaluate_network(
    network: nn.Module, params, images: Images, *, batch_size: int = 64
) -> Accuracy:
    """Accuracy of one network on a set of images, batch norm on batch statistics.

    Args:
      network: from `build_network`.
      params: its parameters.
      images: the images.
      batch_size: images in a batch; the last batch is smaller.
    """
    start = time.perf_counter()
    correct = np.zeros(2)
    results = []
    for batch, labels in eval_batches(images, batch_size):
        batch, labels, repeats = _full(batch, labels, batch_size)
        results.append((_count_correct(network, params, batch, labels), repeats))
    for counts, repeats in results:
        correct += np.asarray(counts) / repeats
    # A program for each network: without this they would pile up.
    _count_correct.clear_cache()
    top1, top5 = correct / len(images)
    return Accuracy(float(top1), float(top5), len(images), time.perf_counter() - start)


def random_parameters(network: nn.Module, image_size: int, seed: int):
    """He-initialised parameters of a network, a pure function of the seed."""
    images = jnp.zeros((2, image_size, image_size, 3))
    return jax.jit(network.init)(jax.random.key(seed), images)["params"]


def named_architectures(width: int, n_cells: int = 8) -> dict[str, Architecture]:
    """The paper's named networks of the design space, at a small width."""
    darts = {"C": width, "n_cells": n_cells, "fc_layers": 1}
    return {
        "DARTS": Architecture(DARTS, **darts),
        "PDARTS": Architecture(PDARTS, **darts),
        "ViT": Architecture(
            VIT, n_cells=n_cells, C=width, C_mult=1, preproc=False, stem_type=0, fc_layers=1
        ),
    }


def evaluate_ghn(
    ghn: GHN,
    variables,
    architectures: Iterable[tuple[str, Architecture]],
    images: Images,
    *,
    batch_size: int = 64,
    compare_random: bool = False,
    report: Callable[[dict], None] = lambda record: None,
) -> list[dict]:
    """Predicts the parameters of architectures and evaluates them, one after another.

    Args:
      ghn, variables: the hypernetwork.
      architectures: names and architectures.
      images: the images to evaluate on.
      batch_size: images in a batch.
      compare_random: evaluate the same networks with random (He) parameters too.
      report: called with each record as soon as it is there.

    Returns:
      One record for each architecture: name, top1, top5 (fractions), images, parameters (number
      predicted), predict_seconds, evaluate_seconds, architecture (as data), and top1_random.
    """
    records = []
    for name, arch in architectures:
        start = time.perf_counter()
        params = ghn.predict(variables, arch, ghn.num_classes, images.image_size)
        jax.block_until_ready(params)
        predict_seconds = time.perf_counter() - start
        network = build_network(arch, ghn.num_classes, images.image_size)
        accuracy = evaluate_network(network, params, images, batch_size=batch_size)
        record = {
            "name": name,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "images": accuracy.images,
            "parameters": sum(p.size for p in jax.tree.leaves(params)),
            "predict_seconds": round(predict_seconds, 3),
            "evaluate_seconds": round(accuracy.seconds, 3),
            "architecture": arch.to_dict(),
        }
        if compare_random:
            random = random_parameters(network, images.image_size, seed=len(records))
            accuracy = evaluate_network(network, random, images, batch_size=batch_size)
            record["top1_random"] = accuracy.top1
        report(record)
        records.append(record)
    return records


def summary(records: list[dict], key: str = "top1") -> tuple[float, float, float]:
    """Mean, standard error and maximum of a field over records."""
    values = np.array([record[key] for record in records])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error), float(values.max())
