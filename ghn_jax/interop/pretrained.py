"""Hypernetworks from whatever holds one, and those that come with the package.

ghn, variables = ghn_jax.from_pretrained("runs/x")  # or a file, or a name of `available()`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ghn_jax.hypernet.checkpoint import CONFIG, Checkpoints, load_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.ghn_file import is_ghn_file, read_about, read_ghn_file
from ghn_jax.interop.joblib_file import is_joblib
from ghn_jax.interop.torch_ghn import is_safetensors, load_torch_ghn
from ghn_jax.training.config import TrainConfig

_SHIPPED = Path(__file__).parents[1] / "pretrained"  # NAME.safetensors, and its card, NAME.md
_SUFFIXES = (".pt", ".pth", ".safetensors")
# First bytes of files that hold no hypernetwork, and what they are.
_OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file that it stands for",
    b"<": "a web page: its download went wrong",
    b"\x89HDF": "HDF5, as DeepNets-1M's files are",
    b"\x93NUMPY": "an array of NumPy",
    b"{": "JSON: if it is the config.json of a hypernetwork, give its folder",
    b"[": "JSON",
    b"\x8a\x0a": "a file of PyTorch before 1.6: save it again by a newer one",
    b"\x80\x02\x8a\x0a": "a file of PyTorch before 1.6: save it again by a newer one",
    b"\x04\x22\x4d\x18": "compressed by LZ4: write it again without",
}


def looks_like(path: Path) -> str:
    """What a file is by its first bytes, in words."""
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        return "an empty file"
    for magic, what in _OTHERS.items():
        if first.startswith(magic):
            return what
    if first.startswith(b"PK"):
        return "a ZIP archive, as PyTorch writes"
    return "nothing that is known here"


def _holds(path: Path) -> bool:
    """Whether a file begins like one that may hold a hypernetwork of the authors' code."""
    with path.open("rb") as file:
        first = file.read(64)
    return first.startswith(b"PK") or is_joblib(path) or is_safetensors(path)


def _locate(source: str | Path) -> Path:
    """The folder of ours or the file that a source stands for; see `from_pretrained`."""
    path = Path(source)
    if (path / CONFIG).is_file():
        return path
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
        if len(files) == 1:
            return files[0]
        held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        problem = "several checkpoints" if files else "no hypernetwork"
        raise ValueError(
            f"{path} holds {problem}, but {held}; allowed: a folder of save_ghn or of a training "
            "run, or one with a single checkpoint"
        )
    if path.is_file():
        return path
    if str(source) in available():
        return _SHIPPED / f"{source}.safetensors"
    names = f", or a name: {', '.join(available())}" if available() else ""
    raise FileNotFoundError(f"{path} does not exist; give a folder or a checkpoint{names}")


def available() -> list[str]:
    """Names of the hypernetworks that come with the package, which `from_pretrained` takes."""
    return sorted(path.stem for path in _SHIPPED.glob("*.safetensors"))


def about(source: str | Path) -> dict[str, Any]:
    """What a hypernetwork says about itself: of one of ours, `training` has the options it had.

    Args:
      source: as `from_pretrained` takes it.

    Raises:
      FileNotFoundError, ValueError: as `from_pretrained`.
    """
    path = _locate(source)
    if path.is_dir():
        return {k: v for k, v in Checkpoints(path).config().items() if k != "ghn"}
    return read_about(path) if is_ghn_file(path) else {}


def training_options(source: str | Path) -> TrainConfig | None:
    """What a hypernetwork was trained with; None if it does not say.

    Raises:
      FileNotFoundError, ValueError: as `from_pretrained`.
    """
    described = about(source).get("training")
    return TrainConfig.read(described) if described else None


def from_pretrained(source: str | Path) -> tuple[GHN, dict]:
    """Loads a hypernetwork, whatever wrote it.

    Args:
      source: a name of `available()`; a folder of `save_ghn` or of a training run; a file of
        `write_ghn_file`; or a checkpoint of GHN-1, GHN-2, MLP, GHN-3 or LoGAH, `.pt` as released or
        as training writes it, or `.safetensors`. Content decides, not the name of a file.

    Returns:
      The module, configured as the file says or its tensors do, and its variables.

    Raises:
      FileNotFoundError: there is nothing there.
      ValueError: it holds no hypernetwork; the message says what it looks like.
    """
    path = _locate(source)
    if path.is_dir():
        return load_ghn(path)
    if not _holds(path):
        raise ValueError(
            f"{path} looks like {looks_like(path)}; allowed: a folder of save_ghn or of a training "
            "run, or a checkpoint (.pt or .safetensors)"
        )
    return read_ghn_file(path) if is_ghn_file(path) else load_torch_ghn(path)
