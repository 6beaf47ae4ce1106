"""The main job in minutes, on scikit-learn's handwritten digits: `make demo`.

    python train/demo.py

Trains a GHN-2 on a stream of small architectures (preset `demo`), predicts the parameters of
networks that it never saw, prints their accuracies beside the same networks with random (He)
parameters, and draws the training curve, the accuracies and a computational graph.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from tqdm import tqdm

from ghn_jax.cli import command
from ghn_jax.data.images import load_images
from ghn_jax.engine.compilation import keep_programs
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.accuracy import evaluate_ghn, summary
from ghn_jax.evaluation.networks import named_architectures, of_rules
from ghn_jax.files.replace import write_beside
from ghn_jax.hypernet.checkpoint import Checkpoints, load_ghn
from ghn_jax.plot.charts import accuracy_bars, training_curve
from ghn_jax.plot.drawing import draw_graph
from ghn_jax.training.config import TrainConfig, preset
from ghn_jax.training.loop import check, train

UNSEEN = 20  # networks of the training rules, from a random stream that training never draws from

PROG = "demo"


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Where the demonstration goes, and how long it trains."""

    out: Path = Path("runs/demo")  # goes on with what it has trained there before
    steps: int = preset("demo").data.steps  # updates


def networks(config: TrainConfig, image_size: int):
    """The unseen architectures: 20 of the training rules, and the named ones."""
    named = named_architectures(config.space.widths[0], n_cells=config.space.n_cells[1])
    return of_rules(config.space.rules(image_size), UNSEEN) + list(named.items())


def table(records: list[dict]) -> str:
    """The accuracies as text, networks of the training rules first."""
    lines = [f"{'network':<12}{'parameters':>12}{'predicted':>12}{'random':>10}"]
    for r in records:
        lines.append(
            f"{r['name']:<12}{r['parameters']:>12,}{r['top1']:>12.1%}{r['top1_random']:>10.1%}"
        )
    unseen = records[:UNSEEN]
    mean, error, best = summary(unseen)
    random = summary(unseen, "top1_random")[0]
    lines.append(f"{'mean of ' + str(UNSEEN):<24}{mean:>12.1%}{random:>10.1%}   "
                 f"(standard error {error:.1%}, best {best:.1%})")  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    start = time.perf_counter()
    options = tyro.cli(DemoConfig, prog=PROG, args=arguments, description=__doc__)
    # A second time goes on with what the first has trained.
    resume = Checkpoints(options.out).latest() is not None
    config = preset("demo").replace(out=options.out, steps=options.steps, resume=resume)
    check(config)
    keep_programs(config.run.cache_dir)
    keep_memory()
    train(config, load_images(config.data.dataset, "train"))

    ghn, variables = load_ghn(options.out)
    images = load_images(config.data.dataset, "test")
    todo = networks(config, images.image_size)
    with tqdm(total=len(todo), unit="network", desc="evaluating", dynamic_ncols=True) as bar:
        records = evaluate_ghn(
            ghn, variables, todo, images,
            batch_size=64, compare_random=True, report=lambda _: bar.update(),
        )  # fmt: skip
    print(f"\nTest accuracy on {len(images)} digits of writers not in the training images:\n")
    print(table(records))
    write_beside(options.out / "results.json", json.dumps(records, indent=1) + "\n")
    training_curve(options.out / "metrics.jsonl", options.out / "training.png")
    accuracy_bars(records, options.out / "accuracy.png", chance=1 / images.num_classes)
    graph = ghn.graph(todo[0][1], image_size=images.image_size)
    draw_graph(graph, options.out / "graph.png", title=f"{todo[0][0]}: {len(graph)} nodes")
    print(f"\nFigures, results and the trained hypernetwork are in {options.out}/ "
          f"({time.perf_counter() - start:.0f} s in all).")  # fmt: skip


run = command(PROG, main)

if __name__ == "__main__":
    run()
