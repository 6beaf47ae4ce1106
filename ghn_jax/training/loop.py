"""The training loop: sets up a run, makes its updates, logs them and saves (paper § 5.1)."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from ghn_jax.data.images import Images, prefetch, steps_per_epoch, train_batches
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.programs import Programs
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.hypernet.ghn import GHN, count_parameters
from ghn_jax.hypernet.identity_start import check_identity
from ghn_jax.training.architectures import architecture_source
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.log import BAD_UPDATES, Log, Validated
from ghn_jax.training.mesh import ARCH, DATA, make_mesh, networks_at_once, parse_mesh
from ghn_jax.training.meta_batch import Stream
from ghn_jax.training.run_folder import check_not_anothers, check_same, differences, lock
from ghn_jax.training.stopping import NOTHING, SAVE, STOP, Listener, Stopped
from ghn_jax.training.train_log import EVENTS, train_log
from ghn_jax.training.update import MetaStep, TrainState, Update

MOST_PARAMETERS = 10**9  # of a hypernetwork: 20 GB with its gradients and Adam's state
SHARD_FROM = 10**7  # parameters, from which on several devices share a hypernetwork's state
BAD_IN_A_ROW = 50  # updates that are not finite, after which a run goes back, and then ends
Validate = Callable[[GHN, Any, Engine], Validated]  # a hypernetwork, its parameters, an engine
_AHEAD = 4  # updates that architectures come ahead by, so that what is new gets compiled meanwhile


def check(config: TrainConfig) -> None:
    """Raises ValueError for options that cannot work, before any long work.

    Where there are several processes, after they have been joined.

    Raises:
      ModuleNotFoundError: an option needs a library that is not installed.
    """
    data, space, run = config.data, config.space, config.run
    counts = {
        "epochs": data.epochs, "batch_size": data.batch_size, "meta_batch": space.meta_batch,
        "save_every": run.save_every, "workers": run.workers, "max_nodes": space.max_nodes,
        "graph_nodes": space.graph_nodes, "tile_channels": config.model.tile_channels,
        "steps": data.steps, "tile_inputs": config.model.tile_inputs,
        "tile_size": config.model.tile_size,
        "features": config.model.features, "layers": config.model.layers,
        "heads": config.model.heads, "rank": config.model.rank,
        "factor_size": config.model.factor_size,
        "training_architectures": space.training_architectures,
        "validate_every": run.validate_every, "validate_nets": run.validate_nets,
        "replay": run.replay,
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
    # Of any task: raises for choices that do not go together.
    check_identity(config.ghn(Task()), config.model.identity)
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
    if run.tensorboard:
        importlib.import_module("tensorboardX")  # else ModuleNotFoundError, now
    if run.replay is None:
        _check_folder(config)


def _check_folder(config: TrainConfig) -> None:
    """Raises ValueError where a run cannot start in its folder, or go on there."""
    run = config.run
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
    at_least_zero = {"weight_decay": o.weight_decay, "norm_penalty": o.norm_penalty,
                     "warmup_epochs": o.warmup_epochs,
                     "identity": config.model.identity}  # fmt: skip
    for name, value in at_least_zero.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 0 or more")
    for name, value in {"label_smoothing": o.label_smoothing, "average": o.average}.items():
        if not 0 <= value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 0 to below 1")


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


def setup(config: TrainConfig, images: Images, programs: Programs | None = None) -> Run:
    """Makes a new run, or loads its last checkpoint; writes `config.json`."""
    run = new_run(config, images, programs)
    if config.run.resume:
        run = at_checkpoint(run)
    if jax.process_index() == 0:
        _write_config(run.checkpoints, run.step.ghn, config, images.image_size, run.done)
    return run


def new_run(config: TrainConfig, images: Images, programs: Programs | None = None) -> Run:
    """A run before its first update; nothing is written."""
    source = architecture_source(config, images.image_size)
    mesh = make_mesh()
    checkpoints = Checkpoints(config.run.out)
    ghn, trained = config.ghn(images.task), None
    if config.run.resume and not config.run.override:
        ghn = checkpoints.ghn()
    elif config.model.init is not None:
        ghn, trained = GHN.from_pretrained(config.model.init)
        if ghn.num_classes != images.num_classes:
            raise ValueError(
                f"--init is {config.model.init}, a hypernetwork for {ghn.num_classes} classes, but "
                f"{images.name} has {images.num_classes}"
            )
    _check_size(ghn)
    per_epoch = steps_per_epoch(images, config.data.batch_size)
    total = config.data.steps or config.data.epochs * per_epoch
    step = MetaStep(
        ghn,
        config.optimiser.make(per_epoch, total),
        mesh=mesh,
        smoothing=config.optimiser.label_smoothing,
        norm_penalty=config.optimiser.norm_penalty,
        average=config.optimiser.average,
        identity=config.model.identity,
        seed=config.run.seed,
        workers=networks_at_once(config.run.workers, mesh),
        dtype=config.run.dtype,
        shard=mesh.size > 1 and count_parameters(ghn) >= SHARD_FROM,
        programs=programs,
    )
    state = step.init(config.run.seed)
    if trained is not None:
        params = jax.device_put(trained["params"], step.replicated)
        average = None if state.average is None else jax.tree.map(jnp.copy, params)  # both donated
        state = step.place(step.whole(state)._replace(params=params, average=average))
    stream = Stream(
        ghn,
        source,
        size=config.space.meta_batch,
        image_size=images.image_size,
        share=(jax.process_index(), jax.process_count()),
        graph_nodes=config.space.graph_nodes,
        max_nodes=config.space.max_nodes,
    )
    return Run(config, step, state, 0, total, 0, stream, checkpoints)


def _trees(state: TrainState) -> dict[str, Any]:
    """A state as the trees of a checkpoint: what predicts, and what training goes on with."""
    training = (state.opt_state, state.step)
    if state.average is not None:
        training += (state.params,)
    return {"params": state.trained, "training": training}


def at_checkpoint(run: Run, upto: int | None = None) -> Run:
    """The run at its last checkpoint, or at the last one of so many updates."""
    step = run.step
    _, position, trees = run.checkpoints.load(step.replicated, upto=upto, **_trees(run.state))
    opt_state, count, *params = trees["training"]
    if params:
        state = TrainState(params[0], opt_state, count, average=trees["params"])
    else:
        state = TrainState(trees["params"], opt_state, count)
    state = step.place(state)
    return run._replace(state=state, done=int(state.step), position=position)


def _write_config(
    checkpoints: Checkpoints, ghn: GHN, config: TrainConfig, image_size: int, done: int
) -> None:
    """Writes `config.json`, with the options that have changed on the way.

    Of a run that goes on, too: how long it is to be may have changed.
    """
    changes = []
    if config.run.resume:
        before = checkpoints.config()
        changes = before.get("changes", [])
        if config.run.override:
            found = differences(config, TrainConfig.read(before["training"]))
            changes = [*changes, {"updates": done, "options": found}]
    checkpoints.write_config(
        ghn, training=config.describe(), image_size=image_size, changes=changes
    )


class NotFinite(Exception):
    """Updates in a row that are not finite: too many, or the last ones of a run.

    Attributes:
      updates: how many.
      position: of the stream of architectures, after them.
    """

    def __init__(self, updates: int, position: int):
        super().__init__()
        self.updates, self.position = updates, position


def train(
    config: TrainConfig,
    images: Images,
    validate: Validate | None = None,
    programs: Programs | None = None,
) -> None:
    """Makes a run's updates; the first process writes metrics, all of them checkpoints.

    Args:
      config: its options.
      images: to train on.
      validate: measures a point of the learning curve; see `evaluation/validation.py`.
      programs: of runs before, so that what they share is not compiled again; whoever gives them
        closes them.

    Raises:
      Stopped: a signal came; what was done is saved.
      FloatingPointError: the numbers stay not finite; the last good checkpoint is kept.
      ValueError: options that cannot work, or another process runs in the same folder.
    """
    # A file may be found damaged: before a folder is made.
    architecture_source(config, images.image_size)
    if config.run.validate_every and validate is None:
        raise ValueError(
            f"--validate-every is {config.run.validate_every}, but there is nothing to measure; "
            "give train() what load_validation(config) returns"
        )
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(lock(config.run.out))
            stack.enter_context(train_log(config))
        run, compilations = setup(config, images, programs), CompilationCounter()
        stack.enter_context(closing(run.step))
        stack.enter_context(run.checkpoints)
        listener = stack.enter_context(Listener())
        if run.done:
            EVENTS.info("resumed after update %d", run.done)
        try:
            _make_updates(run, images, validate, listener, compilations)
        except NotFinite as error:
            run = _go_back(run, error)
            try:
                _make_updates(run, images, validate, listener, compilations)
            except NotFinite as again:
                raise _hopeless(run, again) from None


def _go_back(run: Run, error: NotFinite) -> Run:
    """The run at its last checkpoint, with the architectures after those that failed."""
    if run.checkpoints.latest() is None:
        raise _hopeless(run, error)
    run = at_checkpoint(run)._replace(position=error.position)
    text = (
        f"the last updates, {error.updates} in a row, were not finite: going back to the "
        f"checkpoint of update {run.done}, on with other architectures"
    )
    tqdm.write(text)
    EVENTS.warning(text)
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
    run: Run,
    images: Images,
    validate: Validate | None,
    listener: Listener,
    compilations: CompilationCounter,
) -> None:
    """From where a run is to its end."""
    config, size, state = run.config, run.config.data.batch_size, run.state
    updates: Iterator[Update] = prefetch(
        (run.step.prepare(batch, size) for batch in run.stream.batches(run.position)), size=_AHEAD
    )
    batches = prefetch(train_batches(images, size, seed=config.run.seed, start_step=run.done))
    alone = jax.process_count() == 1
    bad, due, asked, saved = 0, False, NOTHING, time.monotonic()
    log, issued = Log(config, run.done, run.total, run.position, compilations), []

    def read() -> None:
        """Waits for the first of the updates that are issued."""
        nonlocal asked, bad
        found = log.update(*issued.pop(0))
        asked = max(asked, int(found.request))
        bad = 0 if found.applied else bad + 1

    with closing(updates), closing(batches), closing(log):
        for step in range(run.done + 1, run.total + 1):
            start = time.perf_counter()
            update, image_batch = next(updates), next(batches)
            waited = time.perf_counter() - start
            late = time.monotonic() - saved > 60 * config.run.save_minutes
            request = STOP if listener.heard else SAVE if late else NOTHING
            state, metrics = run.step(state, update, *image_batch, request)
            validated = None
            every = config.run.validate_every
            if every and validate and step % every == 0:
                while issued:  # measuring is not of their time
                    read()
                params = run.step.whole(state.trained)  # of all processes
                if jax.process_index() == 0:
                    validated = validate(run.step.ghn, params, run.step.engine)
            issued.append((step, metrics, update.batch, waited, validated))
            last = step == run.total
            due |= last or step % config.run.save_every == 0
            if alone:
                asked = max(asked, request)
            # Read an update late, so that the device has the next one in its queue. Where there are
            # several processes, all of them read there what any asks for, and do it together.
            while len(issued) > (0 if due or asked or bad else 1):
                read()
            if bad >= BAD_IN_A_ROW:
                raise NotFinite(bad, update.batch.position)
            # A state that makes no finite updates takes no good one's place.
            if (due or asked) and not bad:
                trees = _trees(run.step.whole(state))
                run.checkpoints.save(step, update.batch.position, **trees)
                due, saved = False, time.monotonic()
                asked = NOTHING if asked == SAVE else asked
            if asked == STOP:
                done = step if not bad else run.checkpoints.latest()
                log.say(f"stopped; update {done} is saved, and --resume goes on from there")
                raise Stopped
        if bad:
            raise NotFinite(bad, update.batch.position)
        log.say(
            f"{run.total} updates; {compilations.count} programs, {compilations.seconds:.0f} s "
            f"compiling them. Checkpoint and metrics in {config.run.out}"
        )
