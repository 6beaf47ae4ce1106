"""Networks of the `test` split trained for an epoch, ours beside the authors' code.

    python bench/train_network.py --data-dir DIR --reference PATH/TO/ppuda

The recipe of Table 3's lower half (SGD, batch 96, learning rate 0.025, batch norm on running
averages), one epoch of 45,000 images of CIFAR-10; both begin with the same random parameters. Each
seed is another start and another order of the images. Prints test accuracy, seconds and CPU seconds
of training, compilation included; with `--out` it goes on where it was. The authors' code needs
torch, torchvision and networkx.
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
import safetensors.numpy
import tyro
from reference import Reference

from ghn_jax.cli.deepnets1m import export
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.engine.engine import Engine
from ghn_jax.engine.memory import keep_memory
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.experiments.records import Records
from ghn_jax.evaluation.experiments.trained_networks import train_network, training_of
from ghn_jax.evaluation.recipe import Recipe
from ghn_jax.interop.torch_network import to_torch


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train."""

    networks: tuple[int, ...] = (70, 106, 266)  # of the split; these have the fewest FLOPs
    width: int = 16  # C
    seeds: int = 3
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    reference: Path | None = None  # the authors' code, a checkout of facebookresearch/ppuda
    out: Path = Path("runs/bench/train_network")  # folder for what was measured


def main(options: Options) -> None:
    """Trains every network with every seed; prints a JSON line for each, then a table."""
    keep_memory()
    recipe, engine = Recipe(epochs=1), Engine()
    parts = {part: load_images("cifar10", part, data_dir=options.data_dir)
             for part in ("train", "test")}  # fmt: skip
    train, tests = parts["train"], {"test": parts["test"]}
    records = Records.open(options.out, {"width": options.width, "beside": bool(options.reference)})
    with tempfile.TemporaryDirectory() as folder:
        pixels, start = Path(folder) / "images.npz", Path(folder) / "start.safetensors"
        np.savez(
            pixels, mean=np.float32(train.mean), std=np.float32(train.std),
            **{f"{part}_x": some.pixels for part, some in parts.items()},
            **{f"{part}_y": some.labels for part, some in parts.items()},
        )  # fmt: skip
        reference = None
        if options.reference:
            export("eval", Path(folder))
            nets = Path(folder) / "deepnets1m_eval.hdf5"
            reference = Reference("train", options.reference, nets, recipe.batch_size)
        for seed in range(options.seeds):
            for index in options.networks:
                name = f"test[{index}], seed {seed}"
                if name in records:
                    continue
                arch = evaluation_set("test")[index].replace(C=options.width)
                params = random_parameters(build_network(arch), 32, seed)
                safetensors.numpy.save_file(to_torch(params, arch), start)
                training = training_of(engine, arch, recipe, train, seed)
                cpu = time.process_time()
                found = train_network(
                    training, params, recipe, train, tests, report_epochs=(), seed=seed
                )
                row = {"name": name, "network": index, "top1": found["final_test_top1"],
                       "seconds": found["seconds"], "cpu": time.process_time() - cpu}  # fmt: skip
                if reference:
                    answer = reference(index=index, C=options.width, seed=seed,
                                       start=str(start), images=str(pixels))  # fmt: skip
                    row |= {"their_top1": answer["top1"], "their_seconds": answer["training"],
                            "their_cpu": answer["cpu_seconds"]}  # fmt: skip
                records.add(row)
                print(json.dumps(row), flush=True)
    for index in options.networks:
        mine = [row for row in records.values() if row["network"] == index]
        print(f"test[{index}], {len(mine)} seeds")
        for who, prefix in (("ours", ""), ("the authors'", "their_")):
            if f"{prefix}top1" not in mine[0]:
                continue
            top1 = [100 * row[f"{prefix}top1"] for row in mine]
            seconds = statistics.mean(row[f"{prefix}seconds"] for row in mine)
            cpu = statistics.mean(row[f"{prefix}cpu"] for row in mine)
            print(f"  {who:<13}{statistics.mean(top1):6.1f}% ({min(top1):.1f}-{max(top1):.1f})"
                  f"{seconds:8.0f} s, {cpu:.0f} s of CPU time")  # fmt: skip


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"train_network.py: {error}")
