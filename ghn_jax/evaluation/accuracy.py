"""Evaluates networks with predicted parameters (paper § 5.1, C.1).

Batch norm uses the statistics of each batch of 64 images, as in the paper. Networks of the design
space are run by the engine, which compiles none of them; any other Linen module is compiled once.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ghn_jax import zoo
from ghn_jax.data.images import Images, eval_batches
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.network import Network, build_network
from ghn_jax.engine.engine import Engine, tree_of, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.evaluation.batch_statistics import apply_on_batch
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.tracing.initial_values import read_init
from ghn_jax.tracing.prediction import predict_model


class Accuracy(NamedTuple):
    """Of one network: fractions of the images, their number, and seconds with compilation."""

    top1: float
    top5: float
    images: int
    seconds: float


@jax.jit
def count_correct(logits, labels, counted) -> jax.Array:
    """(2,) how often the right class is the first, and among the first five."""
    # The right class's rank; a class that ties with it counts as ahead of it.
    target = jnp.take_along_axis(logits, labels[:, None], axis=1)
    rank = (logits >= target).sum(1) - 1
    # Logits that are not finite are never right.
    rank = jnp.where(jnp.isfinite(logits).all(1), rank, logits.shape[1])
    right = jnp.stack([rank < 1, rank < 5]) & (jnp.arange(len(rank)) < counted)
    return right.sum(1)


def full_batches(images: Images, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Batches of one size, (images, labels, counted): how many of the first count.

    A last, smaller batch would be a program of its own. It is repeated up to full size where that
    leaves its statistics as they are (of CIFAR-10, 16 images four times), else filled with the
    first images.
    """
    first = None
    for batch, labels in eval_batches(images, size):
        first = (batch, labels) if first is None else first
        counted = len(batch)
        fill = (batch, labels) if size % counted == 0 else first
        while len(batch) < size <= len(images):
            batch = np.concatenate([batch, fill[0]])[:size]
            labels = np.concatenate([labels, fill[1]])[:size]
        yield batch, labels, counted


def logits_of(network: nn.Module, engine: Engine, images: int) -> Callable:
    """How a network runs, by the engine if it can: a tree of parameters -> (images -> logits).

    Args:
      network: from `build_network`, or another Linen module.
      engine: runs networks of the design space.
      images: how many run at once.
    """
    if not isinstance(network, Network):
        run = jax.jit(lambda params, x: apply_on_batch(network, {"params": params}, x))
        return lambda params: functools.partial(run, params)
    plan = make_plan(network.wiring())
    ready = engine.prepare(plan, images, gradient=False)

    def with_params(params):
        weights = weights_of(plan, params)
        return lambda x: engine.forward(ready, weights, x)[0]

    return with_params


def accuracy_of(run: Callable, images: Images, batch_size: int = 64) -> Accuracy:
    """Accuracy of what takes images and gives logits, in batches of one size."""
    # One batch leaves a part of two cores idle; on accelerators the next is queued in any case.
    at_once = 2 if jax.default_backend() == "cpu" else 1

    def count(batch):
        x, labels, counted = batch
        return count_correct(run(x), labels, counted)

    start = time.perf_counter()
    batches = full_batches(images, batch_size)
    counts = [count(next(batches))]  # compiled before threads need it
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        while some := list(itertools.islice(batches, at_once)):
            counts += pool.map(count, some)
            jax.block_until_ready(counts[-2 * at_once :][0])  # so that not all are queued at once
    top1, top5 = (float(share) for share in np.sum(jax.device_get(counts), 0) / len(images))
    return Accuracy(top1, top5, len(images), time.perf_counter() - start)


def evaluate_network(
    network: nn.Module,
    *candidates,
    images: Images,
    batch_size: int = 64,
    engine: Engine | None = None,
) -> list[Accuracy]:
    """Accuracies of a network on a set of images, batch norm on batch statistics.

    Args:
      network: from `build_network`, or another Linen module.
      candidates: trees of parameters for it.
      images: the images.
      batch_size: images in a batch; all are of this size.
      engine: runs networks of the design space; the same for several finds most programs compiled.
    """
    engine = engine or Engine()
    with_params = logits_of(network, engine, min(batch_size, len(images)))
    return [
        accuracy_of(with_params(jax.device_put(params)), images, batch_size)
        for params in candidates
    ]


def draw_parameter(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A parameter by its name in Flax, as He initialisation draws it; norms' at 1 and biases at 0.

    Args:
      name: 'kernel', 'embedding', 'scale' or 'bias'.
      shape: with the output's channels last.
      rng: is used up for kernels and embeddings.
    """
    if name in ("scale", "bias"):
        return np.full(shape, float(name == "scale"), np.float32)
    fan_in = 2 if name == "embedding" else np.prod(shape[:-1])  # of std 1
    return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))


def _shapes(network: Network) -> dict:
    """The `params` tree of a network as shapes, without tracing it."""
    plan = make_plan(network.wiring())
    shapes: dict[str, Any] = {
        name: tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in parameter.leaves.values())
        for step in plan.steps
        for name, parameter in zip(step.names, step.unit.parameters, strict=True)
    }
    return tree_of(plan, shapes)


def random_parameters(network: nn.Module, image_size: int, seed: int):
    """He-initialised parameters of a network, a pure function of the seed.

    Drawn here and not by `network.init`, which would be compiled for every network. Of a network
    outside the design space, the kernels of convolutions and dense layers are drawn so; all else,
    such as layer scales and class tokens, has the initial values that the network gives it.
    """
    rng = np.random.default_rng(seed)
    if isinstance(network, Network):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: draw_parameter(path[-1].key, leaf.shape, rng), _shapes(network)
        )
    images = jnp.zeros((2, image_size, image_size, 3))
    shapes, compute, _ = read_init(
        lambda key: network.init(key, images)["params"], jax.random.key(seed)
    )
    leaves, structure = jax.tree.flatten_with_path(shapes)
    kernels = [path[-1].key == "kernel" and leaf.ndim in (2, 4) for path, leaf in leaves]
    others = iter(compute([i for i, is_kernel in enumerate(kernels) if not is_kernel]))
    values = [
        draw_parameter("kernel", leaf.shape, rng) if is_kernel else next(others)
        for is_kernel, (_, leaf) in zip(kernels, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)


def predict_network(
    ghn: GHN, variables, arch: Architecture | str, image_size: int
) -> tuple[nn.Module, dict]:
    """The Flax module of an architecture or a model of the zoo, and its predicted parameters."""
    if isinstance(arch, str):
        network = zoo.MODELS[arch](ghn.num_classes, image_size)
        sample = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
        predicted, _ = predict_model(ghn, variables, network, sample, strict=True)
        return network, predicted["params"]
    params = ghn.predict(variables, arch, image_size=image_size)
    return build_network(arch, ghn.num_classes, image_size), params


def evaluate_ghn(
    ghn: GHN,
    variables,
    architectures: Iterable[tuple[str, Architecture | str]],
    images: Images,
    *,
    batch_size: int = 64,
    compare_random: bool = False,
    engine: Engine | None = None,
    found: Mapping[str, dict] = MappingProxyType({}),
    report: Callable[[dict], None] = lambda record: None,
) -> list[dict]:
    """Predicts the parameters of architectures and evaluates them, one after another.

    Args:
      ghn, variables: the hypernetwork.
      architectures: names and architectures, or 'resnet50'.
      images: the images to evaluate on.
      batch_size: images in a batch.
      compare_random: evaluate the same networks with random (He) parameters too.
      engine: that runs them; a new one if not given.
      found: records that are there already, by name; they are taken as they are.
      report: called with each new record as soon as it is there.

    Returns:
      One record for each architecture: name, top1, top5 (fractions), images, parameters (number
      predicted), predict_seconds, evaluate_seconds, architecture (as data), and top1_random.
    """
    engine = engine or Engine()
    records: list[dict] = []
    for name, arch in architectures:
        if name in found:
            records.append(found[name])
            continue
        start = time.perf_counter()
        network, params = predict_network(ghn, variables, arch, images.image_size)
        jax.block_until_ready(params)
        predict_seconds = time.perf_counter() - start
        candidates = [params]
        if compare_random:
            candidates.append(random_parameters(network, images.image_size, seed=len(records)))
        accuracy, *random = evaluate_network(
            network, *candidates, images=images, batch_size=batch_size, engine=engine
        )
        record = {
            "name": name,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "images": accuracy.images,
            "parameters": sum(p.size for p in jax.tree.leaves(params)),
            "predict_seconds": round(predict_seconds, 3),
            "evaluate_seconds": round(accuracy.seconds, 3),
            "architecture": arch if isinstance(arch, str) else arch.to_dict(),
        }
        if random:
            record["top1_random"] = random[0].top1
        report(record)
        records.append(record)
    return records


def summary(records: list[dict], key: str = "top1") -> tuple[float, float, float]:
    """Mean, standard error and maximum of a field over records."""
    values = np.array([record[key] for record in records])
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(error), float(values.max())
