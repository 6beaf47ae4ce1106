"""Programs that run on any row of a mesh, compiled once for all of them.

XLA makes an executable for certain devices. Rows are alike, so a program is compiled for the first
row that needs it, and the others load what was compiled, with devices of their own. Measured on a
CPU core (one of the executor's smallest programs): compiled in 5-14 s, loaded in 0.3-0.8 s. JAX's
cache on disk alone would not do: except on GPUs its keys name the devices, and processes but the
first do not write to it. A program that comes from there is not handed on, though: XLA's CPU
backend loses part of one that it loads twice (jax 0.10.2). Every row then asks that cache itself.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax._src import compiler
from jax.experimental import serialize_executable
from jax.sharding import PartitionSpec as P

from ghn_jax.mesh import Row


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


def _shape(leaf) -> tuple:
    return leaf.shape, leaf.dtype


class RowPrograms:
    """Calls functions on rows, from a thread for each row; holds their compiled programs."""

    def __init__(self):
        self._programs: dict[Hashable, dict[int, jax.stages.Compiled]] = {}
        self._compiled: dict[Hashable, tuple[Row, jax.stages.Compiled]] = {}
        self._locks: dict[Hashable, threading.Lock] = collections.defaultdict(threading.Lock)
        self._guard = threading.Lock()
        self._compiling = threading.Semaphore(os.cpu_count() or 1)

    @property
    def count(self) -> int:
        """Programs compiled or loaded so far."""
        return sum(map(len, self._programs.values()))

    def clear(self) -> None:
        """Forgets all programs; none may be running."""
        self._programs.clear()
        self._compiled.clear()

    def __call__(self, row: Row, function: RowFunction, static: tuple, *arguments):
        """The function's results on a row.

        Args:
          row: whose devices run it.
          function: what they run.
          static: hashable leading arguments.
          *arguments: arrays on the row's devices as `function.inputs` says, or NumPy arrays.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, static, tree, tuple(map(_shape, leaves)))
        program = self._programs.get(key, {}).get(row.index)
        if program is None:
            program = self._make(key, row, function, static, arguments)
        return program(*arguments)

    def _make(self, key, row: Row, function: RowFunction, static, arguments):
        with self._guard:
            lock = self._locks[key]
        with lock:  # another row may be compiling it
            programs = self._programs.setdefault(key, {})
            if row.index in programs:
                return programs[row.index]
            with self._compiling:
                if key in self._compiled:
                    programs[row.index] = _load(*self._compiled[key], row)
                else:
                    _from_disk.hit = False
                    programs[row.index] = _compile(row, function, static, arguments)
                    if not _from_disk.hit:
                        self._compiled[key] = row, programs[row.index]
        return programs[row.index]


# Whether the program that this thread asked for last was in JAX's cache on disk.
_from_disk = threading.local()


def _listen(event: str, **_) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _from_disk.hit = True


jax.monitoring.register_event_listener(_listen)


def _compile(row: Row, function: RowFunction, static: tuple, arguments) -> jax.stages.Compiled:
    compute = functools.partial(function.function, *static)
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
    return program.lower(*arguments).compile()


def _load(first: Row, program: jax.stages.Compiled, row: Row) -> jax.stages.Compiled:
    """A program compiled for one row, for the devices of another."""
    data, in_tree, out_tree = serialize_executable.serialize(program)
    devices = row.devices
    replacement = dict(zip([d.id for d in first.devices], devices, strict=True))
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
