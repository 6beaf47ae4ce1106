"""Programs that run on any row of a mesh, compiled once for all of them.

XLA makes an executable for certain devices. Rows are alike, so a program is compiled for the first
row that needs it, and the others load what was compiled, with devices of their own; so does the
next process, from the folder of `program_store`. JAX's cache on disk would not do: it has to be
asked with a traced program, its keys name the devices except on GPUs, and processes but the first
do not write to it. XLA's CPU backend also loses part of a program that comes from there and is
saved again (jax 0.10.2), so that these programs are kept out of it.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pickle
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax._src import compiler, config
from jax.experimental import serialize_executable
from jax.sharding import PartitionSpec as P

from ghn_jax.compilation import LOADED_EVENT
from ghn_jax.memory import give_back_memory
from ghn_jax.mesh import Row
from ghn_jax.program_store import ProgramStore, is_known, program_name


@dataclasses.dataclass(frozen=True, eq=False)
class RowFunction:
    """A function that the devices of a row compute together.

    Attributes:
      function: (*static, *arguments) -> results, what one device computes of its parts.
      inputs: for each argument P() where every device has all of it, P('data') where devices have
        parts of its first axis.
      outputs: the same of the results.
      donate: positions of the arguments whose memory the results take over.
      options: for the compiler.
    """

    function: Callable
    inputs: tuple[P, ...]
    outputs: Any
    donate: tuple[int, ...] = ()
    options: dict[str, Any] | None = None

    def describe(self) -> tuple:
        """All of it, as data."""
        names = self.function.__module__, self.function.__qualname__
        return *names, self.inputs, self.outputs, self.donate, self.options


def _shape(leaf) -> tuple:
    return leaf.shape, leaf.dtype


class RowPrograms:
    """Calls functions on rows, from a thread for each row; holds their compiled programs."""

    def __init__(self):
        self._programs: dict[Hashable, dict[int, jax.stages.Compiled]] = {}  # last used last
        self._compiled: dict[Hashable, tuple[Row, jax.stages.Compiled]] = {}
        self._locks: dict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._guard = threading.Lock()
        # Loading is mostly asking for memory, which threads only do one at a time.
        self._compiling = threading.Semaphore(os.cpu_count() or 1)
        self._loading = threading.Lock()
        self._store = ProgramStore()

    @property
    def count(self) -> int:
        """Programs that it holds."""
        return sum(map(len, self._programs.values()))

    def forget_half(self) -> None:
        """Forgets the half of the programs that were not used for longest; none may be running."""
        for key in list(self._programs)[: (len(self._programs) + 1) // 2]:
            del self._programs[key]
            self._compiled.pop(key, None)

    def __call__(self, row: Row, function: RowFunction, static: tuple, *arguments):
        """The function's results on a row.

        Args:
          row: whose devices run it.
          function: what they run.
          static: hashable leading arguments, with a `repr` that says all about them.
          *arguments: arrays on the row's devices as `function.inputs` says, or NumPy arrays.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, static, tree, tuple(map(_shape, leaves)))
        with self._guard:
            programs = self._programs.pop(key, {})
            self._programs[key] = programs
        if row.index not in programs:
            self._make(programs, key, row, arguments)
        return programs[row.index](*arguments)

    def _make(self, programs, key, row: Row, arguments) -> None:
        with self._guard:
            lock = self._locks[key]
        with lock:  # another row may be compiling it
            if row.index not in programs:
                programs[row.index] = self._load_or_compile(key, row, arguments)

    def _load_or_compile(self, key, row: Row, arguments) -> jax.stages.Compiled:
        function, static, tree, shapes = key
        name = program_name(
            row.devices[0], row.axis, row.mesh.size, function.describe(), static, tree, shapes
        )
        known = all(map(is_known, static))
        data = self._store.load(name) if known else None
        if data is None and key in self._compiled:
            data = _dump(*self._compiled[key])
        if data is not None:
            start = time.perf_counter()
            with self._loading:
                program = _load(data, row)
                give_back_memory()
            jax.monitoring.record_event_duration_secs(LOADED_EVENT, time.perf_counter() - start)
            return program
        with self._compiling:
            program = _compile(row, function, static, arguments, name)
            give_back_memory()
        self._compiled[key] = row, program
        if known and self._store.folder is not None:
            self._store.save(name, _dump(row, program))
        return program


def _compile(
    row: Row, function: RowFunction, static: tuple, arguments, name: str
) -> jax.stages.Compiled:
    def compute(*arguments):
        return function.function(*static, *arguments)

    # A name that nothing in JAX's cache has.
    compute.__name__ = f"{function.function.__name__}_{name}"
    if row.axis is not None:
        compute = jax.shard_map(
            compute,
            mesh=row.mesh,
            in_specs=function.inputs,
            out_specs=function.outputs,
            check_vma=False,  # of gradients by hand, which it knows nothing about
        )
    program = jax.jit(
        compute,
        in_shardings=tuple(map(row.sharding, function.inputs)),
        out_shardings=jax.tree.map(row.sharding, function.outputs),
        donate_argnums=function.donate,
        compiler_options=function.options,
    )
    lowered = program.lower(*arguments)
    with config.persistent_cache_min_compile_time_secs(math.inf):
        return lowered.compile()


def _dump(row: Row, program: jax.stages.Compiled) -> bytes:
    """A program compiled for a row."""
    return pickle.dumps(([d.id for d in row.devices], *serialize_executable.serialize(program)))


def _load(data: bytes, row: Row) -> jax.stages.Compiled:
    """A program compiled for one row, for the devices of another."""
    ids, data, in_tree, out_tree = pickle.loads(data)
    devices = row.devices
    replacement = dict(zip(ids, devices, strict=True))
    # As JAX's cache on disk does; `deserialize_and_load` keeps the devices it was compiled for.
    options = compiler.get_compile_options(1, len(devices), [[d.id for d in devices]])

    class Unpickler(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, pid):
            if pid[0] == "device":
                return replacement[pid[1]]
            if pid[0] == "exec":
                return self.backend.deserialize_executable(pid[1], self.execution_devices, options)
            return super().persistent_load(pid)

    unloaded, info, no_kwargs = Unpickler(io.BytesIO(data), devices[0].client, devices).load()
    return jax.stages.Compiled(
        unloaded.load(), [], in_tree.unflatten(info), out_tree, no_kwargs=no_kwargs
    )
