"""The process's memory: kept for the next update rather than given back to the system."""

from __future__ import annotations

import ctypes
import sys

# Of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Lets the C library keep freed memory; does nothing where it is not glibc.

    An update on a CPU frees and asks for the same gigabytes again for every architecture; by
    default each of their pages is a fault. Measured on two cores over nine updates (meta-batch 8,
    batch 64, 32x32 images): system time 37 -> 4 s of 190, updates 15-20% faster.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
