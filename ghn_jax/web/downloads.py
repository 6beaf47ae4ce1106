"""Files of a network with predicted parameters, for Flax and for PyTorch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ghn_jax.files.replace import write_beside
from ghn_jax.interop.convert import write_network
from ghn_jax.web.predictor import Prediction


def write_downloads(prediction: Prediction, folder: Path) -> tuple[Path, Path]:
    """Writes a network's parameters twice.

    Args:
      prediction: the network.
      folder: an empty one.

    Returns:
      A ZIP archive with an Orbax folder of Flax's parameters, `weights`, as `ghn-predict` writes
      it, and the architecture as JSON where it is one; and a state dict of PyTorch, .pt.

    Raises:
      OSError: they could not be written.
    """
    stem = re.sub(r"\W+", "_", prediction.name).strip("_")
    together = folder / stem
    together.mkdir()
    write_network(prediction.variables, prediction.network, together / "weights")
    if prediction.architecture is not None:
        text = json.dumps(prediction.architecture.to_dict(), indent=1)
        write_beside(together / "architecture.json", text + "\n")
    flax = Path(shutil.make_archive(str(together), "zip", folder, stem))
    shutil.rmtree(together)
    torch = folder / f"{stem}.pt"
    write_network(prediction.variables, prediction.network, torch)
    return flax, torch
