"""Items computed ahead of their use, in a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ghn_jax.data.checks import check_whole

T = TypeVar("T")


def prefetch(iterator: Iterable[T], size: int = 2) -> Iterator[T]:
    """The same items, computed in a thread of their own, ahead of their use.

    The thread starts with the first item asked for. It ends with the items, or, after the item it
    works on, when the result is closed or no longer referenced. What the iterator raises is raised
    here, after the items before it.

    Args:
      iterator: used by the thread only; do not use it elsewhere.
      size: most items that wait to be used, at least 1.

    Raises:
      ValueError: size is less than 1.
    """
    check_whole("size", size, 1)
    return _prefetch(iter(iterator), size)


def _prefetch(iterator: Iterator[T], size: int) -> Iterator[T]:
    ready: queue.SimpleQueue = queue.SimpleQueue()
    free = threading.Semaphore(size)
    stop = threading.Event()
    # The thread has no reference to this generator, which so can be collected while it waits. A
    # daemon does not keep the program from ending.
    threading.Thread(target=_fill, args=(iterator, ready, free, stop), daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item
    finally:
        stop.set()
        free.release()  # the thread may be waiting for a place


def _fill(
    iterator: Iterator[T],
    ready: queue.SimpleQueue,
    free: threading.Semaphore,
    stop: threading.Event,
) -> None:
    """Puts (item, None) for each item into the queue, at last (None, what ended the iterator)."""
    while True:
        free.acquire()
        if stop.is_set():
            return
        try:
            item = next(iterator)
        except BaseException as error:  # noqa: BLE001 - the consumer would wait for ever
            ready.put((None, error))
            return
        ready.put((item, None))
