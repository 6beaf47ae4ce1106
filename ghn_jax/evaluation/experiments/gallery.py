r"""Every table and figure of the paper at small size, as one page of pictures to scroll through.

    ghn-paper all --quick --out runs/gallery      # then open runs/gallery/index.html

Trains GHN-2, GHN-1 and the MLP on handwritten digits for some minutes each, then makes each
experiment with them in its quick form. The page shows what came out beside what the paper has. An
hour on two CPU cores; the same command again goes on where it was. What an experiment of the
paper's size costs is on the page "The paper, table by table" of the documentation.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.distance import hungarian_distance
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.statistics import statistics, table
from ghn_jax.engine.programs import Programs
from ghn_jax.evaluation.experiments.records import TABLE, write_beside
from ghn_jax.hypernet.checkpoint import Checkpoints
from ghn_jax.training.config import TrainConfig, preset
from ghn_jax.training.loop import check, train

STATISTICS = "splits"
# Folder of a hypernetwork, which is what tables call it -> what differs from the preset `digits`.
HYPERNETWORKS: dict[str, dict[str, Any]] = {
    "GHN-2": {},
    "GHN-1": {"virtual_edges": 1, "normalise": False, "layer_norm": False},
    "MLP": {"encoder": "mlp"},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is made, and where."""

    only: tuple[str, ...] = ()  # experiments; default: all of them
    ghn: tuple[Path, ...] = ()  # hypernetworks on digits; default: three that are trained here
    steps: int = 1500  # updates of each of the three
    quick: bool = False  # without it, nothing: see the help
    out: Path = Path("runs/gallery")  # folder for the page, and a folder for each experiment


def quick() -> Config:
    """All of it, in an hour on two cores."""
    return Config(quick=True)


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """An experiment on the page.

    Attributes:
      name: of `ghn-paper NAME`, and of its folder.
      place: tables and figures of the paper.
      title: what it shows.
      paper: what the paper has, to compare with.
      trained: the option that takes the folder of `trained-networks`, if there is one.
      hypernetworks: how many it is made with, at most.
      options: that differ from those of its quick form.
    """

    name: str
    place: str
    title: str
    paper: str
    trained: str = ""
    hypernetworks: int = 3
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


EXHIBITS = (
    Exhibit(
        STATISTICS, "Table 1, Fig. 1, 6 and 7", "The splits of DeepNets-1M",
        "Training split: 4-18 cells, 16-128 channels, 21-827 nodes, 0.01-3.1 million parameters; "
        "3.5% without batch norm; average degree 2.3.",
    ),
    Exhibit(
        "predicted-networks", "Tables 3 and 4, upper halves",
        "Accuracy of networks whose parameters are predicted",
        "CIFAR-10, test split: GHN-2 66.9%, GHN-1 51.4%, MLP 42.2%.",
    ),
    Exhibit(
        "trained-networks", "Tables 3 and 4, lower halves", "Networks trained by SGD",
        "CIFAR-10, test split, after 1, 5 and 50 epochs: 46.9%, 69.6% and 88.5%.",
    ),
    Exhibit(
        "ablations", "Tables 5 and 8", "GHN-2 without its parts",
        "ID-TEST: GHN-2 66.9%, without normalisation 62.6%, without virtual edges 61.5%, one "
        "architecture an update 54.3%, without GatedGNN 42.2%.",
    ),
    Exhibit(
        "training-architectures", "Fig. 3", "Accuracy by the number of training architectures",
        "It rises with their number, and meta-batches of 8 gain the most: 47.1% with 100 "
        "architectures, 65.1% with 1,000, 66.9% with a million.",
    ),
    Exhibit(
        "properties", "Fig. 4 and 11", "Properties predicted from embeddings of graphs",
        "Kendall's τ with GHN-2 of about 0.8 on clean images, above NeuPred's; clean and noisy "
        "accuracies correlate by -0.40.",
        trained="fit",
    ),
    Exhibit(
        "few-shot", "Table 6, left", "Fine-tuning on few images of each class",
        "ResNet-50, 100 images of each class: He 41.0%, GHN-1 46.6%, GHN-2 56.4%.",
    ),
    Exhibit(
        "detection", "Table 6, right", "Detection of pedestrians",
        "AP at 0.5 on Penn-Fudan, ResNet-50: He 0.197, GHN-1 0.433, GHN-2 0.560. Here: drawn "
        "scenes.",
        hypernetworks=1,
    ),
    Exhibit(
        "activations", "Fig. 8", "Variance of activations",
        "Parameters that GHN-2 predicts before training keep it as He's do; those of GHN-1 make it "
        "small at first, and large after training.",
    ),
    Exhibit(
        "meta-batches", "Fig. 9", "Training by meta-batch size",
        "With eight architectures an update the loss is less noisy and ends lower.",
    ),
    Exhibit(
        "generalisation", "Fig. 10", "Accuracy by width, depth and number of nodes",
        "GHN-2 falls less than GHN-1 and the MLP where networks are wider, deeper or larger than "
        "in training.",
    ),
    Exhibit(
        "convergence", "Fig. 13", "Training from predicted and from random parameters",
        "ResNet-50 converges sooner from parameters that GHN-2 predicts.",
    ),
    Exhibit(
        "search", "Table 9", "Architecture search by predicted accuracy",
        "The architecture that GHN-2 finds reaches 93.94% in 50 epochs, that of GHN-1 92.61%.",
        trained="trained",
    ),
    Exhibit(
        "compared-architectures", "Tables 10 and 11, Fig. 12", "Distances of architectures",
        "From ResNet-50, by GHN-2: ResNet-34 1.0, without skips 1.3, ViT 3.1. The test split is "
        "the nearest to training for GHN-2 only.",
    ),
    Exhibit(
        "predicted-parameters", "Table 12", "Diversity and sparsity of predicted parameters",
        "Mean distance and sparsity: SGD 0.98, 33%; MLP 0.01, 16%; GHN-1 0.07, 20%; GHN-2 0.17, "
        "39%.",
        trained="trained",
        options={"image_size": 16},
    ),
    Exhibit(
        "training-speed", "Table 13", "Seconds of an update",
        "Seconds on a V100: MLP 0.32 and GHN-2 1.16 with one architecture an update, GHN-2 7.17 "
        "with eight; a ResNet-50 by itself 0.10.",
    ),
)  # fmt: skip


# --- What is shown --------------------------------------------------------------------------------


def _training(name: str, config: Config) -> TrainConfig:
    """Training by the preset `digits`, of one of the three hypernetworks."""
    out = config.out / "hypernetworks" / name
    found = Checkpoints(out).latest() is not None
    base = preset("digits").replace(out=out, steps=config.steps, resume=found)
    return base.replace(**HYPERNETWORKS[name])


def _hypernetworks(config: Config) -> tuple[Path, ...]:
    """Folders of those that are given, or of those that are trained now."""
    if config.ghn:
        return config.ghn
    configs = [_training(name, config) for name in HYPERNETWORKS]
    for training in configs:
        check(training)
    with closing(Programs()) as programs:
        for training in configs:
            train(training, load_images(training.data.dataset, "train"), programs=programs)
    from ghn_jax.plot.charts import training_curve  # matplotlib is of an extra

    for training in configs:
        out = training.run.out
        training_curve(out / "metrics.jsonl", config.out / "hypernetworks" / f"{out.name}.png")
    return tuple(training.run.out for training in configs)


def _make(exhibit: Exhibit, config: Config, ghns: tuple[Path, ...]) -> None:
    """Runs an experiment in its quick form, into a folder of its own."""
    out = config.out / exhibit.name
    if exhibit.name == STATISTICS:
        if not (out / TABLE).exists():
            _statistics(out)
        return
    module = _experiment(exhibit.name)
    options = {"out": out, **exhibit.options}
    fields = {field.name: field for field in dataclasses.fields(module.Config)}
    if "ghn" in fields:
        several = str(fields["ghn"].type).startswith("tuple")
        options["ghn"] = ghns[: exhibit.hypernetworks] if several else ghns[0]
    if exhibit.trained:
        folder = config.out / "trained-networks"
        several = str(fields[exhibit.trained].type).startswith("tuple")
        options[exhibit.trained] = (folder,) if several else folder
    if "keep_parameters" in fields:
        options["keep_parameters"] = True
    module.run(dataclasses.replace(module.quick(), **options))


def _statistics(out: Path) -> None:
    """Table 1, Fig. 6 and Fig. 7 of 100 networks of each split."""
    from ghn_jax.plot.splits import draw_examples, draw_statistics

    out.mkdir(parents=True, exist_ok=True)
    found = {split: evaluation_set(split)[:100] for split in EVALUATION_SIZES}
    found["train"] = [sample_architecture("train", 0, i) for i in range(100)]
    columns = {split: statistics(some) for split, some in found.items()}
    some = {split: [build_graph(a, 1) for a in found[split][:10]] for split in found}
    distances = {
        split: [hungarian_distance(a, b) for a in graphs for b in some["train"]]
        for split, graphs in tqdm(some.items(), desc="distances", leave=False)
        if split != "train"
    }
    draw_statistics(columns, out / "statistics.png", distances=distances)
    draw_examples({split: graphs[:3] for split, graphs in some.items()}, out / "examples.png")
    write_beside(out / TABLE, f"```\n{table(columns)}\n```\n")


def _experiment(name: str):
    return importlib.import_module(f"{__package__}.{name.replace('-', '_')}")


# --- The page -------------------------------------------------------------------------------------

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
h2 { border-top: 1px solid #ddd; padding-top: 1.5rem; margin-top: 2.5rem; }
h2 small { color: #777; font-weight: normal; display: block; font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #777; font-size: .85rem; }
.paper { background: #f3f6fb; padding: .6rem 1rem; } .failed { background: #fdf0ee; }
pre, code { font-size: .85rem; } pre { overflow-x: auto; padding: .6rem 1rem; background: #f7f7f7; }
nav a { margin-right: 1rem; }
"""


def _section(exhibit: Exhibit, folder: Path, took: str, problem: str) -> str:
    """An experiment on the page, as HTML."""
    import markdown  # of an extra

    text = html.escape
    parts = [
        f'<h2 id="{exhibit.name}">{text(exhibit.title)}'
        f"<small>{text(exhibit.place)} of the paper · {took}</small></h2>",
        f'<p class="paper"><b>In the paper:</b> {text(exhibit.paper)}</p>',
    ]
    if exhibit.name != STATISTICS:
        parts.append(f"<p><code>ghn-paper {exhibit.name} --quick</code></p>")
    if problem:
        parts.append(f'<pre class="failed">{text(problem)}</pre>')
    if (folder / TABLE).exists():
        parts.append(markdown.markdown((folder / TABLE).read_text(),
                                       extensions=["tables", "fenced_code"]))  # fmt: skip
    for picture in sorted(folder.glob("*.png")):
        caption = picture.stem.replace("_", " ")
        parts.append(
            f'<figure><img src="{folder.name}/{picture.name}" alt="{text(caption)}" '
            f'loading="lazy"><figcaption>{text(caption)}</figcaption></figure>'
        )
    return "\n".join(parts)


_TITLE = "The paper at small size"


def _page(config: Config, ghns: Sequence[Path], sections: Sequence[str]) -> str:
    curves = "".join(
        f'<figure><img src="hypernetworks/{path.name}" alt="training of {path.stem}" '
        f'loading="lazy"><figcaption>Training of {path.stem}</figcaption></figure>'
        for path in sorted((config.out / "hypernetworks").glob("*.png"))
    )
    names = ", ".join(path.name for path in ghns)
    links = "".join(f'<a href="#{e.name}">{html.escape(e.place)}</a>' for e in _chosen(config))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{_TITLE}</title><style>{_STYLE}</style>"
        "<h1>The paper at small size</h1><p>Every experiment of <i>Parameter Prediction for Unseen "
        "Deep Architectures</i>, in minutes each: on handwritten digits of 16×16 pixels, with "
        f"small networks, and with hypernetworks that were trained for minutes ({names}). The "
        "paper's numbers are of CIFAR-10 and of days on GPUs: compare orders, not values.</p>"
        f"<nav>{links}</nav>{curves}{''.join(sections)}</html>\n"
    )


def _chosen(config: Config) -> list[Exhibit]:
    names = [exhibit.name for exhibit in EXHIBITS]
    for name in config.only:
        if name not in names:
            raise ValueError(f"--only has {name!r}; allowed: {', '.join(names)}")
    return [e for e in EXHIBITS if not config.only or e.name in config.only]


def run(config: Config, report: Callable[[str], None] = tqdm.write) -> None:
    """Makes what is missing, and the page after each experiment.

    Raises:
      ValueError: not --quick, or an unknown experiment.
      SystemExit: experiments failed; the page says why, and all others are on it.
    """
    if not config.quick:
        raise ValueError(
            "all experiments at the paper's size take months; use `ghn-paper all --quick`, or run "
            "them one by one"
        )
    exhibits = _chosen(config)
    page = config.out / "index.html"
    if page.exists() and _TITLE not in page.read_text(errors="replace"):
        raise ValueError(f"{page} is another page; give another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    ghns = _hypernetworks(config)
    failed = []
    # What is there from before stays on the page.
    sections = {
        e.name: _section(e, config.out / e.name, "from before", "")
        for e in EXHIBITS
        if e not in exhibits and (config.out / e.name).is_dir()
    }
    for exhibit in tqdm(exhibits, desc="experiments", unit="experiment", dynamic_ncols=True):
        start, problem = time.perf_counter(), ""
        report(f"\n{exhibit.place}: {exhibit.title}")
        try:
            _make(exhibit, config, ghns)
        except Exception as error:  # the others are worth having
            problem = "".join(traceback.format_exception_only(error))
            failed.append(exhibit.name)
            report(traceback.format_exc())
        took = f"{time.perf_counter() - start:.0f} s"
        sections[exhibit.name] = _section(exhibit, config.out / exhibit.name, took, problem)
        shown = [sections[e.name] for e in EXHIBITS if e.name in sections]
        write_beside(config.out / "index.html", _page(config, ghns, shown))
    report(f"\nThe page: {os.fspath(config.out / 'index.html')}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the page says why")
