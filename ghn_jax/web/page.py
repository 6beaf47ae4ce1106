"""The page, laid out by Gradio: on the left a network is chosen, on the right is what comes out."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path

import gradio as gr

from ghn_jax import zoo
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES
from ghn_jax.web.downloads import write_downloads
from ghn_jax.web.networks import as_text, from_text, of_split
from ghn_jax.web.predictor import Predictor
from ghn_jax.web.results import CSS, message, results

SAMPLED, SPLIT, ZOO = SOURCES = ("sampled", "evaluation split", "model of the zoo")
PLACEHOLDER = '<div class="ghn"><p class="wide">Choose a network, then press Predict.</p></div>'
_CELLS, _WIDTH = 36, 256  # ends of the sliders, further where a network is beyond
_CLEAN_EVERY, _KEEP = 600, 3600  # seconds; of copies that were offered for download


class _Handlers:
    """What the page's buttons and fields do.

    Args:
      predictor: of the page.
      folder: for downloads; Gradio has copied what a prediction wrote when the next begins.
    """

    def __init__(self, predictor: Predictor, folder: Path):
        self.predictor, self.folder = predictor, folder
        self._written: Path | None = None

    def chosen(self, source, seed, split, index, model) -> tuple[str, Architecture | str]:
        """The network that the fields name, and what it is called."""
        if source == ZOO:
            return model, model
        if source == SPLIT:
            size = self.predictor.images.image_size
            return f"{split} {_whole(index, 'number')}", of_split(split, int(index), size)
        return f"sampled {_whole(seed, 'seed')}", self.predictor.sample(int(seed))

    def choose(self, source, seed, split, index, model):
        """Shows the fields of a source, and the architecture that they name."""
        fields = [gr.update(visible=source == s) for s in SOURCES]
        editor: list = [{"visible": source != ZOO}] * 3
        problem = ""
        try:
            _, network = self.chosen(source, seed, split, index, model)
            if isinstance(network, Architecture):
                values = [*_sliders(network), {"value": as_text(network)}]
                editor = [old | new for old, new in zip(editor, values, strict=True)]
        except ValueError as error:
            problem = message(error)
        return *fields, *(gr.update(**options) for options in editor), problem

    def edited(self, text):
        """Sliders as an architecture has it; or what is wrong with it."""
        try:
            sliders = _sliders(from_text(text))
        except ValueError as error:
            return gr.skip(), gr.skip(), message(error)
        return *(gr.update(**options) for options in sliders), ""

    def resized(self, text, n_cells, width):
        """The architecture with other numbers of cells and channels."""
        try:
            arch = from_text(text).replace(n_cells=int(n_cells), C=int(width))
        except ValueError as error:
            return gr.skip(), message(error)
        return as_text(arch), ""

    def predict(self, source, seed, split, index, model, text):
        """Predicts the network, and writes its files."""
        nothing = gr.update(value=None, interactive=False)
        try:
            name, network = self.chosen(source, seed, split, index, model)
            if isinstance(network, Architecture):
                arch = from_text(text)
                name, network = (name if arch == network else f"{name}, edited"), arch
            prediction = self.predictor.predict(name, network)
        except ValueError as error:
            return PLACEHOLDER, nothing, nothing, message(error)
        if self._written is not None:
            shutil.rmtree(self._written)
        self._written = Path(tempfile.mkdtemp(dir=self.folder))
        files = write_downloads(prediction, self._written)
        buttons = [gr.update(value=str(file), interactive=True) for file in files]
        return results(prediction), *buttons, ""


def _sliders(arch: Architecture) -> list[dict]:
    """Of the numbers of cells and channels."""
    return [
        {"value": value, "maximum": max(value, most)}
        for value, most in ((arch.n_cells, _CELLS), (arch.C, _WIDTH))
    ]


def _whole(value, field: str) -> int:
    if value is None:
        raise ValueError(f"the {field} is empty; give a whole number")
    return int(value)


def build(predictor: Predictor, folder: Path, title: str) -> gr.Blocks:
    """The page.

    Args:
      predictor: that it is about.
      folder: for downloads.
      title: of the hypernetwork.
    """
    do = _Handlers(predictor, folder)
    first, images = predictor.sample(0), predictor.images
    about = f"tested on {images.name}, images of {images.image_size}×{images.image_size} pixels"
    options = {
        "analytics_enabled": False,
        "delete_cache": (_CLEAN_EVERY, _KEEP),
        "fill_width": True,
    }
    with gr.Blocks(title=f"{title} · ghn_jax", **options) as page:
        gr.Markdown(f"### {title} predicts parameters, {about}")
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                source = gr.Radio(SOURCES, value=SAMPLED, label="Network", elem_id="source")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                with gr.Row(visible=False) as of_split_row:
                    split = gr.Dropdown(
                        [*EVALUATION_SIZES], value="test", label="Split", min_width=120,
                        elem_id="split",
                    )  # fmt: skip
                    index = gr.Number(
                        0, label="Number", precision=0, min_width=120, elem_id="index"
                    )
                model = gr.Dropdown(
                    [*zoo.MODELS], value="resnet18", label="Model", visible=False, elem_id="model"
                )
                cells, channels = _sliders(first)
                n_cells = gr.Slider(1, step=1, label="Cells", elem_id="cells", **cells)
                width = gr.Slider(8, step=8, label="Channels", elem_id="channels", **channels)
                text = gr.Code(
                    as_text(first), language="json", label="Architecture, to edit", lines=20,
                    max_lines=20, interactive=True, elem_id="architecture",
                )  # fmt: skip
                problem = gr.HTML(elem_id="problem", padding=False)
                start = gr.Button("Predict", variant="primary", elem_id="predict")
            with gr.Column(scale=3, min_width=600):
                shown = gr.HTML(PLACEHOLDER, elem_id="results", padding=False)
                with gr.Row():
                    flax = gr.DownloadButton(
                        "Download for Flax (Orbax, .zip)",
                        interactive=False,
                        size="md",
                        elem_id="flax",
                    )
                    torch = gr.DownloadButton(
                        "Download for PyTorch (.pt)",
                        interactive=False,
                        size="md",
                        elem_id="torch",
                    )
        fields = [source, seed, split, index, model]
        quiet = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "trigger_mode": "always_last",
        }
        gr.on(
            [field.input for field in fields], do.choose, fields,
            [seed, of_split_row, model, n_cells, width, text, problem], **quiet,
        )  # fmt: skip
        text.input(do.edited, text, [n_cells, width, problem], **quiet)
        gr.on(
            [n_cells.input, width.input], do.resized, [text, n_cells, width], [text, problem],
            **quiet,
        )  # fmt: skip
        start.click(
            do.predict, [*fields, text], [shown, flax, torch, problem], api_visibility="private",
            concurrency_limit=1,
        )  # fmt: skip
    return page


def serve(predictor: Predictor, folder: Path, title: str, host: str, port: int) -> None:
    """Serves the page until the process is stopped.

    Args:
      predictor: that it is about.
      folder: for downloads.
      title: of the hypernetwork.
      host, port: where it listens.

    Raises:
      OSError: the port is taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what is temporary is removed then, too
    page = build(predictor, folder, title)
    # Fonts of the system: Gradio's own are fetched from elsewhere.
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, run_history=False,
        footer_links=[], theme=gr.themes.Default(primary_hue="blue", **fonts), css=CSS,
        quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"the page is at {address}; Ctrl+C ends it", flush=True)
    page.block_thread()
