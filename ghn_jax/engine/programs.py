"""Compiled programs: each is made once, ahead of its use, and forgotten where there is no room.

A program is found by a key that says all about it. Nothing here knows what programs compute.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path

import jax

from ghn_jax.engine.memory import give_back_memory

_CROWDED = 0.8  # of Linux's limit of memory mappings
_TRIM_EVERY = 64  # programs that are compiled, freed memory is given back


class Program:
    """A function that is compiled before its first call, once, by whoever needs it first."""

    def __init__(self, make: Callable[[], jax.stages.Compiled]):
        self._make, self._compiled = make, None
        self._lock = threading.Lock()

    def compile(self) -> jax.stages.Compiled:
        """The compiled function."""
        with self._lock:
            if self._compiled is None:
                self._compiled = self._make()
            return self._compiled

    def forget(self) -> None:
        """Gives up what was compiled; it is compiled again where it is needed."""
        self._compiled = None

    @property
    def ready(self) -> bool:
        """Whether it is compiled."""
        return self._compiled is not None

    def __call__(self, *args):
        """Runs it; waits until it is compiled."""
        return (self._compiled or self.compile())(*args)


class Programs:
    """Programs by key, compiled ahead by threads of their own.

    Attributes:
      made: how often one was compiled.

    Args:
      threads: that compile; all cores but one on accelerators, two at least.
    """

    def __init__(self, threads: int | None = None):
        self._programs: collections.OrderedDict[Hashable, Program] = collections.OrderedDict()
        self._lock = threading.Lock()
        threads = threads or max(2, (os.cpu_count() or 2) - 1)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "compile")
        self.made = self._checked = 0

    def __len__(self) -> int:
        return len(self._programs)

    def _count(self, make):
        compiled = make()
        with self._lock:
            self.made += 1
            trim = self.made % _TRIM_EVERY == 0
        if trim:
            give_back_memory()
        return compiled

    def get(self, key: Hashable, make: Callable[[], jax.stages.Compiled]) -> Program:
        """The program of a key; a new one is compiled in the background.

        Args:
          key: hashable; equal keys are one program.
          make: compiles it.
        """
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
                return program
            program = self._programs[key] = Program(lambda: self._count(make))
        self._pool.submit(program.compile)
        return program

    def wait(self) -> None:
        """Waits until all programs are compiled."""
        with self._lock:
            programs = list(self._programs.values())
        for program in programs:
            program.compile()

    def make_room(self) -> None:
        """Near Linux's limit of memory mappings, forgets the half that was not asked for longest.

        XLA's CPU backend maps every piece of a program by itself; beyond the limit
        (vm.max_map_count, 65,530) the process dies without a word.
        """
        if self.made < self._checked + 50:  # counting mappings takes a while
            return
        self._checked = self.made
        if not _crowded():
            return
        with self._lock:
            ready = [p for p in self._programs.values() if p.ready]
        for program in ready[: len(ready) // 2]:
            program.forget()

    def close(self) -> None:
        """Compiles nothing more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _crowded() -> bool:
    """Whether the process has most of the memory mappings that Linux lets it have."""
    limit, maps = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
    if not limit.exists():
        return False
    with maps.open() as lines:
        return sum(1 for _ in lines) > _CROWDED * int(limit.read_text())
