"""The process's memory: what updates need is kept, what compiling took is given back."""

from __future__ import annotations

import ctypes
import sys

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def _c_function(name: str):
    """A function of the C library; None where that is not glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def keep_memory() -> None:
    """Lets the C library keep freed memory; does nothing where it is not glibc.

    An update on a CPU frees and asks for the same gigabytes again for every architecture; by
    default each of their pages is a fault.
    """
    mallopt = _c_function("mallopt")
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def give_back_memory() -> None:
    """Gives freed memory back to the system, once; does nothing where the C library is not glibc.

    For what is done once and takes much, as compiling does: most of what a program holds on to is
    memory that its making has freed, in pieces too small for what updates ask for.
    """
    malloc_trim = _c_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
