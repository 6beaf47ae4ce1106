"""What the page shows of a network: its parameters, its graph, its accuracy on test images."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax import zoo
from ghn_jax.data.images import Images, load_images
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import Graph
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.sampling import RULES, Rules, sample_architecture
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation.accuracy import logits_of
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.interop.pretrained import from_pretrained, training_options
from ghn_jax.interop.torch_network import to_torch
from ghn_jax.tracing.model_graph import trace_once
from ghn_jax.tracing.prediction import predict_model
from ghn_jax.web.networks import check_size
from ghn_jax.web.trial import Tester, Trial
from ghn_jax.zoo.adapt import SMALLEST


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """A network with predicted parameters.

    Attributes:
      name: of the network.
      architecture: of the design space; None for a model of the zoo.
      network: what converters take: the graph of an architecture, or the zoo's model.
      graph: of its N nodes.
      variables: of its Flax module, with the key 'params'.
      arrays: the same by PyTorch's names, (out, in, height, width) for convolutions.
      seconds: that predicting takes, without compiling.
      left: parameters that no decoder makes, at their initial values.
      trial: how it does on test images.
    """

    name: str
    architecture: Architecture | None
    network: Graph | zoo.Model
    graph: Graph
    variables: dict
    arrays: dict[str, np.ndarray]
    seconds: float
    left: int
    trial: Trial

    @property
    def parameters(self) -> int:
        """How many the network has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))


class Predictor:
    """Predicts networks, one after another, and tests them.

    Networks of the design space run by the engine, so that none is compiled; a model of the zoo is
    compiled once.

    Args:
      ghn, variables: the hypernetwork.
      images: of the test split.
      enlarged: the same for models of the zoo, if they need larger ones.
      rules: by which architectures are sampled.
    """

    def __init__(
        self,
        ghn: GHN,
        variables,
        images: Images,
        *,
        enlarged: Images | None = None,
        rules: Rules = RULES["test"],
    ):
        self.ghn, self.variables, self.images, self.rules = ghn, variables, images, rules
        self.engine = Engine()
        self.tester = Tester(images)
        self._enlarged = self.tester if enlarged is None else Tester(enlarged)
        self._compiled = CompilationCounter()
        self._models: dict[str, tuple[nn.Module, Callable]] = {}

    def sample(self, seed: int) -> Architecture:
        """The architecture of a seed, 0 to 2**32 - 1, by the rules.

        Raises:
          ValueError: the seed is out of range.
        """
        return sample_architecture("test", seed, 0, rules=self.rules)

    def predict(self, name: str, network: Architecture | str) -> Prediction:
        """Predicts all parameters of a network, and tests it.

        Args:
          name: that it is shown with.
          network: an architecture, or a model of the zoo by name.

        Raises:
          ValueError: there is no such model, it is not for images of this size, the architecture is
            too large or disconnected, or a parameter is beyond what the hypernetwork can make.
        """
        if isinstance(network, str):
            return self._of_zoo(name, network)
        task, size = self.images.task, self.images.image_size
        check_size(network, task)

        def predict():
            graph = self.ghn.graph(network, image_size=size)
            return self.ghn.predict(self.variables, graph, image_size=size), graph

        (params, graph), seconds = self._timed(predict)
        module = build_network(network, *task)
        run = logits_of(module, self.engine, self.tester.batch_size)
        return Prediction(
            name=name,
            architecture=network,
            network=graph,
            graph=graph,
            variables={"params": params},
            arrays=to_torch(params, graph),
            seconds=seconds,
            left=0,
            trial=self.tester.test(module, run, params),
        )

    def _of_zoo(self, name: str, model: str) -> Prediction:
        if model not in zoo.MODELS:
            raise ValueError(f"there is no model {model!r}; allowed: {', '.join(zoo.MODELS)}")
        tester = self._enlarged
        size = tester.images.image_size
        if model not in self._models:
            module = zoo.MODELS[model](self.ghn.num_classes, size)
            self._models[model] = module, logits_of(module, self.engine, tester.batch_size)
        module, run = self._models[model]
        sample = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        (variables, report), seconds = self._timed(
            lambda: predict_model(self.ghn, self.variables, module, sample)
        )
        # What the prediction has traced.
        traced = trace_once(module, sample, self.ghn.virtual_edges, initial=None, seed=0, call={})
        return Prediction(
            name=name,
            architecture=None,
            network=module,
            graph=traced.reading.graph,
            variables=variables,
            arrays=to_torch(variables, module),
            seconds=seconds,
            left=sum(parameter.size for parameter in report.left),
            trial=tester.test(module, run, variables["params"]),
        )

    def _timed(self, predict: Callable) -> tuple[Any, float]:
        """What is predicted, parameters first, and the seconds without compiling."""
        for _ in range(2):
            before, start = self._compiled.count, time.perf_counter()
            found = predict()
            jax.block_until_ready(found[0])
            seconds = time.perf_counter() - start
            if self._compiled.count == before:
                break
        return found, seconds


def open_predictor(source: str, dataset: str | None, data_dir: str | None) -> Predictor:
    """The predictor of a hypernetwork, on the test images of a dataset.

    Networks are sampled as it met them in training, where it says how, but from a random
    stream that training never draws from; else as those of the split `test`.

    Args:
      source: see `from_pretrained`.
      dataset: see `load_images`; the one that it was trained on if not given.
      data_dir: folder of the datasets that TFDS has prepared.

    Raises:
      FileNotFoundError: there is no hypernetwork, or no dataset.
      ValueError: one of them is damaged, or they do not fit.
    """
    ghn, variables = from_pretrained(source)
    training = training_options(source)
    if dataset is None and training is None:
        raise ValueError(f"{source} does not say what it was trained on; give --dataset")
    size = None
    if training is not None and dataset in (None, training.data.dataset):
        dataset, size = training.data.dataset, training.data.image_size
    assert dataset is not None
    load = functools.partial(load_images, dataset, "test", data_dir=data_dir)
    images = load(image_size=size)
    if images.num_classes != ghn.num_classes:
        raise ValueError(
            f"{dataset} has {images.num_classes} classes, but the hypernetwork in {source} "
            f"predicts classifiers for {ghn.num_classes}; give the dataset that it was trained on"
        )
    rules = RULES["test"]
    if training is not None:
        rules = training.space.rules(images.image_size)
    enlarged = load(image_size=SMALLEST) if images.image_size < SMALLEST else None
    return Predictor(ghn, variables, images, enlarged=enlarged, rules=rules)
