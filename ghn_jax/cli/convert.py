"""Converts hypernetworks and predicted networks between JAX's and PyTorch's files.

    ghn-convert ghn ghn2_cifar10.pt my_ghn           # the authors' -> ours (a folder)
    ghn-convert ghn runs/x my_ghn.pt                 # ours -> the authors'
    ghn-convert ghn runs/x my_ghn.safetensors --to flax --half  # one small file, to pass on
    ghn-convert network resnet50 weights resnet50.pt # predicted -> state dict
    ghn-convert network arch.json weights.pt weights # state dict -> ours

What a path is, its name tells: `.pt`, `.pth` and `.safetensors` are PyTorch's names and layouts (of
the latter Flax's with `--to flax`), a name without an ending is a folder of Orbax's. Nothing that
exists is overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from ghn_jax.cli import command
from ghn_jax.interop import convert

PROG = "ghn-convert"


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    commands = {"ghn": convert.convert_ghn, "network": convert.convert_network}
    tyro.extras.subcommand_cli_from_dict(commands, prog=PROG, args=arguments, description=__doc__)


run = command(PROG, main)

if __name__ == "__main__":
    run()
