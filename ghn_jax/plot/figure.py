"""Figures without a display: made, checked and saved.

Every figure has its own Agg canvas. Nothing touches pyplot's global state, so pictures can be made
on servers and in threads.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ghn_jax.files.replace import write_beside

FORMATS = (".png", ".pdf")
# A method has one colour in all figures.
_METHODS = {"GHN-2": "#123a80", "GHN-1": "#b5432a", "MLP": "#e39b2d", "NeuPred": "#3d8b57",
            "He": "#5f5f5f", "SGD": "#5f5f5f"}  # fmt: skip
_OTHERS = ("#7aa3dc", "#7b52a3", "#3d8b57", "#e39b2d", "#b5432a", "#c8c8c8")


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """A colour for each method; those without one of their own get the others in turn."""
    found: dict[str, str] = {}
    for method in methods:
        unused = [c for c in _OTHERS if c not in found.values()] or [*_OTHERS]
        found[method] = _METHODS.get(method, unused[0])
    return found


def canvas(width: float, height: float) -> Figure:
    """An empty figure of (width, height) inches that draws without a display."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def check_path(path: str | os.PathLike | None) -> pathlib.Path | None:
    """Refuses a path that could not be saved to, before any time goes into drawing."""
    if path is None:
        return None
    path = pathlib.Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"cannot draw to {str(path)!r}; allowed suffixes: {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {str(path.parent)!r} does not exist; create it first")
    return path


def save(figure: Figure, path: pathlib.Path | None) -> Figure:
    """Saves a figure where there is a path for it, and returns it."""
    if path is not None:
        # Without a date, the same graph gives the same PDF, byte for byte.
        dated = path.suffix.lower() == ".pdf"
        picture, form = io.BytesIO(), path.suffix[1:].lower()
        figure.savefig(picture, format=form, metadata={"CreationDate": None} if dated else None)
        write_beside(path, picture.getvalue())
    return figure


def tidy(axes: Axes) -> None:
    """Axes as all charts have them: two spines and a faint grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
