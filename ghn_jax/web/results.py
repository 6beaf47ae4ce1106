"""A prediction as HTML: facts, test images, graph, filters and parameters, all in one text.

Nothing is loaded from elsewhere: pictures are inside.
"""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from ghn_jax.plot.drawing import draw_graph
from ghn_jax.plot.figure import canvas, tidy
from ghn_jax.web.predictor import Prediction
from ghn_jax.web.trial import Trial

MOST_FILTERS, FEW_FILTERS = 64, 24
_BINS = 80
_WEIGHTS, _OTHERS = "#123a80", "#e39b2d"

CSS = """
.ghn { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr);
       grid-template-rows: auto auto auto 1fr; gap: 12px;
       color: var(--body-text-color); font-size: 14px; }
.ghn > * { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px;
           background: var(--block-background-fill); margin: 0; }
.ghn .wide { grid-column: 1 / -1; }
.ghn h3 { font-size: 14px; font-weight: 600; margin: 0 0 6px; color: var(--body-text-color); }
.ghn .facts { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0; }
.ghn .facts dt { font-size: 12px; opacity: 0.75; }
.ghn .facts dd { font-size: 22px; font-weight: 600; margin: 0; line-height: 1.3;
                 font-variant-numeric: tabular-nums; }
.ghn .facts div:first-child dd { color: #1f5fbf; }
.ghn .note { margin: 6px 0 0; font-size: 12px; opacity: 0.75; }
.ghn .images { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; }
.ghn .images figure { margin: 0; text-align: center; font-size: 12px; }
.ghn .images img { width: 72px; max-width: 100%; height: auto; aspect-ratio: 1; }
.ghn .right { color: #1a7f37; } .ghn .wrong { color: #c0392b; }
.ghn .pixels img { image-rendering: pixelated; display: block; margin: 0 auto 2px; }
.ghn .filters { display: flex; flex-wrap: wrap; gap: 4px; }
.ghn .filters img { width: 34px; height: 34px; margin: 0; }
.ghn .filters.few img { width: 60px; height: 60px; }
.ghn .graph { grid-row: span 2; }
.ghn .graph div { display: flex; justify-content: center; gap: 16px; }
.ghn .graph img { object-fit: contain; margin: 0; background: white; border-radius: 4px; }
.ghn .graph img:first-child { min-width: 0; max-height: 560px; }
.ghn .graph img:last-child { flex: none; align-self: flex-start; }
.ghn .histogram img { width: 100%; border-radius: 4px; }
#results, #results .html-container { padding: 0; }
#problem:not(:has([role])) { display: none; }
.ghn-message { color: #c0392b; overflow-wrap: anywhere; }
@media (max-width: 900px) { .ghn { grid-template-columns: minmax(0, 1fr); } }
"""


def results(prediction: Prediction) -> str:
    """All that the page shows of a network, as HTML."""
    kernels = first_filters(prediction)
    parts = [_facts(prediction), _images(prediction.trial), _graph(prediction)]
    if kernels is not None:
        parts.append(_filters(kernels))
    parts.append(_histogram(prediction))
    return f'<div class="ghn">{"".join(parts)}</div>'


def message(error: Exception) -> str:
    """What is wrong with what was given, as HTML."""
    return f'<p class="ghn-message" role="alert">{html.escape(str(error))}</p>'


def first_filters(prediction: Prediction) -> np.ndarray | None:
    """(out, height, width, 3) kernels of the first layer that sees colours, None if there is none.

    Each is scaled to values from 0 to 1 by itself.
    """
    arrays = prediction.arrays.values()
    found = next((a for a in arrays if a.ndim == 4 and a.shape[1] == 3), None)
    if found is None:
        return None
    kernels = found.transpose(0, 2, 3, 1)
    low = kernels.min((1, 2, 3), keepdims=True)
    spread = kernels.max((1, 2, 3), keepdims=True) - low
    return np.where(spread > 0, (kernels - low) / np.where(spread > 0, spread, 1), 0.5)


def histogram(prediction: Prediction) -> Figure:
    """How often parameters have which values: weights of layers, and norms' and biases."""
    groups = {"weights": _WEIGHTS, "norms and biases": _OTHERS}
    values = {
        name: [a.ravel() for n, a in _learned(prediction) if (a.ndim > 1) == (name == "weights")]
        for name in groups
    }
    ends = [(v.min(), v.max()) for some in values.values() for v in some if v.size]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if not np.isfinite([low, high]).all():
        low, high = -1.0, 1.0
    margin = (high - low) / 50 or 1.0
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    figure = canvas(5.2, 3.5)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    axes.set(xlabel="value", ylabel="parameters", ylim=(0.7, 10))
    axes.set_yscale("log")
    for name, color in groups.items():
        counts = sum(np.histogram(v, edges)[0] for v in values[name])
        if np.any(counts):
            total = f"{sum(v.size for v in values[name]):,}"
            look = {"color": color, "alpha": 0.75, "linewidth": 0}
            axes.stairs(counts, edges, fill=True, label=f"{name} ({total})", **look)
            axes.set_ylim(0.7, max(2 * counts.max(), axes.get_ylim()[1]))
            axes.legend(frameon=False, fontsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    tidy(axes)
    return figure


def _learned(prediction: Prediction):
    """Names and arrays without batch norm's running statistics, and what else is no parameter."""
    for name, array in prediction.arrays.items():
        running = name.endswith(("running_mean", "running_var"))
        if array.dtype.kind == "f" and not running:
            yield name, array


def _png(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as the address of a picture."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return _address(file)


def _picture(figure: Figure, cut: bool = False) -> str:
    """A figure as the address of a picture, `cut` to what is drawn."""
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight" if cut else None)
    return _address(file)


def _address(file: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _facts(prediction: Prediction) -> str:
    trial = prediction.trial
    facts = [
        (f"accuracy on {trial.tested:,} test images", f"{trial.top1:.1%}"),
        ("random parameters (He)", f"{trial.top1_random:.1%}"),
        ("by chance", f"{trial.chance:.1%}"),
        ("graph nodes", f"{len(prediction.graph):,}"),
        ("parameters", f"{prediction.parameters:,}"),
        ("predicted in", f"{prediction.seconds:.2f} s"),
    ]
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    note = ""
    if prediction.left:
        note = f"{prediction.left:,} parameters stay at their initial values: no decoder makes them"
        note = f'<p class="note">{note}.</p>'
    name = html.escape(prediction.name)
    return f'<section class="wide"><h3>{name}</h3><dl class="facts">{rows}</dl>{note}</section>'


def _images(trial: Trial) -> str:
    figures = []
    for pixels, label, given in zip(trial.images, trial.labels, trial.classes, strict=True):
        right = label == given
        said = html.escape(given or "none")
        label = html.escape(label)
        caption = f"✓ {said}" if right else f"✗ {said}, is {label}"
        figures.append(
            f'<figure><img src="{_png(pixels)}" alt="test image of class {label}">'
            f'<figcaption class="{"right" if right else "wrong"}">{caption}</figcaption></figure>'
        )
    return (
        '<section class="wide"><h3>Test images and the classes that the network gives</h3>'
        f'<div class="images pixels">{"".join(figures)}</div></section>'
    )


def _graph(prediction: Prediction) -> str:
    figure = draw_graph(prediction.graph)
    # A picture of its own, or the legend would shrink with the graph.
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    aside = canvas(1.9, 0.24 * len(texts))
    aside.legend(legend.legend_handles, texts, loc="upper left", frameon=False, borderaxespad=0)
    legend.remove()
    return (
        '<section class="graph"><h3>Computational graph</h3><div>'
        f'<img src="{_picture(figure, cut=True)}" alt="graph of {len(prediction.graph)} nodes">'
        f'<img src="{_picture(aside)}" alt="legend" width="178"></div></section>'
    )


def _filters(kernels: np.ndarray) -> str:
    pixels = np.round(kernels * 255).astype(np.uint8)
    pictures = "".join(
        f'<img src="{_png(kernel)}" alt="filter {i}">'
        for i, kernel in enumerate(pixels[:MOST_FILTERS])
    )
    count, height, width, _ = kernels.shape
    title = f"First layer: {count} filters of {height}×{width}"
    if count > MOST_FILTERS:
        title += f", the first {MOST_FILTERS}"
    size = "few" if count <= FEW_FILTERS else "many"
    return f'<section><h3>{title}</h3><div class="filters {size} pixels">{pictures}</div></section>'


def _histogram(prediction: Prediction) -> str:
    picture = _picture(histogram(prediction))
    return (
        '<section class="histogram"><h3>Values of the parameters</h3>'
        f'<img src="{picture}" alt="histogram of {prediction.parameters} parameters"></section>'
    )
