"""The training loop: sets up a run, makes its updates, logs them and saves (paper § 5.1)."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ghn_jax.data.images import Images, prefetch, steps_per_epoch, train_batches
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.reader import DeepNets1M, read_architectures
from ghn_jax.deepnets1m.sampling import sample_architecture, seeded
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.mesh import ARCH, DATA, make_mesh, parse_mesh
from ghn_jax.training.meta_batch import MetaBatch, Stream
from ghn_jax.training.update import MetaStep, Metrics, TrainState, Update

_AHEAD = 4  # updates that architectures come ahead by, so that what is new gets compiled meanwhile


def check(config: TrainConfig) -> None:
    """Raises ValueError for options that cannot work, before any long work.

    Where there are several processes, after they have been joined.
    """
    data, space, run = config.data, config.space, config.run
    counts = {
        "epochs": data.epochs, "batch_size": data.batch_size, "meta_batch": space.meta_batch,
        "save_every": run.save_every, "workers": run.workers, "max_nodes": space.max_nodes,
        "graph_nodes": space.graph_nodes, "tile_channels": config.model.tile_channels,
    }  # fmt: skip
    if data.steps is not None:
        counts["steps"] = data.steps
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    shape = make_mesh().shape
    for axis, size in (parse_mesh(run.mesh) if run.mesh else {}).items():
        if shape[axis] != size:
            raise ValueError(
                f"--mesh is {run.mesh}, but there are {shape[ARCH]} processes of {shape[DATA]} "
                "devices each; start a process for each row"
            )
    if data.batch_size % shape[DATA]:
        raise ValueError(
            f"--batch-size is {data.batch_size}; allowed: multiples of {shape[DATA]}, the "
            "number of devices that divide the images"
        )
    if space.meta_batch < shape[ARCH]:
        raise ValueError(
            f"--meta-batch is {space.meta_batch}; allowed: {shape[ARCH]} or more, an architecture "
            "for each row of devices; or give them to the images, with --mesh data=COLUMNS"
        )
    latest = Checkpoints(run.out).latest()
    if latest is not None and not run.resume:
        raise ValueError(
            f"{run.out} holds a run of {latest} updates already; add --resume to go on with it, "
            "or give another --out"
        )
    if latest is None and run.resume:
        raise ValueError(f"--resume was given, but {run.out} holds no checkpoint; leave it out")


def architecture_source(config: TrainConfig, image_size: int) -> Callable[[int], Architecture]:
    """Position of the stream -> architecture: generated, or from a file."""
    rules, seed = config.space.rules(image_size), config.run.seed
    if config.space.nets is None:
        return lambda position: sample_architecture("train", seed, position, rules=rules)
    if config.space.nets.suffix == ".json":
        few = list(read_architectures(config.space.nets).values())
        return lambda position: few[position % len(few)]
    nets = DeepNets1M.open(
        config.space.nets, "train", image_size=image_size, rules=rules, seed=seed
    )

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return seeded("order of nets", seed, epoch).permutation(len(nets))

    def from_file(position: int) -> Architecture:
        # Every pass over the file in an order and with widths of its own.
        epoch, place = divmod(position, len(nets))
        return nets.architecture(int(order(epoch)[place]), seed=seed + epoch)

    return from_file


class Run(NamedTuple):
    """A run that is ready to go on.

    Attributes:
      config: its options.
      step: makes an update.
      state: before the next update.
      done: updates made so far.
      total: updates to make in all.
      position: of the stream of architectures.
      stream: of meta-batches.
      checkpoints: of its folder.
    """

    config: TrainConfig
    step: MetaStep
    state: TrainState
    done: int
    total: int
    position: int
    stream: Stream
    checkpoints: Checkpoints


def setup(config: TrainConfig, images: Images) -> Run:
    """Makes a new run, or loads its last checkpoint; writes `config.json` of a new one."""
    source = architecture_source(config, images.image_size)  # may find a file damaged
    first = jax.process_index() == 0
    mesh = make_mesh()
    ghn, trained = config.ghn(images.task), None
    if config.model.init is not None:
        ghn, trained = load_ghn(config.model.init)
        if ghn.num_classes != images.num_classes:
            raise ValueError(
                f"--init is {config.model.init}, a hypernetwork for {ghn.num_classes} classes, but "
                f"{images.name} has {images.num_classes}"
            )
    per_epoch = steps_per_epoch(images, config.data.batch_size)
    # A CPU that is one device runs several networks at once.
    shared = jax.default_backend() == "cpu" and mesh.shape[DATA] == 1
    step = MetaStep(
        ghn,
        config.optimiser.make(per_epoch),
        mesh=mesh,
        smoothing=config.optimiser.label_smoothing,
        seed=config.run.seed,
        workers=config.run.workers if shared else 1,
        dtype=config.run.dtype,
    )
    checkpoints = Checkpoints(config.run.out)
    state, position = step.init(config.run.seed), 0
    if trained is not None:
        state = state._replace(params=jax.device_put(trained["params"], step.replicated))
    if config.run.resume:
        like = {"params": state.params, "training": (state.opt_state, state.step)}
        _, position, trees = checkpoints.load(step.replicated, **like)
        state = TrainState(trees["params"], *trees["training"])
    elif first:
        checkpoints.write_config(ghn, training=config.describe(), image_size=images.image_size)
    stream = Stream(
        ghn,
        source,
        size=config.space.meta_batch,
        image_size=images.image_size,
        share=(jax.process_index(), jax.process_count()),
        graph_nodes=config.space.graph_nodes,
        max_nodes=config.space.max_nodes,
    )
    total = config.data.steps or config.data.epochs * per_epoch
    return Run(config, step, state, int(state.step), total, position, stream, checkpoints)


class Log:
    """Metrics of updates as a line of JSON each, and a progress bar; of the first process only.

    Args:
      run: what is logged.
      compilations: counts programs.
    """

    def __init__(self, run: Run, compilations: CompilationCounter):
        self._first = jax.process_index() == 0
        self._compilations, self._seen = compilations, run.position
        path = run.config.run.out / "metrics.jsonl" if self._first else Path(os.devnull)
        if self._first:
            _trim(path, run.done)
        self._file = path.open("a", buffering=1)
        self._bar = tqdm(
            total=run.total, initial=run.done, unit="update", dynamic_ncols=True,
            disable=not self._first,
        )  # fmt: skip
        self._last = time.perf_counter()

    def update(self, step: int, metrics: Metrics, batch: MetaBatch, waited: float) -> None:
        """Logs an update; waits for it to end.

        Args:
          step: its number, from 1.
          metrics, batch: of it.
          waited: seconds that it waited for architectures and images.
        """
        metrics = jax.device_get(metrics)
        seconds, self._last = time.perf_counter() - self._last, time.perf_counter()
        self._seen += len(batch.architectures)
        loss, programs = float(metrics.loss), self._compilations.count
        norm = float(metrics.grad_norm)
        record = {
            "step": step,
            "loss": loss if metrics.applied and math.isfinite(loss) else None,
            "top1": float(metrics.top1),
            "grad_norm": norm if metrics.applied and math.isfinite(norm) else None,
            "seconds": round(seconds, 4),
            "waited": round(waited, 4),
            "nodes": batch.nodes,
            "architectures": self._seen,
            "compilations": programs,
        }
        self._file.write(json.dumps(record) + "\n")
        self._bar.update()
        self._bar.set_postfix(loss=f"{loss:.3f}", top1=f"{metrics.top1:.1%}", programs=programs)
        if self._first and not metrics.applied:
            self._bar.write(
                f"update {step} passed over: loss {loss}, not finite; its architectures are left "
                "out"
            )

    def end(self, run: Run) -> None:
        """Says what was done."""
        if self._first:
            c = self._compilations
            self._bar.write(
                f"{run.total} updates; {c.count} programs, {c.seconds:.0f} s compiling them. "
                f"Checkpoint and metrics in {run.config.run.out}"
            )

    def close(self) -> None:
        """Closes file and bar."""
        self._bar.close()
        self._file.close()


def _trim(path: Path, steps: int) -> None:
    """Drops records of updates after a checkpoint: they are made again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= steps]
        path.write_text("".join(line + "\n" for line in kept))


def train(config: TrainConfig, images: Images) -> None:
    """Makes a run's updates; the first process writes metrics, all of them checkpoints."""
    run, compilations = setup(config, images), CompilationCounter()
    size, state = config.data.batch_size, run.state
    updates: Iterator[Update] = prefetch(
        (run.step.prepare(batch, size) for batch in run.stream.batches(run.position)), size=_AHEAD
    )
    batches = prefetch(train_batches(images, size, seed=config.run.seed, start_step=run.done))
    with (
        closing(run.step),
        closing(updates),
        closing(batches),
        closing(Log(run, compilations)) as log,
    ):
        issued = []
        for step in range(run.done + 1, run.total + 1):
            start = time.perf_counter()
            update, image_batch = next(updates), next(batches)
            waited = time.perf_counter() - start
            state, metrics = run.step(state, update, *image_batch)
            issued.append((step, metrics, update.batch, waited))
            save = step % config.run.save_every == 0 or step == run.total
            # Read an update late, so that the device has the next one in its queue.
            while len(issued) > (not save):
                log.update(*issued.pop(0))
            if save:
                run.checkpoints.save(
                    step, update.batch.position,
                    params=state.params, training=(state.opt_state, state.step),
                )  # fmt: skip
        log.end(run)
