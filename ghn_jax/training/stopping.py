"""How a run is told to stop: SIGTERM, notice of Slurm, Kubernetes and spot machines, and Ctrl-C.

The update in work is finished, a checkpoint is written, and the program ends with the exit code
`STOPPED`; `--resume` goes on there. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done, try again

# What a process asks all of them for, in an update; the most that any asks for is done.
NOTHING, SAVE, STOP = range(3)


class Stopped(SystemExit):
    """A run that was told to stop has ended, and has saved what it did."""

    def __init__(self):
        super().__init__(STOPPED)


class Listener:
    """Hears signals while it is entered, in the main thread.

    Attributes:
      heard: the name of the first signal that came; None if none has.
    """

    def __init__(self):
        self.heard: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Listener:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame) -> None:
        if self.heard is None:
            self.heard = signal.Signals(number).name
            more = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            os.write(2, f"\n{self.heard}: this update is finished and saved{more}\n".encode())
        elif number == signal.SIGINT:
            if "ipykernel" in sys.modules:  # the notebook stays
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
