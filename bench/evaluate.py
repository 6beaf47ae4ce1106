"""One network of the `test` split over 10,000 images (32x32), ours beside the authors'.

    python bench/evaluate.py                                    # ours alone
    python bench/evaluate.py --reference PATH/TO/ppuda          # with the authors' code (PyTorch)

32 channels, batches of 64, batch norm on the statistics of each. From the architecture and its
parameters to the accuracy: what is compiled for a network is counted, and nothing comes from a
cache. Parameters and images are random.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from reference import Reference
from tqdm import tqdm

from ghn_jax.cli.deepnets1m import export
from ghn_jax.data.images import Images
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.accuracy import evaluate_network, random_parameters


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure."""

    first: int = 0  # network of the split
    networks: int = 20  # from that one on
    images: int = 10_000
    width: int = 32  # C
    batch_size: int = 64
    reference: Path | None = None  # the authors' code, a checkout of facebookresearch/ppuda
    pause: float = 0.3  # seconds before each timing, for the other's threads to stop spinning


def random_images(count: int) -> Images:
    """Images of noise."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    return Images("noise", "test", 10, 32, (0.5,) * 3, (0.25,) * 3, pixels, labels)


def run(options: Options, reference: Reference | None) -> None:
    """Times every network; prints a table and a JSON line."""
    images = random_images(options.images)
    architectures = evaluation_set("test")[options.first : options.first + options.networks]
    engine, rows = Engine(), []
    for index, arch in enumerate(tqdm(architectures, unit="network"), options.first):
        arch = arch.replace(C=options.width)
        params = random_parameters(build_network(arch), 32, seed=index)
        time.sleep(options.pause)
        start = time.perf_counter()
        evaluate_network(
            build_network(arch), params, images=images, batch_size=options.batch_size, engine=engine
        )
        row = {"ours": time.perf_counter() - start}
        if reference:
            time.sleep(options.pause)
            answer = reference(index=index, C=options.width, images=options.images)
            row["theirs"] = answer["seconds"]
        rows.append(row)
        tqdm.write(f"{index:>3}  " + "  ".join(f"{k} {v:.1f}" for k, v in row.items()))
    result = {"benchmark": "evaluate", "networks": len(rows), "images": options.images}
    lines = []
    for name, words in (("ours", "seconds a network"), ("theirs", "the same, authors' code")):
        seconds = [row[name] for row in rows if name in row]
        if seconds:
            values = [round(f(seconds), 1) for f in (statistics.mean, min, max)]
            result[name] = dict(zip(("mean", "least", "most"), values, strict=True))
            lines.append((f"{words}: mean, least, most", *values))
    if reference:
        result["ratio_of_means"] = round(result["theirs"]["mean"] / result["ours"]["mean"], 2)
        result["worst_ratio"] = round(min(r["theirs"] / r["ours"] for r in rows), 2)
        result["reference"] = reference.about
        lines.append(
            ("times as fast: by means, at worst", result["ratio_of_means"], result["worst_ratio"])
        )
    for words, *values in lines:
        print(f"{words:<48}" + "".join(f"{v:>8}" for v in values))
    print(json.dumps(result))


def main(options: Options) -> None:
    """Starts the authors' code where it is asked for."""
    keep_memory()
    if options.reference is None:
        run(options, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        export("eval", Path(folder), num=options.first + options.networks)
        nets = Path(folder) / "deepnets1m_eval.hdf5"
        run(options, Reference("evaluate", options.reference, nets, options.batch_size))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
