"""Work on many machines: ranges of a split are units that run anywhere, in any order (submitit).

submitit turns units into jobs: of a Slurm job array, requeued where they are preempted or run out
of time, or of processes on this machine. A unit opens the folder of results, computes what is
missing of its range and writes a file of records of its own. One that runs again goes on.

submitit was chosen because it is the one kept library that does just this. It passes units to jobs
by pickles that it writes and reads itself, in `<out>/jobs`; nobody else may be able to write there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from ghn_jax.engine.compilation import keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.experiments.records import count_records

_POLL = 1.0  # seconds between looks at jobs


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """Where networks are computed."""

    # jobs of Slurm or of this machine; default: none, everything in this process
    cluster: Literal["slurm", "local"] | None = None
    unit_size: int = 10  # networks in a job
    jobs: int = 8  # that run at once, at most
    minutes: int = 240  # a job may take; then it is requeued, and goes on
    partition: str | None = None  # of Slurm
    gpus: int = 1  # of a job of Slurm
    cpus: int = 8  # of a job of Slurm


class _Unit:
    """A range of networks, as a job; submitit requeues what has a `checkpoint` method."""

    def __init__(self, run: Callable[[Any], Any], config: Any):
        self.run, self.config = run, config
        self.cache = jax.config.jax_compilation_cache_dir

    def __call__(self) -> None:
        if self.cache is not None:
            keep_programs(self.cache)
        keep_memory()
        self.run(self.config)

    def checkpoint(self):
        """The same unit again: what it has written, it finds."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def units(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` that together are start to stop."""
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


def run_units(run: Callable[[Any], Any], config: Any, start: int, stop: int) -> None:
    """Runs an experiment in jobs, and waits for them.

    Args:
      run: the experiment.
      config: with `cluster`, `start`, `stop`, `unit` and `out`.
      start, stop: which networks.

    Raises:
      ValueError: options that cannot work, or there is no Slurm here.
      ChildProcessError: jobs have failed; the message names their logs.
    """
    options = config.cluster
    for name in ("unit_size", "jobs", "minutes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}; use 1 or "
                             "more")  # fmt: skip
    import submitit  # of an extra

    parts = units(start, stop, options.unit_size)
    jobs = [
        _Unit(run, dataclasses.replace(
            config, start=a, stop=b, unit=f"{a}-{b}", cluster=ClusterConfig()))
        for a, b in parts
    ]  # fmt: skip
    folder = Path(config.out) / "jobs"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        executor = submitit.AutoExecutor(folder, cluster=options.cluster)
    except RuntimeError as error:
        raise ValueError(f"--cluster is {options.cluster}, but {error}") from error
    executor.update_parameters(name="ghn", timeout_min=options.minutes)
    before = count_records(config.out)
    total = stop - start
    with tqdm(total=total, unit="network", desc=options.cluster, dynamic_ncols=True) as bar:
        if options.cluster == "slurm":
            executor.update_parameters(
                slurm_array_parallelism=options.jobs, slurm_partition=options.partition,
                gpus_per_node=options.gpus or None, cpus_per_task=options.cpus,
            )  # fmt: skip
            with executor.batch():
                running = [executor.submit(job) for job in jobs]
            waiting: list[_Unit] = []
        else:
            running, waiting = [], list(jobs)
        done: list = []
        while running or waiting:
            while waiting and len(running) < options.jobs:
                running.append(executor.submit(waiting.pop(0)))
            done += [job for job in running if job.done()]
            running = [job for job in running if job not in done]
            bar.update(count_records(config.out) - before - bar.n)
            time.sleep(_POLL if running or waiting else 0)
    failed = [job for job in done if job.exception() is not None]
    if failed:
        log = failed[0].paths.stderr
        lines = log.read_text().strip().splitlines() if log.exists() else []
        reason = lines[-1] if lines else str(failed[0].exception())
        raise ChildProcessError(
            f"{len(failed)} of {len(jobs)} jobs have failed; what the others computed is kept, the "
            f"same command goes on. The first says {reason!r}: see {log}"
        )
