"""Where training architectures come from: a stream without end, some of it, or a file (§ 3)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.reader import DeepNets1M, read_architectures
from ghn_jax.deepnets1m.sampling import sample_architecture, seeded
from ghn_jax.training.config import TrainConfig


def architecture_source(config: TrainConfig, image_size: int) -> Callable[[int], Architecture]:
    """Position of the stream -> architecture: generated, or from a file."""
    rules, seed = config.space.rules(image_size), config.run.seed

    def generated(position: int) -> Architecture:
        return sample_architecture("train", seed, position, rules=rules)

    if config.space.nets is None:
        count = config.space.training_architectures
        return generated if count is None else _shuffled(generated, count, seed)
    if config.space.nets.suffix == ".json":
        few = list(read_architectures(config.space.nets).values())
        return lambda position: few[position % len(few)]
    nets = DeepNets1M.open(
        config.space.nets, "train", image_size=image_size, rules=rules, seed=seed
    )

    order = _orders(len(nets), seed)

    def from_file(position: int) -> Architecture:
        # Every pass over the file in an order and with widths of its own.
        epoch, place = divmod(position, len(nets))
        return nets.architecture(int(order(epoch)[place]), seed=seed + epoch)

    return from_file


def _orders(count: int, seed: int) -> Callable[[int], np.ndarray]:
    """Pass over so many architectures -> their order."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return seeded("order of nets", seed, epoch).permutation(count)

    return order


def _shuffled(
    architecture: Callable[[int], Architecture], count: int, seed: int
) -> Callable[[int], Architecture]:
    """The first architectures of a stream again and again, every pass in another order (Fig. 3)."""
    order, known = _orders(count, seed), functools.lru_cache(maxsize=1000)(architecture)

    def one(position: int) -> Architecture:
        epoch, place = divmod(position, count)
        return known(int(order(epoch)[place]))

    return one
