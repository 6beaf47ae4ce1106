"""Learning curves: accuracies of networks that training never draws, on images that it never sees.

The networks come from the run's own rules, but from the random stream of the split `val`; the
images are those of the dataset's validation split. The engine runs them, so none is compiled.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ghn_jax.data.images import Images, load_images
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import evaluate_ghn, summary
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.log import Validated


class Validation(NamedTuple):
    """What is measured every so many updates.

    Attributes:
      architectures: names and networks.
      images: of the validation split.
    """

    architectures: list[tuple[str, Architecture]]
    images: Images

    def __call__(self, ghn: GHN, params: Any, engine: Engine) -> Validated:
        """Accuracy with the parameters that a hypernetwork predicts, batch norm on batches of 64.

        Args:
          ghn, params: the hypernetwork; its numbers are read, and nothing else.
          engine: whose programs are used; it need not be of one device.
        """
        start = time.perf_counter()
        here = Engine(dtype=engine.dtype, programs=engine.programs)
        variables = {"params": jax.tree.map(np.asarray, params)}
        records = evaluate_ghn(ghn, variables, self.architectures, self.images, engine=here)
        return Validated(summary(records)[0], time.perf_counter() - start)


def load_validation(config: TrainConfig) -> Validation:
    """The networks and images of a run's learning curve, always the same.

    Raises:
      ValueError, FileNotFoundError: see `load_images`.
    """
    data = config.data
    images = load_images(data.dataset, "val", data_dir=data.data_dir, image_size=data.image_size)
    rules = config.space.rules(images.image_size)
    architectures = [
        (f"val {i}", sample_architecture("val", config.run.seed, i, rules=rules))
        for i in range(config.run.validate_nets)
    ]
    return Validation(architectures, images)
