"""The main job in minutes, on scikit-learn's handwritten digits: `make demo`.

    python train/demo.py

Trains a GHN-2 on a stream of small architectures (preset `demo`), predicts the parameters of
networks that it never saw, prints their accuracies beside the same networks with random (He)
parameters, and draws the training curve, the accuracies and a computational graph.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import train_ghn
import tyro
from tqdm import tqdm

from ghn_jax.charts import accuracy_bars, training_curve
from ghn_jax.checkpoint import Checkpoints, load_ghn
from ghn_jax.compilation import keep_programs
from ghn_jax.drawing import draw_graph
from ghn_jax.evaluation import evaluate_ghn, named_architectures, summary
from ghn_jax.images import load_images
from ghn_jax.memory import keep_memory
from ghn_jax.presets import preset
from ghn_jax.sampling import sample_architecture

UNSEEN = 20  # networks of the training rules, from a random stream that training never draws from


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Where the demonstration goes, and how long it trains."""

    out: Path = Path("runs/demo")  # goes on with what it has trained there before
    steps: int = preset("demo").steps  # updates


def networks(config: train_ghn.TrainConfig, image_size: int):
    """The unseen architectures: 20 of the training rules, and the named ones."""
    rules = dataclasses.replace(config.rules(image_size), stream="test")
    unseen = [sample_architecture("test", 0, i, rules=rules) for i in range(UNSEEN)]
    named = named_architectures(config.widths[0], n_cells=config.n_cells[1])
    return [(f"unseen {i}", arch) for i, arch in enumerate(unseen)] + list(named.items())


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


def main(arguments: list[str]) -> None:
    """Entry point."""
    start = time.perf_counter()
    options = tyro.cli(DemoConfig, args=arguments, description=__doc__)
    # A second time goes on with what the first has trained.
    resume = Checkpoints(options.out).latest() is not None
    config = dataclasses.replace(
        preset("demo"), out=options.out, steps=options.steps, resume=resume
    )
    train_ghn.check(config)
    keep_programs(config.cache_dir)
    keep_memory()
    train_ghn.train(config, load_images(config.dataset, "train"))

    ghn, variables = load_ghn(options.out)
    images = load_images(config.dataset, "test")
    todo = networks(config, images.image_size)
    with tqdm(total=len(todo), unit="network", desc="evaluating", dynamic_ncols=True) as bar:
        records = evaluate_ghn(
            ghn, variables, todo, images,
            batch_size=64, compare_random=True, report=lambda _: bar.update(),
        )  # fmt: skip
    print(f"\nTest accuracy on {len(images)} digits of writers not in the training images:\n")
    print(table(records))
    (options.out / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    training_curve(options.out / "metrics.jsonl", options.out / "training.png")
    accuracy_bars(records, options.out / "accuracy.png", chance=1 / images.num_classes)
    graph = ghn.graph(todo[0][1], image_size=images.image_size)
    draw_graph(graph, options.out / "graph.png", title=f"{todo[0][0]}: {len(graph)} nodes")
    print(f"\nFigures, results and the trained hypernetwork are in {options.out}/ "
          f"({time.perf_counter() - start:.0f} s in all).")  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"demo.py: {error}")
