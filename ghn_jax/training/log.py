"""What a run shows and writes of its updates: `metrics.jsonl`, a progress bar, TensorBoard's files.

`metrics.jsonl` has a line for each update; what was passed over is in `bad_updates.jsonl`, to look
at and to repeat (`replay.py`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from ghn_jax.engine.compilation import CompilationCounter
from ghn_jax.files.replace import append, write_beside
from ghn_jax.training.config import TrainConfig
from ghn_jax.training.meta_batch import MetaBatch
from ghn_jax.training.train_log import EVENTS
from ghn_jax.training.update import Metrics

BAD_UPDATES = "bad_updates.jsonl"
_EVENTS = "tensorboard"  # folder of TensorBoard's files
_CURVES = ("loss", "top1", "grad_norm", "seconds", "val_top1")  # what TensorBoard draws


class Validated(NamedTuple):
    """Mean accuracy of the networks, a fraction, and the seconds that measuring it took."""

    top1: float
    seconds: float


class Log:
    """The log of updates, from the first process only.

    Args:
      config: of the run.
      done, total: updates that were made, and that there will be.
      architectures: how many the updates so far have taken from the stream.
      compilations: counts programs.
    """

    def __init__(
        self,
        config: TrainConfig,
        done: int,
        total: int,
        architectures: int,
        compilations: CompilationCounter,
    ):
        self._first, self._config = jax.process_index() == 0, config
        self._compilations, self._seen = compilations, architectures
        path = config.run.out / "metrics.jsonl" if self._first else Path(os.devnull)
        if self._first:
            _trim(path, done)
        self._file = path.open("a", buffering=1)
        draws = self._first and config.run.tensorboard
        self._events = _events(config.run.out, done) if draws else None
        self._bar = tqdm(
            total=total, initial=done, unit="update", dynamic_ncols=True, disable=not self._first
        )
        self._shown: dict[str, Any] = {}
        self._last = time.perf_counter()

    def update(
        self,
        step: int,
        metrics: Metrics,
        batch: MetaBatch,
        waited: float,
        validated: Validated | None = None,
    ) -> Metrics:
        """Logs an update; waits for it to end; returns its metrics as NumPy's.

        Args:
          step: its number, from 1.
          metrics, batch: of it.
          waited: seconds that it waited for architectures and images.
          validated: how well networks did after it, where that was measured.
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
            "seconds": round(seconds - (validated.seconds if validated else 0), 4),
            "waited": round(waited, 4),
            "nodes": batch.nodes,
            "architectures": self._seen,
            "compilations": programs,
        }
        if validated:
            record |= {"val_top1": validated.top1, "val_seconds": round(validated.seconds, 4)}
            self._shown = {"val": f"{validated.top1:.1%}"}
        self._file.write(json.dumps(record) + "\n")
        if self._events:
            for name in _CURVES:
                if record.get(name) is not None:
                    self._events.add_scalar(name, record[name], step)
        self._bar.update()
        self._bar.set_postfix(
            loss=f"{loss:.3f}", top1=f"{metrics.top1:.1%}", **self._shown, programs=programs
        )
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
        append(path, json.dumps(record) + "\n")
        self.say(
            f"update {step} passed over, as its numbers are not finite (loss {metrics.loss}, norm "
            f"of the gradient {metrics.grad_norm}): see {path}, and --replay {step}",
            logging.WARNING,
        )

    def say(self, text: str, level: int = logging.INFO) -> None:
        """A line above the bar and in `train.log`, from the first process."""
        if self._first:
            self._bar.write(text)
            EVENTS.log(level, text)

    def close(self) -> None:
        """Closes files and bar."""
        self._bar.close()
        self._file.close()
        if self._events:
            self._events.close()


def _events(out: Path, done: int):
    """A writer of TensorBoard's files, in which a run that goes on hides what it makes again."""
    from tensorboardX import SummaryWriter

    # Files are named after the second they were begun in: going back must not write over one.
    return SummaryWriter(str(out / _EVENTS), purge_step=done + 1, filename_suffix=f".{done}")


def _trim(path: Path, steps: int) -> None:
    """Drops records of updates after a checkpoint: they are made again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= steps]
        write_beside(path, "".join(line + "\n" for line in kept))
