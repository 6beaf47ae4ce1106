"""Predicts all parameters of an unmodified Flax model and prints what became of each.

python examples/predict_any_model.py [--ghn GHN] [--model resnet50] [--image-size 32]
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import tyro

import ghn_jax


def main(ghn: str = "ghn2-cifar10-small", model: str = "resnet50", image_size: int = 32) -> None:
    """Predicts the parameters of a model.

    Args:
      ghn: a folder or file, or a name; see `ghn_jax.from_pretrained`.
      model: a name of ghn_jax.zoo.
      image_size: height and width of the images, in pixels.
    """
    hypernetwork, ghn_variables = ghn_jax.from_pretrained(ghn)
    if model not in ghn_jax.zoo.MODELS:
        raise ValueError(f"no model {model!r}; allowed: {', '.join(ghn_jax.zoo.MODELS)}")
    # Any Linen module goes here, and any NNX module.
    network = ghn_jax.zoo.MODELS[model](hypernetwork.num_classes, image_size)
    sample = jnp.zeros((1, image_size, image_size, 3))

    for run in ("compiling", "warm"):
        start = time.perf_counter()
        variables, report = ghn_jax.predict_model(hypernetwork, ghn_variables, network, sample)
        jax.block_until_ready(variables)
        print(f"{run}: {time.perf_counter() - start:.2f} s")
    print(report)

    images = jax.random.normal(jax.random.key(0), (8, image_size, image_size, 3))
    # Batch norm's running averages are not predicted: it runs on the statistics of the batch.
    logits = ghn_jax.apply_on_batch(network, variables, images)
    print("logits", logits.shape)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"predict_any_model: {error}")
