"""The training loop: sets up a run, makes its updates, logs them and saves (paper § 5.1)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from ghn_jax.data.images import Images, prefetch, steps_per_epoch, train_batches
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn
from ghn_jax.hypernet.ghn import GHN, count_parameters
from ghn_jax.training.architectures import architecture_source
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.mesh import ARCH, DATA, make_mesh, parse_mesh
from ghn_jax.training.meta_batch import MetaBatch, Stream
from ghn_jax.training.run_folder import check_not_anothers, check_same, differences, lock
from ghn_jax.training.stopping import NOTHING, SAVE, STOP, Listener, Stopped
from ghn_jax.training.update import MetaStep, Metrics, TrainState, Update

MOST_PARAMETERS = 10**9  # of a hypernetwork: 20 GB with its gradients and Adam's state
BAD_UPDATES = "bad_updates.jsonl"  # what was passed over, to look at and to repeat
BAD_IN_A_ROW = 50  # updates that are not finite, after which a run goes back, and then ends
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
        "steps": data.steps, "tile_inputs": config.model.tile_inputs,
        "training_architectures": space.training_architectures,
    }  # fmt: skip
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if space.nets is not None and space.training_architectures is not None:
        raise ValueError(
            f"--training-architectures is {space.training_architectures}, but all of --nets "
            f"{space.nets} are trained on; leave one out"
        )
    _check_ranges(config)
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
    check_not_anothers(run.out)
    latest = Checkpoints(run.out).latest()
    if latest is not None and not run.resume:
        raise ValueError(
            f"{run.out} holds a run of {latest} updates already; add --resume to go on with it, "
            "or give another --out"
        )
    if latest is None and run.resume:
        raise ValueError(
            f"--resume was given, but {run.out} holds no checkpoint; leave it out, or give "
            "--resume auto"
        )
    if run.resume and not run.override:
        check_same(config, TrainConfig.read(Checkpoints(run.out).config()["training"]))


def _check_ranges(config: TrainConfig) -> None:
    """Raises ValueError for numbers that no training works with."""
    o = config.optimiser
    above_zero = {"learning_rate": o.learning_rate, "clip": o.clip, "decay": o.decay,
                  "save_minutes": config.run.save_minutes}  # fmt: skip
    for name, value in above_zero.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: numbers above 0")
    if not 0 <= o.weight_decay < math.inf:
        raise ValueError(f"--weight-decay is {o.weight_decay}; allowed: 0 or more")
    if not 0 <= o.label_smoothing < 1:
        raise ValueError(f"--label-smoothing is {o.label_smoothing}; allowed: 0 to below 1")


def _check_size(ghn: GHN) -> None:
    """Raises ValueError for a hypernetwork of more parameters than can be trained."""
    count = count_parameters(ghn)
    if count > MOST_PARAMETERS:
        raise ValueError(
            f"the hypernetwork has {count:,} parameters, which take {20 * count / 1e9:.0f} GB with "
            f"Adam's state and gradients; allowed: up to {MOST_PARAMETERS:,}. Use --decoder conv "
            "or fewer --tile-channels"
        )


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
    source = architecture_source(config, images.image_size)
    first = jax.process_index() == 0
    mesh = make_mesh()
    checkpoints = Checkpoints(config.run.out)
    ghn, trained = config.ghn(images.task), None
    if config.run.resume and not config.run.override:
        ghn = checkpoints.ghn()
    elif config.model.init is not None:
        ghn, trained = load_ghn(config.model.init)
        if ghn.num_classes != images.num_classes:
            raise ValueError(
                f"--init is {config.model.init}, a hypernetwork for {ghn.num_classes} classes, but "
                f"{images.name} has {images.num_classes}"
            )
    _check_size(ghn)
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
    state, position = step.init(config.run.seed), 0
    if trained is not None:
        state = state._replace(params=jax.device_put(trained["params"], step.replicated))
    if config.run.resume:
        state, position = _load(checkpoints, step, state)
    if first and (config.run.override or not config.run.resume):
        _write_config(checkpoints, ghn, config, images.image_size, int(state.step))
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


def _load(checkpoints: Checkpoints, step: MetaStep, like: TrainState) -> tuple[TrainState, int]:
    """The state of the last checkpoint, and its position in the stream of architectures."""
    trees = {"params": like.params, "training": (like.opt_state, like.step)}
    _, position, trees = checkpoints.load(step.replicated, **trees)
    return TrainState(trees["params"], *trees["training"]), position


def _write_config(
    checkpoints: Checkpoints, ghn: GHN, config: TrainConfig, image_size: int, done: int
) -> None:
    """Writes `config.json`, with the options that have changed on the way."""
    changes = []
    if config.run.resume:
        before = checkpoints.config()
        found = differences(config, TrainConfig.read(before["training"]))
        changes = [*before.get("changes", []), {"updates": done, "options": found}]
    checkpoints.write_config(
        ghn, training=config.describe(), image_size=image_size, changes=changes
    )


class Log:
    """Metrics of updates as a line of JSON each, and a progress bar; of the first process only.

    Args:
      run: what is logged.
      compilations: counts programs.
    """

    def __init__(self, run: Run, compilations: CompilationCounter):
        self._first, self._config = jax.process_index() == 0, run.config
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

    def update(self, step: int, metrics: Metrics, batch: MetaBatch, waited: float) -> Metrics:
        """Logs an update; waits for it to end; returns its metrics as NumPy's.

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
            self._passed_over(step, metrics, batch)
        return metrics

    def _passed_over(self, step: int, metrics: Metrics, batch: MetaBatch) -> None:
        """Says and writes down which architectures and images an update left out."""
        record = {
            "step": step,
            "loss": str(metrics.loss),
            "grad_norm": str(metrics.grad_norm),
            "images": {"seed": self._config.run.seed, "batch": step - 1},
            "architectures": {f"update {step}, {i}": arch.to_dict()
                              for i, arch in enumerate(batch.architectures)},
        }  # fmt: skip
        path = self._config.run.out / BAD_UPDATES
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.say(f"update {step} passed over, as its numbers are not finite (loss {metrics.loss}, "
                 f"norm of the gradient {metrics.grad_norm}): see {path}")  # fmt: skip

    def say(self, text: str) -> None:
        """A line above the bar, from the first process."""
        if self._first:
            self._bar.write(text)

    def end(self, run: Run) -> None:
        """Says what was done."""
        c = self._compilations
        self.say(
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
        beside = path.with_name(path.name + ".part")
        beside.write_text("".join(line + "\n" for line in kept))
        beside.replace(path)


class NotFinite(Exception):
    """Updates in a row that are not finite: too many, or the last ones of a run.

    Attributes:
      updates: how many.
      position: of the stream of architectures, after them.
    """

    def __init__(self, updates: int, position: int):
        super().__init__()
        self.updates, self.position = updates, position


def train(config: TrainConfig, images: Images) -> None:
    """Makes a run's updates; the first process writes metrics, all of them checkpoints.

    Raises:
      Stopped: a signal came; what was done is saved.
      FloatingPointError: the numbers stay not finite; the last good checkpoint is kept.
      ValueError: options that cannot work, or another process runs in the same folder.
    """
    # A file may be found damaged: before a folder is made.
    architecture_source(config, images.image_size)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(lock(config.run.out))
        run, compilations = setup(config, images), CompilationCounter()
        stack.enter_context(closing(run.step))
        stack.enter_context(run.checkpoints)
        listener = stack.enter_context(Listener())
        try:
            _make_updates(run, images, listener, compilations)
        except NotFinite as error:
            run = _go_back(run, error)
            try:
                _make_updates(run, images, listener, compilations)
            except NotFinite as again:
                raise _hopeless(run, again) from None


def _go_back(run: Run, error: NotFinite) -> Run:
    """The run at its last checkpoint, with the architectures after those that failed."""
    if run.checkpoints.latest() is None:
        raise _hopeless(run, error)
    state, _ = _load(run.checkpoints, run.step, run.state)
    run = run._replace(state=state, done=int(state.step), position=error.position)
    tqdm.write(f"the last updates, {error.updates} in a row, were not finite: going back to the "
               f"checkpoint of update {run.done}, on with other architectures")  # fmt: skip
    return run


def _hopeless(run: Run, error: NotFinite) -> FloatingPointError:
    latest = run.checkpoints.latest()
    kept = "there is no checkpoint" if latest is None else f"that of update {latest} is kept"
    path = run.config.run.out / BAD_UPDATES
    return FloatingPointError(
        f"the last updates, {error.updates} in a row, were not finite, and the run ends; {kept}. "
        f"{path} lists them. Try a lower --learning-rate or --clip, or other images"
    )


def _make_updates(
    run: Run, images: Images, listener: Listener, compilations: CompilationCounter
) -> None:
    """From where a run is to its end."""
    config, size, state = run.config, run.config.data.batch_size, run.state
    updates: Iterator[Update] = prefetch(
        (run.step.prepare(batch, size) for batch in run.stream.batches(run.position)), size=_AHEAD
    )
    batches = prefetch(train_batches(images, size, seed=config.run.seed, start_step=run.done))
    alone = jax.process_count() == 1
    bad, due, asked, saved = 0, False, NOTHING, time.monotonic()
    with closing(updates), closing(batches), closing(Log(run, compilations)) as log:
        issued = []
        for step in range(run.done + 1, run.total + 1):
            start = time.perf_counter()
            update, image_batch = next(updates), next(batches)
            waited = time.perf_counter() - start
            late = time.monotonic() - saved > 60 * config.run.save_minutes
            request = STOP if listener.heard else SAVE if late else NOTHING
            state, metrics = run.step(state, update, *image_batch, request)
            issued.append((step, metrics, update.batch, waited))
            last = step == run.total
            due |= last or step % config.run.save_every == 0
            if alone:
                asked = max(asked, request)
            # Read an update late, so that the device has the next one in its queue. Where there are
            # several processes, all of them read there what any asks for, and do it together.
            while len(issued) > (0 if due or asked or bad else 1):
                found = log.update(*issued.pop(0))
                asked = max(asked, int(found.request))
                bad = 0 if found.applied else bad + 1
            if bad >= BAD_IN_A_ROW:
                raise NotFinite(bad, update.batch.position)
            # A state that makes no finite updates takes no good one's place.
            if (due or asked) and not bad:
                run.checkpoints.save(
                    step, update.batch.position,
                    params=state.params, training=(state.opt_state, state.step),
                )  # fmt: skip
                due, saved = False, time.monotonic()
                asked = NOTHING if asked == SAVE else asked
            if asked == STOP:
                done = step if not bad else run.checkpoints.latest()
                log.say(f"stopped; update {done} is saved, and --resume goes on from there")
                raise Stopped
        if bad:
            raise NotFinite(bad, update.batch.position)
        log.end(run)
