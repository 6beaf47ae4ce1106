"""Repeats an update that a run has passed over because its numbers were not finite.

    ghn-train --out runs/ghn2 --replay 1234

The run's last checkpoint before the update is loaded, and the updates between are made again, as
they were: its architectures, batches of images and dropout follow from their numbers. So the
parameters are bit for bit those that the update had. Then each of its architectures is run by
itself, and what is not finite is named in the order in which it is computed. Nothing is written.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from ghn_jax.data.images import Batch, Images, train_batches
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.engine.plan import Step
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.padding import next_power_of_two
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.log import BAD_UPDATES
from ghn_jax.training.loop import Run, at_checkpoint, new_run
from ghn_jax.training.meta_batch import MetaBatch, make_meta_batch
from ghn_jax.training.run_folder import check_same

_NAMED = 3  # tensors that are named of each architecture


class Culprit(NamedTuple):
    """What one architecture of an update does by itself.

    Attributes:
      name: of the architecture on record.
      loss: its cross-entropy.
      grad_norm: norm of its gradient.
      not_finite: the first tensors that are not finite, in the order in which they are computed.
    """

    name: str
    loss: float
    grad_norm: float
    not_finite: list[str]


class Replay(NamedTuple):
    """An update that was made again.

    Attributes:
      record: of `bad_updates.jsonl`.
      loss, grad_norm, applied: of the update now; see `update.Metrics`.
      parameters: which they were, in words.
      culprits: each architecture by itself.
    """

    record: dict[str, Any]
    loss: float
    grad_norm: float
    applied: bool
    parameters: str
    culprits: list[Culprit]


def read_bad_update(out: Path, update: int) -> dict[str, Any]:
    """The record of an update that a run has passed over; the last one where there are several.

    Raises:
      ValueError: there is none.
    """
    path = out / BAD_UPDATES
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        records = {int(record["step"]): record for record in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove the line that is no record"
        ) from None
    if update not in records:
        known = ", ".join(map(str, sorted(records)[:20])) or "none"
        raise ValueError(f"--replay is {update}; updates on record in {path}: {known}")
    return records[update]


def replay(config: TrainConfig, images: Images) -> Replay:
    """Makes an update of `bad_updates.jsonl` again.

    Args:
      config: the run's, with `replay`, the number of the update.
      images: the run's training images.

    Raises:
      FileNotFoundError: `config.run.out` is no folder of a run.
      ValueError: the update is not on record, or options differ from the run's.
    """
    update, size = config.run.replay, config.data.batch_size
    assert update is not None
    record = read_bad_update(config.run.out, update)
    check_same(config, TrainConfig.read(Checkpoints(config.run.out).config()["training"]))
    architectures = {
        name: Architecture.from_dict(data) for name, data in record["architectures"].items()
    }
    start = new_run(config, images)
    with closing(start.step) as step:
        run, parameters = _before(start, images, tuple(architectures.values()), update)
        seed, first = (int(record["images"][key]) for key in ("seed", "batch"))
        batch = next(train_batches(images, size, seed=seed, start_step=first))
        params = jax.tree.map(jnp.copy, run.state.params)  # the update takes the others
        number = jax.device_put(np.int32(update - 1), step.replicated)
        whole = step.prepare(_meta_batch(run, tuple(architectures.values())), size)
        _, metrics = step(run.state._replace(step=number), whole, *batch)
        found = [
            _alone(run, params, name, arch, place, batch, np.int32(update - 1))
            for place, (name, arch) in enumerate(architectures.items())
        ]
        loss, norm, applied = (x.item() for x in map(np.asarray, metrics[:1] + metrics[2:4]))
    return Replay(record, loss, norm, applied, parameters, found)


def _before(
    start: Run, images: Images, architectures: tuple[Architecture, ...], update: int
) -> tuple[Run, str]:
    """The run before an update, and in words which parameters it has."""
    kept = start.checkpoints.steps()
    before = [step for step in kept if step < update]
    if not before and kept and update > start.config.run.save_every:
        run = at_checkpoint(start, upto=kept[0])
        return run, (
            f"those after update {run.done}, the first checkpoint that is kept; those from before "
            "the update are gone"
        )
    run = at_checkpoint(start, upto=before[-1]) if before else start
    where = f"the checkpoint of update {run.done}" if before else "the start of the run"
    coming = itertools.islice(run.stream.batches(run.position), update - run.done)
    if collections.deque(coming, maxlen=1).pop().architectures != architectures:
        return run, f"those of {where}, after which the run went on with other architectures"
    state, size = run.state, run.config.data.batch_size
    meta_batches = run.stream.batches(run.position)
    batches = train_batches(images, size, seed=run.config.run.seed, start_step=run.done)
    for _ in tqdm(range(run.done + 1, update), unit="update", desc="up to it", dynamic_ncols=True):
        state, _ = run.step(state, run.step.prepare(next(meta_batches), size), *next(batches))
    return run._replace(state=state, done=update - 1), f"those that it had, made again from {where}"


def _meta_batch(run: Run, architectures: tuple[Architecture, ...]) -> MetaBatch:
    """Some of an update's architectures, padded as all of them are: the same programs."""
    stream = run.stream
    times = next_power_of_two(stream.size) // next_power_of_two(len(architectures))
    return make_meta_batch(
        stream.ghn,
        architectures,
        image_size=stream.image_size,
        graph_nodes=stream.graph_nodes * times,
    )


def _alone(
    run: Run, params: Any, name: str, arch: Architecture, place: int, batch: Batch, number: np.int32
) -> Culprit:
    """One architecture of an update by itself, with the dropout of its place in the meta-batch."""
    step, engine = run.step, run.step.engine
    params = jax.device_put(params, engine.whole)
    x, labels = jax.device_put(batch, engine.split)
    update = step.prepare(_meta_batch(run, (arch,))._replace(members=(place,)), len(labels))
    ((tiles, values, logits),) = step.values(params, update, x, number)
    (totals,), gradient = step.gradient(params, update, x, labels, number)
    steps = update.networks[0].plan.steps
    tensors = itertools.chain(
        [("images", x)],
        _leaves("parameter of the hypernetwork", params),
        ((f"predicted {name}", some) for name, arrays in tiles.items() for some in arrays),
        ((_described(step), values[step.output]) for step in steps[:-1]),
        [("logits", logits), ("loss", totals[0])],
        _leaves("gradient of", ravel_pytree(params)[1](gradient)),
    )
    bad = (what for what, array in tensors if not np.isfinite(np.asarray(array)).all())
    first = list(itertools.islice(bad, _NAMED))
    return Culprit(name, float(totals[0]), float(jnp.linalg.norm(gradient)), first)


def _leaves(what: str, tree: Any) -> Iterator[tuple[str, jax.Array]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield f"{what} {'/'.join(str(part.key) for part in path)}", leaf


def _described(step: Step) -> str:
    """What a step of a network computes: its unit, and the parameters that it has."""
    return f"output of {type(step.unit).__name__} {', '.join(step.names)}".strip()


def described(found: Replay) -> str:
    """A replay as text."""
    record = found.record
    number, images = record["step"], record["images"]
    lines = [
        f"update {number}: loss {found.loss}, norm of the gradient {found.grad_norm}; on record: "
        f"loss {record['loss']}, norm {record['grad_norm']}",
        f"images: batch {images['batch']} of seed {images['seed']}",
        f"parameters: {found.parameters}",
        "",
        f"{'architecture':<20}{'loss':>12}{'gradient':>12}  first that is not finite",
    ]
    for one in found.culprits:
        first = "; ".join(one.not_finite) or "-"
        lines.append(f"{one.name:<20}{one.loss:>12.4g}{one.grad_norm:>12.4g}  {first}")
    if found.applied:
        lines.append("\nAll of it is finite now, and so are the parameters after it.")
    elif not any(one.not_finite for one in found.culprits):
        lines.append("\nThe parameters after it, or the optimiser's numbers, are not finite.")
    return "\n".join(lines)
