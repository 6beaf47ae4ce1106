"""The commands: ghn-train, ghn-eval, ghn-predict, ghn-convert, ghn-deepnets1m, ghn-demo, others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

_EXTRAS = {
    "array_record": "train",
    "gradio": "web",
    "importlib_resources": "train",
    "markdown": "plot",
    "matplotlib": "plot",
    "pycocotools": "detection",
    "sklearn": "train",
    "submitit": "cluster",
    "tensorboardX": "tensorboard",
    "tensorflow_datasets": "train",
}


def command(name: str, main: Callable[[Sequence[str]], None]) -> Callable[[], None]:
    """A command that says in one line what is wrong with what it was given.

    Args:
      name: as users type it.
      main: takes the arguments of the command line.
    """

    def run() -> None:
        try:
            main(sys.argv[1:])
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"{name}: {error}")
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            extra = _EXTRAS[error.name]
            sys.exit(
                f"{name}: this needs {error.name}; install it with pip install 'ghn_jax[{extra}]'"
            )

    return run
