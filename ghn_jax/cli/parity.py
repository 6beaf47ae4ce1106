"""Checks this package against outputs of the authors' implementation.

    python -m ghn_jax.parity DIR

Prints a line for each file of DIR, and exits with 1 if any error is beyond its tolerance.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from ghn_jax.cli import command
from ghn_jax.interop import parity

PROG = "ghn_jax.parity"


def check(folder: tyro.conf.Positional[Path]) -> int:
    """Checks a folder of the authors' outputs; returns how many files fail.

    Args:
      folder: laid out as the module's docstring says.
    """
    failed = count = 0
    for report in parity.check_folder(folder):
        print(report, flush=True)
        count += 1
        failed += not report.passed
    print(f"{count - failed} of {count} files pass")
    return failed


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    if tyro.cli(check, prog=PROG, args=arguments, description=f"{__doc__}\n{parity.__doc__}"):
        sys.exit(1)


run = command(PROG, main)

if __name__ == "__main__":
    run()
