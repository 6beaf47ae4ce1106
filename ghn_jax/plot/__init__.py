"""Pictures: graphs in the paper's colours, training curves, accuracies, statistics."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ghn_jax.deepnets1m.graph import Graph

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    graph: Graph,
    path: str | os.PathLike | None = None,
    *,
    title: str | None = None,
    legend: bool = True,
) -> Figure:
    """Draws a computational graph; see `plot.drawing.draw_graph`."""
    # Matplotlib takes longer to import than all else together, and few need it.
    from ghn_jax.plot.drawing import draw_graph

    return draw_graph(graph, path, title=title, legend=legend)
