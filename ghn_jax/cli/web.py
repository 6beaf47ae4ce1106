r"""A web page to try a hypernetwork: choose or edit a network, see what is predicted for it.

    ghn-demo --ghn runs/demo
    ghn-demo --ghn ghn2_cifar10.pt --dataset cifar10 --data-dir DIR

Shows the network's graph, its accuracy on test images, its first filters and the values of its
parameters, which can be downloaded for Flax and PyTorch. The page is at http://127.0.0.1:7860 until
the program is stopped; it loads nothing from elsewhere and reports to nobody.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tyro

from ghn_jax.cli import command
from ghn_jax.engine.compilation import default_program_folder, keep_programs
from ghn_jax.engine.memory import keep_memory

PROG = "ghn-demo"


@dataclasses.dataclass(frozen=True)
class WebConfig:
    """Which hypernetwork, and where."""

    ghn: str  # a folder or file, or a name; see `ghn_jax.from_pretrained`
    dataset: str | None = None  # of the test images; default: the one that it was trained on
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: whoever reaches this machine sees it
    port: int = 7860  # of the address
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    config = tyro.cli(WebConfig, prog=PROG, args=arguments, description=__doc__)
    if not 0 < config.port < 2**16:
        raise ValueError(f"--port is {config.port}; allowed: 1 to {2**16 - 1}")
    _check_address(config.host, config.port)
    with tempfile.TemporaryDirectory(prefix="ghn-demo-") as folder:
        # Copies of downloads, which Gradio removes as they age; read where it is imported.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "offered")
        # An extra brings it; who lacks it is told before anything is read.
        from ghn_jax.web.page import serve
        from ghn_jax.web.predictor import open_predictor

        keep_programs(config.cache_dir)
        keep_memory()
        predictor = open_predictor(config.ghn, config.dataset, config.data_dir)
        serve(predictor, Path(folder), Path(config.ghn).resolve().stem, config.host, config.port)


def _check_address(host: str, port: int) -> None:
    """Before anything is loaded."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ValueError(
            f"the page cannot be served at {host}:{port}: {error.strerror or error}; give another "
            "--port or --host"
        ) from error


run = command(PROG, main)

if __name__ == "__main__":
    run()
