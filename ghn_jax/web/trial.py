"""How a network does on some of the test images."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from ghn_jax.data.images import Images
from ghn_jax.evaluation.accuracy import count_correct, full_batches, random_parameters

BATCH = 64  # images, on whose statistics batch norm runs, as in the paper
MOST_BATCHES = 8  # an answer should take seconds
SHOWN = 10  # images with their predicted classes


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A network on test images.

    Attributes:
      top1, top1_random: fractions of the images, with predicted and with He-initialised parameters.
      tested: number of images.
      chance: the accuracy of guessing.
      images: (T, S, S, 3) uint8, the first of them.
      labels, classes: of each its class, and the one that the network gives; None where its logits
        are not finite.
    """

    top1: float
    top1_random: float
    tested: int
    chance: float
    images: np.ndarray
    labels: list[str]
    classes: list[str | None]


class Tester:
    """Tests networks on some of the test images, in batches that are ready to run."""

    def __init__(self, images: Images):
        self.images = images
        batches = full_batches(images, min(BATCH, len(images)))
        self._batches = list(itertools.islice(batches, MOST_BATCHES))

    @property
    def batch_size(self) -> int:
        """Images in each batch."""
        return len(self._batches[0][0])

    def test(self, module: nn.Module, run: Callable, params) -> Trial:
        """Tests a network.

        Args:
          module: the network.
          run: of `accuracy.logits_of`.
          params: its parameters.
        """
        initial = random_parameters(module, self.images.image_size, seed=0)
        top1, tested, logits = self._top1(run(jax.device_put(params)))
        top1_random, _, _ = self._top1(run(jax.device_put(initial)))
        x, labels, _ = self._batches[0]
        name = self.images.class_name
        return Trial(
            top1=top1,
            top1_random=top1_random,
            tested=tested,
            chance=1 / self.images.num_classes,
            images=self._pixels(x[:SHOWN]),
            labels=[name(label) for label in labels[:SHOWN]],
            classes=[name(x.argmax()) if np.isfinite(x).all() else None for x in logits[:SHOWN]],
        )

    def _top1(self, run: Callable) -> tuple[float, int, np.ndarray]:
        """Top-1 of the images, how many they are, and the first batch's logits."""
        right = tested = 0
        first = None
        for x, labels, counted in self._batches:
            logits = run(x)
            first = logits if first is None else first
            right += int(count_correct(logits, labels, counted)[0])
            tested += counted
        return right / tested, tested, np.asarray(first)

    def _pixels(self, x: np.ndarray) -> np.ndarray:
        """Normalised images as they are stored, uint8."""
        shares = x * np.array(self.images.std) + np.array(self.images.mean)
        return np.clip(np.round(shares * 255), 0, 255).astype(np.uint8)
