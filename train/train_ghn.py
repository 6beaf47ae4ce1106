r"""Trains a graph hypernetwork (paper Eq. 2, § 5.1).

    python train/train_ghn.py --dataset cifar10 --data-dir DIR --preset ghn2 --steps 200 \
        --out runs/x

Every option of the preset can be changed on the command line. `runs/x/metrics.jsonl` gets one
object for each update, `runs/x/checkpoints` the model, the optimizer and the position in the images
and architectures; `--resume` goes on exactly where the last checkpoint was. The README states how
long it takes.

All devices share the work: `--mesh arch=4,data=2` divides the architectures of an update between
four processes, which are started here, and the images between the two devices of each. On several
hosts, run the same command on each with `--coordinator HOST:PORT --process-id I --num-processes N`;
or start a process for each row under Slurm or on GKE, with `--coordinator auto`. `--out` must be a
folder that all of them see.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

from ghn_jax.architecture import Architecture
from ghn_jax.checkpoint import Checkpoints
from ghn_jax.compilation import CompilationCounter, keep_programs
from ghn_jax.deepnets1m import DeepNets1M
from ghn_jax.images import Images, load_images, prefetch, steps_per_epoch, train_batches
from ghn_jax.launch import rows_here, start_rows
from ghn_jax.memory import keep_memory
from ghn_jax.mesh import ARCH, DATA, check_processes, join_processes, make_mesh, parse_mesh
from ghn_jax.metabatch import Stream
from ghn_jax.metastep import MetaStep, Update
from ghn_jax.presets import PRESETS, TrainConfig, preset
from ghn_jax.sampling import sample_architecture, seeded


def parse(arguments: list[str]) -> TrainConfig:
    """Reads the command line: a preset, and options that change it."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="ghn2")
    name = first.parse_known_args(arguments)[0].preset
    default = preset(name)
    return tyro.cli(
        TrainConfig,
        default=default,
        args=arguments,
        description=f"{__doc__}\nPresets: {', '.join(PRESETS)}. Defaults are those of {name}.",
    )


def architecture_source(config: TrainConfig, image_size: int) -> Callable[[int], Architecture]:
    """Position of the stream -> architecture: generated, or from an official file."""
    rules = config.rules(image_size)
    if config.nets is None:
        return lambda position: sample_architecture("train", config.seed, position, rules=rules)
    nets = DeepNets1M.open(
        config.nets, "train", image_size=image_size, rules=rules, seed=config.seed
    )

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return seeded("order of nets", config.seed, epoch).permutation(len(nets))

    def from_file(position: int) -> Architecture:
        # Every pass over the file in an order and with widths of its own.
        epoch, place = divmod(position, len(nets))
        return nets.architecture(int(order(epoch)[place]), seed=config.seed + epoch)

    return from_file


def check(config: TrainConfig) -> None:
    """Raises ValueError for options that cannot work, before any long work.

    Where there are several processes, after they have been joined.
    """
    counts = ("epochs", "batch_size", "meta_batch", "save_every", "workers", "max_nodes",
              "graph_nodes", "tile_channels")  # fmt: skip
    for field in counts:
        value = getattr(config, field)
        if value < 1:
            raise ValueError(f"--{field.replace('_', '-')} is {value}; allowed: 1 or more")
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"--steps is {config.steps}; allowed: 1 or more")
    shape = make_mesh().shape
    for axis, size in (parse_mesh(config.mesh) if config.mesh else {}).items():
        if shape[axis] != size:
            raise ValueError(
                f"--mesh is {config.mesh}, but there are {shape[ARCH]} processes of {shape[DATA]} "
                "devices each; start a process for each row"
            )
    if config.batch_size % shape[DATA]:
        raise ValueError(
            f"--batch-size is {config.batch_size}; allowed: multiples of {shape[DATA]}, the "
            "number of devices that divide the images"
        )
    if config.meta_batch < shape[ARCH]:
        raise ValueError(
            f"--meta-batch is {config.meta_batch}; allowed: {shape[ARCH]} or more, an architecture "
            "for each row of devices; or give them to the images, with --mesh data=COLUMNS"
        )
    latest = Checkpoints(config.out).latest()
    if latest is not None and not config.resume:
        raise ValueError(
            f"{config.out} holds a run of {latest} updates already; add --resume to go on with it, "
            "or give another --out"
        )
    if latest is None and config.resume:
        raise ValueError(f"--resume was given, but {config.out} holds no checkpoint; leave it out")


def trim_metrics(path: Path, steps: int) -> None:
    """Drops records of updates after a checkpoint: they are made again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= steps]
        path.write_text("".join(line + "\n" for line in kept))


def describe(config: TrainConfig) -> dict:
    """The options as JSON-ready data, without which of the processes this one is."""
    launch = ("coordinator", "process_id", "num_processes")
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in launch}
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def train(config: TrainConfig, images: Images) -> None:
    """Runs the updates; the first process writes metrics, all of them checkpoints."""
    first = jax.process_index() == 0
    source = architecture_source(config, images.image_size)
    checkpoints = Checkpoints(config.out)
    per_epoch = steps_per_epoch(images, config.batch_size)
    total = config.steps or config.epochs * per_epoch
    ghn = config.ghn(images.num_classes, images.image_size)
    mesh = make_mesh()
    # A CPU that is one device runs several networks at once.
    shared = jax.default_backend() == "cpu" and mesh.shape[DATA] == 1
    step_fn = MetaStep(
        ghn,
        config.optimizer(per_epoch),
        mesh=mesh,
        smoothing=config.label_smoothing,
        seed=config.seed,
        workers=config.workers if shared else 1,
        dtype=config.dtype,
    )
    state, position = step_fn.init(config.seed), 0
    if config.resume:
        like = {"params": state.params, "training": (state.opt_state, state.step)}
        _, position, trees = checkpoints.load(step_fn.replicated, **like)
        state = type(state)(trees["params"], *trees["training"])
    elif first:
        checkpoints.write_config(ghn, training=describe(config), image_size=images.image_size)
    done = int(state.step)
    stream = Stream(
        ghn,
        source,
        size=config.meta_batch,
        image_size=images.image_size,
        share=(jax.process_index(), jax.process_count()),
        graph_nodes=config.graph_nodes,
        max_nodes=config.max_nodes,
    )
    counter = CompilationCounter()
    metrics_path = config.out / "metrics.jsonl" if first else Path(os.devnull)
    if first:
        trim_metrics(metrics_path, done)

    def save(state, position):
        training = (state.opt_state, state.step)
        checkpoints.save(int(state.step), position, params=state.params, training=training)

    # Architectures come some updates ahead: what they need that is new is compiled meanwhile.
    updates: Iterator[Update] = prefetch(
        (step_fn.prepare(batch, config.batch_size) for batch in stream.batches(position)), size=4
    )
    image_batches = prefetch(
        train_batches(images, config.batch_size, seed=config.seed, start_step=done)
    )
    seen, last = position, time.perf_counter()
    with (
        closing(step_fn),
        closing(updates),
        closing(image_batches),
        metrics_path.open("a", buffering=1) as log,
        tqdm(
            total=total, initial=done, unit="update", dynamic_ncols=True, disable=not first
        ) as bar,
    ):

        def report(step, metrics, batch, waited):
            """Logs an update; waits for it to end."""
            nonlocal seen, last
            metrics = jax.device_get(metrics)
            seconds, last = time.perf_counter() - last, time.perf_counter()
            seen += len(batch.architectures)
            loss = float(metrics.loss)
            record = {
                "step": step,
                "loss": loss if metrics.applied and math.isfinite(loss) else None,
                "top1": float(metrics.top1),
                "seconds": round(seconds, 4),
                "waited": round(waited, 4),
                "nodes": batch.nodes,
                "architectures": seen,
                "compilations": counter.count,
            }
            log.write(json.dumps(record) + "\n")
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", top1=f"{metrics.top1:.1%}", programs=counter.count)
            if first and not metrics.applied:
                bar.write(f"update {step} passed over: loss {loss}, not finite; its architectures "
                          "are left out")  # fmt: skip

        issued = []
        for step in range(done + 1, total + 1):
            start = time.perf_counter()
            update, image_batch = next(updates), next(image_batches)
            waited = time.perf_counter() - start
            state, metrics = step_fn(state, update, *image_batch)
            issued.append((step, metrics, update.batch, waited))
            save_now = step % config.save_every == 0 or step == total
            # Read an update late, so that the device has the next one in its queue.
            while len(issued) > (not save_now):
                report(*issued.pop(0))
            if save_now:
                save(state, update.batch.position)
    if first:
        bar.write(
            f"{total} updates; {counter.count} programs, {counter.seconds:.0f} s compiling them. "
            f"Checkpoint and metrics in {config.out}"
        )


def main(arguments: list[str]) -> None:
    """Entry point."""
    config = parse(arguments)
    launch = config.coordinator, config.process_id, config.num_processes
    check_processes(*launch)
    rows, columns = rows_here(config.mesh, config.coordinator, config.num_processes)
    if rows > 1:
        sys.exit(start_rows(arguments, rows, columns, *launch))
    join_processes(*launch)
    check(config)
    keep_programs(os.environ.get("JAX_COMPILATION_CACHE_DIR", config.cache_dir))
    keep_memory()
    images = load_images(config.dataset, "train", data_dir=config.data_dir)
    train(config, images)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train_ghn.py: {error}")
