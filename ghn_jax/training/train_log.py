"""`train.log`: what happened to a run, for people; a line with its time for each event.

Start, options, versions, devices, warnings, and how it went on and ended. The file is appended to,
so it tells the whole story of a run that was stopped and resumed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import platform
import warnings
from collections.abc import Iterator

import jax

from ghn_jax.training.config import TrainConfig
from ghn_jax.training.stopping import Stopped

TRAIN_LOG = "train.log"
_PACKAGES = ("ghn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

EVENTS = logging.getLogger("ghn_jax.run")  # of the run, for its file alone
EVENTS.setLevel(logging.INFO)
EVENTS.propagate = False
EVENTS.addHandler(logging.NullHandler())  # in processes that write no file
_PACKAGE = logging.getLogger("ghn_jax")  # what else there is to say goes to the terminal, too


class _OneLine(logging.Formatter):
    """Whatever a library says, an event is one line."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())


@contextlib.contextmanager
def train_log(config: TrainConfig) -> Iterator[None]:
    """Writes the run's events, warnings and end to its `train.log`; its folder must be there."""
    file = logging.FileHandler(config.run.out / TRAIN_LOG)
    file.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    show = warnings.showwarning

    def note(message, category, *where, **more):
        EVENTS.warning("%s: %s", category.__name__, message)
        show(message, category, *where, **more)

    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        # Python shows a warning on the terminal only where no handler takes it.
        if not _PACKAGE.hasHandlers():
            assert logging.lastResort is not None
            stack.enter_context(_handler(_PACKAGE, logging.lastResort))
        stack.enter_context(_handler(_PACKAGE, file))
        stack.enter_context(_handler(EVENTS, file))
        stack.callback(setattr, warnings, "showwarning", show)
        warnings.showwarning = note
        _start(config)
        try:
            yield
        except Stopped:
            raise  # the loop says where
        except BaseException as error:
            EVENTS.error("ended by %s: %s", type(error).__name__, error)
            raise


@contextlib.contextmanager
def _handler(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _start(config: TrainConfig) -> None:
    """What the run is started with, and where."""
    EVENTS.info("started, options %s", json.dumps(config.describe()))
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    EVENTS.info("versions: %s; %s", ", ".join(versions), platform.platform())
    kinds = [device.device_kind for device in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds)))
    EVENTS.info("devices: %s; processes: %d", devices, jax.process_count())
