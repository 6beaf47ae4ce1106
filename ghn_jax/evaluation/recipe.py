"""How networks are trained by SGD or Adam: the paper's recipes (§ 5, C.2.3) as data."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training of one network; the defaults are the paper's for CIFAR-10."""

    optimiser: Literal["sgd", "adam"] = "sgd"  # of the networks; sgd has momentum 0.9
    learning_rate: float = 0.025  # of the first update
    weight_decay: float = 3e-4  # L2, on all parameters
    batch_size: int = 96  # images in an update
    epochs: int = 50  # passes over the training images
    schedule: Literal["cosine", "exponential"] = "cosine"  # to 0, or by 0.97; at each epoch's end
    clip: float = 5.0  # largest global norm of the gradient
    smoothing: float = 0.0  # of labels; 0.1 for ImageNet
    cutout: int = 0  # height of the square that is cut out of training images, in pixels
    auxiliary: float = 0.0  # weight of the auxiliary head's loss; 0.4 for found networks
    drop_path: float = 0.0  # probability at the last epoch, growing from 0; 0.2 for found networks

    def check(self) -> None:
        """Raises ValueError for options that cannot work."""
        positive = ("learning_rate", "batch_size", "epochs", "clip")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use a number above 0")
        for name in ("weight_decay", "cutout", "auxiliary"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        for name in ("smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 to below 1")

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """The same object for the same arguments, so that its programs are compiled once."""
        return _optimizer(self, steps_per_epoch)

    def drop_probability(self, epoch: int) -> float:
        """Of an epoch, from 0: it grows linearly."""
        return self.drop_path * epoch / self.epochs


@functools.cache
def _optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    def rate(step):
        epoch = step // steps_per_epoch
        if recipe.schedule == "exponential":
            return recipe.learning_rate * 0.97**epoch
        return optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs)(epoch)

    step = optax.sgd(rate, momentum=0.9) if recipe.optimiser == "sgd" else optax.adam(rate)
    return optax.chain(optax.add_decayed_weights(recipe.weight_decay), step)


def imagenet() -> Recipe:
    """The paper's for ImageNet: one epoch."""
    return Recipe(
        learning_rate=0.1, weight_decay=3e-5, batch_size=128, epochs=1,
        schedule="exponential", smoothing=0.1,
    )  # fmt: skip


def final(epochs: int = 600) -> Recipe:
    """Of networks that a search has found (C.2.3): regularised, on CIFAR-10."""
    return Recipe(epochs=epochs, cutout=16, auxiliary=0.4, drop_path=0.2)
