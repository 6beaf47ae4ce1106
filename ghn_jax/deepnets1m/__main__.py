"""DeepNets-1M on the command line.

python -m ghn_jax.deepnets1m stats --splits test deep --num 100
python -m ghn_jax.deepnets1m stats --splits test --nets deepnets1m_eval.hdf5
python -m ghn_jax.deepnets1m export --kind train --num 1000 --out DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm, trange

from ghn_jax.deepnets1m.freeze import generate
from ghn_jax.deepnets1m.reader import DeepNets1M, meta_path
from ghn_jax.deepnets1m.statistics import statistics, table
from ghn_jax.deepnets1m.writer import entry_and_graph, write_deepnets1m
from ghn_jax.evaluation_sets import EVALUATION_SIZES, evaluation_set, pack
from ghn_jax.sampling import SPLITS, rules_of, sample_architecture


def _check_number(num: int | None) -> None:
    if num is not None and num < 1:
        raise ValueError(f"--num is {num}; allowed: 1 or more")


def stats(
    splits: tuple[str, ...] = tuple(SPLITS),
    num: int | None = None,
    nets: Path | None = None,
    seed: int = 0,
) -> None:
    """Prints Table 1's rows for generated or official architectures.

    Args:
      splits: one column for each.
      num: architectures of each split; default: 500, or all of an official file.
      nets: official HDF5 file to take them from, in place of generating them.
      seed: of the generated architectures.
    """
    _check_number(num)
    unknown = [split for split in splits if split not in SPLITS]
    if unknown and nets is None:
        raise ValueError(f"--splits has {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    columns = {}
    for split in splits:
        if nets is None:
            count = num or 500
            architectures = (sample_architecture(split, seed, i) for i in range(count))
        else:
            file = DeepNets1M.open(nets, split)
            count = min(num or len(file), len(file))
            architectures = (file[i] for i in range(count))
        columns[split] = statistics(tqdm(architectures, desc=split, total=count, leave=False))
    print(table(columns))


def export(
    kind: Literal["train", "eval", "search"],
    out: Path,
    num: int | None = None,
    nets: Path | None = None,
    seed: int = 0,
) -> None:
    """Writes an official file, deepnets1m_KIND.hdf5, with its meta file.

    Args:
      kind: train, eval (the six frozen evaluation sets) or search.
      out: the folder to write to.
      num: networks of each split; default: 1,000,000 for train, as in the paper, 100,000 for
        search, all for eval. A training network takes some 45 kB.
      nets: official HDF5 file to copy the networks from, in place of generating them.
      seed: of the generated networks of train and search.
    """
    _check_number(num)
    if not out.is_dir():
        raise ValueError(f"--out is {out}, which is not a folder; make it first")
    splits = tuple(EVALUATION_SIZES) if kind == "eval" else (kind,)
    tables = {}
    if nets is not None:
        files = {split: DeepNets1M.open(nets, split) for split in splits}
        sizes = {split: min(num or len(file), len(file)) for split, file in files.items()}
        tables = {split: file.tables for split, file in files.items()}
    elif kind == "eval":
        sizes = {split: min(num or size, size) for split, size in EVALUATION_SIZES.items()}
    else:
        sizes = {kind: num or (10**6 if kind == "train" else 10**5)}

    def networks(split: str):
        for i in trange(sizes[split], desc=split, unit="network"):
            if nets is not None:
                yield files[split].entry(i), files[split].graph(i)
            elif kind == "eval":
                yield entry_and_graph(evaluation_set(split)[i], rules_of(split))
            else:
                yield entry_and_graph(sample_architecture(split, seed, i), rules_of(split))

    path = out / f"deepnets1m_{kind}.hdf5"
    write_deepnets1m(path, {split: networks(split) for split in splits}, tables)
    print(f"wrote {path} and {meta_path(path).name}: {sum(sizes.values()):,} networks")


def freeze(out: Path, seed: int = 0) -> None:
    """Generates the evaluation sets and writes them as the file that the package keeps.

    Args:
      out: the file to write, compressed JSON.
      seed: names the sets; those of the package have 0.
    """
    out.write_bytes(pack(generate(seed)))


def main(arguments: list[str]) -> None:
    """Entry point."""
    tyro.extras.subcommand_cli_from_dict(
        {"stats": stats, "export": export, "freeze": freeze}, args=arguments, description=__doc__
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"ghn_jax.deepnets1m: {error}")
