r"""The paper's experiments: `ghn-paper NAME [--quick] [options]`.

    ghn-paper trained-networks --quick                  # minutes, on digits
    ghn-paper trained-networks --dataset cifar10 --data-dir DIR --split test --out runs/sgd
    ghn-paper few-shot --help                           # what one experiment does, and its options

Without --quick the options are the paper's, which may take days. Each experiment writes what it
finds into a folder as it goes; the same command again computes what is missing there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import tyro

from ghn_jax.cli import command
from ghn_jax.engine.compilation import default_program_folder, keep_programs
from ghn_jax.engine.memory import keep_memory

PROG = "ghn-paper"

# Name of an experiment -> what it is; its file is named after it, but for `all`.
EXPERIMENTS = {
    "all": "every table and figure at small size, as a page of pictures (with --quick)",
    "predicted-networks": "networks with predicted parameters (Tables 3 and 4, upper halves)",
    "trained-networks": "networks trained by SGD or Adam (Tables 3 and 4, lower halves)",
    "properties": "properties predicted from embeddings (Fig. 4, 11)",
    "nasbench201": "the same on the networks of NAS-Bench-201",
    "search": "architecture search by predicted accuracy (Table 9)",
    "compared-architectures": "distances of architectures and of splits (Tables 10, 11, Fig. 12)",
    "predicted-parameters": "diversity and sparsity of predicted parameters (Table 12)",
    "ablations": "GHN-2 without its parts, and variants of it (Tables 5, 8); also table5, table8",
    "training-architectures": "accuracy by the number of training architectures (Fig. 3)",
    "activations": "variance of activations under predicted parameters (Fig. 8)",
    "generalisation": "accuracy by width, depth and number of nodes (Fig. 10)",
    "convergence": "training from predicted and from random parameters (Fig. 13)",
    "meta-batches": "training by meta-batch size (Fig. 9)",
    "training-speed": "seconds of an update of hypernetworks (Table 13)",
    "few-shot": "fine-tuning on 100 images of each class (Table 6, left)",
    "detection": "detection of pedestrians (Table 6, right)",
}


_ALSO = {"table5": "ablations", "table8": "ablations"}


def usage() -> str:
    """What `ghn-paper --help` says."""
    width = max(map(len, EXPERIMENTS))
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, what in EXPERIMENTS.items())
    return f"usage: {PROG} NAME [--quick] [options]\n\n{__doc__}\nExperiments:\n{listed}\n"


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        sys.exit(0)
    name, *rest = arguments
    name = _ALSO.get(name, name)
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}; allowed: {', '.join(EXPERIMENTS)}")
    file = "gallery" if name == "all" else name.replace("-", "_")
    module = importlib.import_module(f"ghn_jax.evaluation.experiments.{file}")
    quick = "--quick" in rest
    default = module.quick() if quick else module.Config()
    config = tyro.cli(
        type(default),
        prog=f"{PROG} {name}",
        description=f"{module.__doc__}\n--quick: small settings, minutes on two cores.",
        default=default,
        args=[argument for argument in rest if argument != "--quick"],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    keep_programs(default_program_folder())
    keep_memory()
    module.run(config)


run = command(PROG, main)

if __name__ == "__main__":
    run()
