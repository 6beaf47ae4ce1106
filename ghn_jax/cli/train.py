r"""Trains a graph hypernetwork (paper Eq. 2, § 5.1).

    ghn-train --dataset cifar10 --data-dir DIR --preset ghn2 --steps 200 --out runs/x

Every option of the preset can be changed on the command line; `--ablation NAME` changes it as a row
of the paper's Tables 5 and 8 does (`ghn_jax/training/ablations.py`). `runs/x/metrics.jsonl` gets
one object for each update, `runs/x/checkpoints` the model, the optimizer and the position in the
images and architectures; `--resume` goes on exactly where the last checkpoint was, with the options
that the run was started with, and `--resume auto` starts where there is nothing to go on with.
SIGTERM and Ctrl-C end a run after the update in work, saved, with exit code 75. `runs/x/train.log`
says when it was started, with what, and how it went on and ended; `--validate-every N` measures a
learning curve on networks and images that are never trained on, and `--tensorboard` draws it.
`--replay UPDATE` repeats one that was not finite, and says which tensors were.

All devices share the work: `--mesh arch=4,data=2` divides the architectures of an update between
four processes, which are started here, and the images between the two devices of each. On several
hosts, run the same command on each with `--coordinator HOST:PORT --process-id I --num-processes N`;
or start a process for each row under Slurm or on GKE, with `--coordinator auto`. `--out` must be a
folder that all of them see.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from ghn_jax.cli import command
from ghn_jax.data.images import Images, load_images
from ghn_jax.engine.compilation import (
    PROGRAM_FOLDER_VARIABLE,
    default_program_folder,
    keep_programs,
)
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.validation import load_validation
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.training.ablations import ABLATIONS, ablate, check_ablation
from ghn_jax.training.config import PRESETS, TrainConfig, preset
from ghn_jax.training.launch import rows_here, start_rows
from ghn_jax.training.loop import check, train
from ghn_jax.training.mesh import check_processes, join_processes
from ghn_jax.training.replay import described, replay

PROG = "ghn-train"


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Reads the command line: a preset, an ablation of it, and options that change it.

    tyro's own presets are subcommands (`ghn-train ghn2 ...`); as options, preset and ablation are
    read first, because the defaults of all others are theirs.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="ghn2")
    first.add_argument("--ablation")
    first.add_argument("--out", type=Path)
    given, _ = first.parse_known_args(arguments)
    default = before = preset(given.preset)
    if given.ablation is not None:
        default = ablate(given.ablation, before)
    found, arguments = _found_run(given.out or default.run.out, arguments)
    if found is not None:
        default, before = found, preset(found.preset)
    config = tyro.cli(
        TrainConfig,
        prog=PROG,
        default=default,
        args=arguments,
        description=(
            f"{__doc__}\nPresets: {', '.join(PRESETS)}. Ablations: {', '.join(ABLATIONS)}. "
            f"Defaults are those of {given.preset}{f', {given.ablation}' * bool(given.ablation)}."
        ),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    check_ablation(config, before)
    return config


def _found_run(out: Path, arguments: Sequence[str]) -> tuple[TrainConfig | None, Sequence[str]]:
    """Where `--resume` finds a run, its options, which are the defaults; and the other arguments.

    `--resume auto` becomes `--resume` where there is a run to go on with, and else nothing.
    `--replay` takes the run's options, too.
    """
    checkpoints = Checkpoints(out)
    if any(argument.split("=")[0] == "--replay" for argument in arguments):
        return _options(checkpoints, out), arguments
    if "--resume" not in arguments:
        return None, arguments
    at = list(arguments).index("--resume")
    auto = list(arguments[at + 1 : at + 2]) == ["auto"]
    there = checkpoints.latest() is not None
    flag = ["--resume"] if there or not auto else []
    arguments = [*arguments[:at], *flag, *arguments[at + 1 + auto :]]
    if not there:
        return None, arguments
    return _options(checkpoints, out), arguments


def _options(checkpoints: Checkpoints, out: Path) -> TrainConfig:
    found = TrainConfig.read(checkpoints.config()["training"])
    if PROGRAM_FOLDER_VARIABLE in os.environ:  # of this machine, not of the one of the run before
        found = found.replace(cache_dir=default_program_folder())
    return found.replace(out=out, resume=False, override=False)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    config = parse(arguments)
    run = config.run
    if run.replay is not None:
        config = config.replace(mesh=None)  # one process is enough
        _get_ready(config)
        print(described(replay(config, _images(config))))
        return
    launch = run.coordinator, run.process_id, run.num_processes
    check_processes(*launch)
    rows, columns = rows_here(run.mesh, run.coordinator, run.num_processes)
    if rows > 1:
        sys.exit(start_rows(arguments, rows, columns, *launch))
    join_processes(*launch)
    _get_ready(config)
    validate = load_validation(config) if run.validate_every else None
    train(config, _images(config), validate)


def _get_ready(config: TrainConfig) -> None:
    check(config)
    keep_programs(config.run.cache_dir)
    keep_memory()


def _images(config: TrainConfig) -> Images:
    data = config.data
    return load_images(data.dataset, "train", data_dir=data.data_dir, image_size=data.image_size)


run = command(PROG, main)

if __name__ == "__main__":
    run()
