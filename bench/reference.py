"""The authors' code (facebookresearch/ppuda, PyTorch) in a process of its own, for comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


class Reference:
    """A process that answers requests; see `reference_worker.py`, which it runs.

    Args:
      task: 'update', 'evaluate' or 'train'.
      code: a checkout of the authors' repository.
      nets: the official HDF5 file that networks are read from.
      batch_size: images in a batch.

    Raises:
      ValueError: the code does not start.
    """

    def __init__(self, task: str, code: Path, nets: Path, batch_size: int):
        script = Path(__file__).with_name("reference_worker.py")
        command = [sys.executable, str(script), task, str(code), str(nets), str(batch_size)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer(f"the code in {code} did not start; its error is above")

    def _answer(self, otherwise: str) -> dict:
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise ValueError(otherwise)
        return json.loads(line)

    def __call__(self, **request) -> dict:
        """Its answer to a request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer("the authors' code ended; its error is above")
