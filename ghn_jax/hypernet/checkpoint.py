"""Hypernetworks on disk: an Orbax checkpoint and a plain JSON file with the configuration.

A folder holds `config.json` and `checkpoints/<step>/`. Training runs have the same layout, so what
reads a saved hypernetwork reads a run. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ghn_jax.files.digest import digest_of_arrays, with_digest, without_digest
from ghn_jax.files.json_file import read_json
from ghn_jax.files.messages import in_a_line
from ghn_jax.files.replace import write_beside
from ghn_jax.hypernet.ghn import GHN, check_hypernetwork

CONFIG, _CHECKPOINTS, _SET_ASIDE = "config.json", "checkpoints", "set_aside"
UNTRAINED = "untrained GHN-2"  # of `load_ghns` without a source


def ghn_config(ghn: GHN) -> dict[str, Any]:
    """The fields of a hypernetwork, as JSON-ready data."""
    names = [f.name for f in dataclasses.fields(ghn) if f.name not in ("parent", "name")]
    return {name: getattr(ghn, name) for name in names}


# Fields that came later: a checkpoint without one is of their default.
_LATER = {
    "decoder", "fan", "shape_encoding", "stack", "rounds", "forward_only", "layers", "heads",
    "remat", "bfloat16", "rank", "factor_size",
}  # fmt: skip


def ghn_from_config(config: dict[str, Any], path: Path) -> GHN:
    """The hypernetwork of `ghn_config`'s data, read from a path.

    Raises:
      ValueError: they are of no hypernetwork of this version.
    """
    if "hypernet" in config and "encoder" not in config:  # what the field was called at first
        config = {"encoder" if k == "hypernet" else k: v for k, v in config.items()}
    fields = set(ghn_config(GHN()))
    if not fields - _LATER <= set(config) <= fields:
        raise ValueError(
            f"{path} describes a hypernetwork by {sorted(config)}, expected {sorted(fields)}; "
            "it is not one of this version's checkpoints"
        )
    return GHN(**{**config, "max_shape": tuple(config["max_shape"])})


class Checkpoints:
    """The checkpoints of one folder.

    Every call opens the folder by itself, and saving takes as long as it takes. As a context
    manager it stays open, and saves in the background:

        with Checkpoints("runs/ghn2") as checkpoints:
            checkpoints.save(100, position, params=params)  # goes on while it is written

    Args:
      path: the folder.
      keep: how many of the latest checkpoints to keep.
    """

    def __init__(self, path: str | Path, *, keep: int = 2):
        self.path = Path(path)
        self._keep = keep
        self._held: ocp.training.Checkpointer | None = None
        self._step = 0  # that was saved last
        self._pending: tuple[int, Any] | None = None

    def __enter__(self) -> Checkpoints:
        self._held = self._new()
        return self

    def __exit__(self, *error) -> None:
        held, self._held = self._held, None
        assert held is not None
        try:
            self._finish()
        finally:
            with _as_one_sentence(self.path, self._step):
                held.close()

    def _new(self) -> ocp.training.Checkpointer:
        context = ocp.Context()
        # Some megabytes: written by one device, without programs that cut a part for each.
        context.array_options.saving.use_replica_parallel = False
        return ocp.training.Checkpointer(
            (self.path / _CHECKPOINTS).absolute(),
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            lightweight_initialize=True,  # one that is damaged keeps nobody from the others
        )

    def _open(self) -> contextlib.AbstractContextManager[ocp.training.Checkpointer]:
        return contextlib.nullcontext(self._held) if self._held is not None else self._new()

    def write_config(self, ghn: GHN, **more: Any) -> None:
        """Writes `config.json`: the hypernetwork's fields and whatever else is JSON."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(with_digest({"ghn": ghn_config(ghn), **more}), indent=2)
        write_beside(self.path / CONFIG, text + "\n")

    def config(self) -> dict[str, Any]:
        """Reads `config.json`.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is not what `write_config` writes.
        """
        path = self.path / CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.path} holds no {CONFIG}; give a folder written by training or by save_ghn"
            )
        config = read_json(path, "restore it from a copy")
        if not isinstance(config, dict) or not isinstance(config.get("ghn"), dict):
            raise ValueError(f"{path} is damaged; it should be JSON with a key 'ghn'")
        return without_digest(config, path)

    def ghn(self) -> GHN:
        """The hypernetwork that `config.json` describes."""
        return ghn_from_config(self.config()["ghn"], self.path / CONFIG)

    def latest(self) -> int | None:
        """The last checkpoint's step, None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps of all checkpoints, ascending.

        Nothing is read and JAX is not asked: one may be damaged, and processes may have to join.
        """
        folder = self.path / _CHECKPOINTS  # what is not finished has an ending
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, position: int, **trees: Any) -> None:
        """Saves trees of arrays under a step, with a position of the architecture stream.

        Checkpoints of later steps, which are damaged or of a run that has gone back, are moved to
        the folder `set_aside`. Where there are several processes, all of them call this, as they do
        `load`.

        Raises:
          OSError: this checkpoint, or the one that was written in the background, could not be
            written; those before it are as they were.
        """
        self._finish()
        # Copies: what is saved in the background must not change with the next update.
        trees = jax.tree.map(lambda x: np.array(x, jax.dtypes.canonicalize_dtype(x.dtype)), trees)
        digests = {name: _digest(step, position, tree) for name, tree in trees.items()}
        self._step = step
        with _as_one_sentence(self.path, step), self._open() as checkpointer:
            if self._set_aside(step):
                checkpointer.reload()
            response = checkpointer.save_checkpointables_async(
                step, trees, overwrite=True,
                custom_metadata={"position": position, "digests": digests},
            )  # fmt: skip
            if response is None:
                raise OSError("Orbax has declined to save it")
            if self._held is not None:
                self._pending = step, response
            else:
                response.result()

    def _set_aside(self, step: int) -> bool:
        """Moves checkpoints of later steps away, before which Orbax saves none: were there any?"""
        later = [after for after in self.steps() if after > step]
        several, any_later = jax.process_count() > 1, bool(later)
        if several:  # the first one looks, for all
            any_later = bool(multihost_utils.broadcast_one_to_all(np.int32(any_later)))
        if any_later and jax.process_index() == 0:
            aside = self.path / _SET_ASIDE
            aside.mkdir(exist_ok=True)
            for after in later:
                names = (f"{after}.{i}" if i else str(after) for i in itertools.count())
                free = next(aside / name for name in names if not (aside / name).exists())
                (self.path / _CHECKPOINTS / str(after)).rename(free)
        if any_later and several:
            multihost_utils.sync_global_devices(f"later checkpoints than {step} are set aside")
        return any_later

    def _finish(self) -> None:
        """Waits for what is written in the background."""
        if self._pending is not None:
            (step, response), self._pending = self._pending, None
            with _as_one_sentence(self.path, step):
                response.result()

    def load(
        self, sharding: jax.sharding.Sharding | None = None, *, upto: int | None = None, **like: Any
    ) -> tuple[int, int, dict[str, Any]]:
        """Loads trees from the last checkpoint, whatever devices it was saved from.

        If that one is damaged, a warning says so, and the one before it is loaded.

        Args:
          sharding: where the arrays go; to JAX's first device if not given.
          upto: the last step that it may be of, where it is not to be the last of all.
          **like: for each tree the shapes and types expected of it.

        Returns:
          (step, position, trees).

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: a tree's names, shapes or types are not those expected, or all checkpoints
            are damaged.
        """
        self._finish()
        steps = [step for step in self.steps() if upto is None or step <= upto]
        if not steps:
            raise FileNotFoundError(
                f"{self.path} holds no checkpoint; give a folder written by training or by save_ghn"
            )
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        problem = ""
        with _quiet():
            for step in reversed(steps):
                try:
                    found = self._load(step, sharding, like)
                except _Misfit as error:
                    misfit, damage = error, str(error)
                except Exception as error:  # damage comes out of Orbax as any of many kinds
                    misfit, damage = None, in_a_line(error)
                else:
                    break
                _settle()
                if not problem:
                    problem, first = (
                        f"checkpoint {step} in {self.path} is damaged ({damage})",
                        misfit,
                    )
            else:
                raise first or ValueError(
                    f"{problem}, and none before it can be read; restore the folder from a copy"
                )
        if problem:
            warnings.warn(f"{problem}; going on from checkpoint {step}", stacklevel=3)
        return found

    def _load(self, step: int, sharding, like: dict[str, Any]):
        folder = (self.path / _CHECKPOINTS / str(step)).absolute()
        metadata = ocp.checkpointables_metadata(folder)
        for name, tree in like.items():
            _check(self.path, name, tree, metadata.metadata.get(name))
        abstract = {
            name: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
            )
            for name, tree in like.items()
        }
        trees = ocp.load_checkpointables(folder, abstract)
        position = int(metadata.custom_metadata["position"])
        # Checkpoints of before have none.
        for name, digest in metadata.custom_metadata.get("digests", {}).items():
            if name in trees and _digest(step, position, trees[name]) != digest:
                raise ValueError(f"the numbers of {name!r} are not those that were saved")
        return step, position, trees


def _digest(step: int, position: int, tree: Any) -> str:
    """SHA-256 of a checkpoint's place and of a tree's numbers, in the order of its leaves."""
    return digest_of_arrays(jax.tree.leaves(tree), f"{step} {position}")


def _settle() -> None:
    """What Orbax has left waiting says so when it is dropped, or a moment later."""
    gc.collect()
    time.sleep(0.05)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Orbax says of damage and full disks is left out: it is told in a sentence."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def others(unraisable) -> None:
        # Reads and writes that were on their way report to an event loop that is closed by now.
        if unraisable.object is not None or not isinstance(unraisable.exc_value, RuntimeError):
            hook(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = others
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _as_one_sentence(path: Path, step: int) -> Iterator[None]:
    """What goes wrong while a checkpoint is written, whatever Orbax makes of it."""
    with _quiet():
        try:
            yield
        except Exception as error:  # a full disk comes out as any of several kinds
            _settle()
            raise OSError(
                f"checkpoint {step} could not be written to {path} ({in_a_line(error)}); the one "
                "before it is as it was. Make room, and go on with --resume"
            ) from error


class _Misfit(ValueError):
    """A checkpoint of another module."""


def _shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]

    def name(path):
        # A restored tree has dictionaries and lists where the one saved had named tuples.
        return "/".join(
            str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path
        )

    return {name(path): tuple(leaf.shape) for path, leaf in leaves}


def _check(path: Path, name: str, expected: Any, found: Any) -> None:
    """Orbax may load a tree in part where it does not match, so compare it first."""
    if found is None:
        raise _Misfit(f"{path} holds no {name!r}; it was not written for this purpose")
    want, have = _shapes(expected), _shapes(found)
    if want != have:
        wrong = [k for k in want if have.get(k, want[k]) != want[k]]
        wrong += sorted(set(want) ^ set(have))
        example = ", ".join(f"{k}: {have.get(k)} for {want.get(k)}" for k in wrong[:3])
        raise _Misfit(
            f"the checkpoint in {path} does not fit the module: {len(wrong)} arrays of {name!r} "
            f"differ (found for expected: {example}); use the configuration it was saved with"
        )


def save_ghn(
    path: str | Path, ghn: GHN, variables: Any, *, about: Mapping[str, Any] | None = None
) -> None:
    """Saves a hypernetwork to a new folder.

    Args:
      path: a folder that does not exist yet, or is empty.
      ghn: the module.
      variables: {'params': ...} of it.
      about: JSON-ready; what it says about itself (`ghn_jax.interop.pretrained.about`).

    Raises:
      FileExistsError: the folder holds something already; it is left as it is.
      TypeError: something else than a hypernetwork or its variables.
    """
    check_hypernetwork(ghn, variables)
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; give a new folder to save_ghn")
    checkpoints = Checkpoints(path)
    checkpoints.write_config(ghn, **(about or {}))
    checkpoints.save(0, 0, params=variables["params"])


def load_ghn(path: str | Path) -> tuple[GHN, dict]:
    """Loads a hypernetwork from a folder that `save_ghn` or a training run wrote.

    Returns:
      The module and its variables, from the last checkpoint.

    Raises:
      FileNotFoundError: the folder holds no hypernetwork.
      ValueError: the checkpoint does not fit the module that its configuration describes.
    """
    checkpoints = Checkpoints(path)
    ghn = checkpoints.ghn()
    like = jax.eval_shape(lambda: ghn.init_variables(0))["params"]
    _, _, trees = checkpoints.load(params=like)
    return ghn, {"params": trees["params"]}


def load_ghns(sources: Iterable[str | Path]) -> dict[str, tuple[GHN, dict]]:
    """Several hypernetworks, by the names of their folders or files; an untrained GHN-2 if none.

    Raises:
      ValueError: two of them have the same name; see also `GHN.from_pretrained`.
    """
    paths = list(map(Path, sources))
    names = [path.name if path.is_dir() else path.stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two hypernetworks are called {name!r}; rename one")
    if not paths:
        ghn = GHN()
        return {UNTRAINED: (ghn, ghn.init_variables(0))}
    return dict(zip(names, map(GHN.from_pretrained, paths), strict=True))
