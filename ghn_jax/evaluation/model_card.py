"""What a trained hypernetwork reaches, for its model card (paper § 5.1, C.1).

Networks that it never saw, of the rules that it was trained by; and well-known ones, with batch
norm on the statistics of each batch and on averages over training batches, and with random
parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from ghn_jax.data.images import Images, train_batches
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.network import Network
from ghn_jax.engine.engine import Engine, weights_of
from ghn_jax.engine.plan import make_plan
from ghn_jax.evaluation.accuracy import (
    accuracy_of,
    evaluate_network,
    predict_network,
    random_parameters,
    summary,
)
from ghn_jax.evaluation.batch_statistics import average_statistics
from ghn_jax.hypernet.ghn import GHN

BATCH = 64  # images that batch norm takes statistics of, as in the paper


class Wanted(NamedTuple):
    """A network to measure.

    Attributes:
      name, network: what it is.
      random: with random (He) parameters too.
      averaged: with batch norm on averaged statistics too.
    """

    name: str
    network: Architecture | str
    random: bool
    averaged: bool


def _averaging_engine(
    network: Network, params: Mapping, batches: Iterable[np.ndarray], size: int, engine: Engine
) -> Callable[[np.ndarray], jax.Array]:
    """Images -> logits on averaged statistics, by the engine, which compiles no network."""
    wiring = network.wiring()
    plan, running = make_plan(wiring), make_plan(wiring, running=True)
    weights = jax.device_put(weights_of(plan, params), engine.whole)
    on_batch, averaged = (engine.prepare(p, size, gradient=False) for p in (plan, running))
    mean: dict[str, jax.Array] = {}
    for count, images in enumerate(batches, start=1):
        _, trace = engine.forward(on_batch, weights, images)
        for i, found in trace.statistics.items():
            for name, new in zip(plan.steps[i].names, found, strict=True):
                old = mean.get(name, new)
                mean[name] = old + (new - old) / count
    return lambda images: engine.forward(averaged, weights, images, statistics=mean)[0]


def _averaging_module(
    module: nn.Module, params: Mapping, batches: Iterable[np.ndarray], image_size: int
) -> Callable[[np.ndarray], jax.Array]:
    """Images -> logits on averaged statistics, by a module that is compiled."""
    variables: Mapping = {"params": params}
    sample = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), sample)
    if "batch_stats" in shapes:
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes["batch_stats"])
        variables = average_statistics(module, {**variables, "batch_stats": zeros}, batches)
    run = jax.jit(module.apply)
    return lambda images: run(variables, images)


def averaged_accuracy(
    module: nn.Module, params: Mapping, training: Images, test: Images, batches: int, engine: Engine
) -> float:
    """Accuracy with batch norm on the averages of statistics over training batches (C.1).

    Without batch norm it is the same as ever.

    Args:
      module: the network; of the design space, or one that is compiled.
      params: its parameters.
      training, test: images.
      batches: of training images, to average over.
      engine: runs networks of the design space.
    """
    size = min(BATCH, len(training), len(test))
    some = itertools.islice(train_batches(training, size, seed=0), batches)
    seen = (images for images, _ in some)
    if isinstance(module, Network):
        logits = _averaging_engine(module, params, seen, size, engine)
    else:
        logits = _averaging_module(module, params, seen, test.image_size)
    return accuracy_of(logits, test, size).top1


def measure(
    ghn: GHN,
    variables: Mapping[str, Any],
    networks: Iterable[Wanted],
    training: Images,
    test: Images,
    batches: int,
) -> Iterator[dict]:
    """Accuracies of networks, one after another.

    Args:
      ghn, variables: the hypernetwork.
      networks: to measure.
      training, test: images.
      batches: of training images, that batch norm's statistics are averaged over.

    Yields:
      name, parameters (how many) and top1 (fraction) of each; top1_random and top1_averaged, where
      they are wanted.
    """
    engine = Engine()
    for name, network, random, averaged in networks:
        module, params = predict_network(ghn, variables, network, test.image_size)
        candidates = [params]
        if random:
            candidates.append(random_parameters(module, test.image_size, seed=0))
        size = min(BATCH, len(test))
        found = evaluate_network(module, *candidates, images=test, batch_size=size, engine=engine)
        record = {
            "name": name,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "top1": found[0].top1,
        }
        if random:
            record["top1_random"] = found[1].top1
        if averaged:
            record["top1_averaged"] = averaged_accuracy(
                module, params, training, test, batches, engine
            )
        yield record


def table(records: list[dict]) -> str:
    """Markdown: the mean of the unseen networks, and a row for each of the others."""
    rows = ["| network | parameters | predicted | statistics averaged | random |",
            "|---|---|---|---|---|"]  # fmt: skip
    many = [r for r in records if "top1_averaged" not in r]
    if many:
        mean, error, best = summary(many)
        sizes = [r["parameters"] / 1e6 for r in many]
        random = [r for r in many if "top1_random" in r]
        beside = f"{summary(random, 'top1_random')[0]:.1%} (of {len(random)})" if random else ""
        rows.append(f"| {len(many)} unseen | {min(sizes):.2f}M to {max(sizes):.2f}M | "
                    f"**{mean:.1%} ± {error:.1%}**, best {best:.1%} | | {beside} |")  # fmt: skip
    for r in records:
        if "top1_averaged" in r:
            rows.append(f"| {r['name']} | {r['parameters'] / 1e6:.2f}M | {r['top1']:.1%} | "
                        f"{r['top1_averaged']:.1%} | {r['top1_random']:.1%} |")  # fmt: skip
    return "\n".join(rows) + "\n"
