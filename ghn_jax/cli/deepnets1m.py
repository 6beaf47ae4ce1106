"""DeepNets-1M on the command line.

    ghn-deepnets1m stats --splits test deep --num 100
    ghn-deepnets1m stats --splits test --nets deepnets1m_eval.hdf5
    ghn-deepnets1m export --kind train --num 1000 --out DIR
    ghn-deepnets1m unique --num 1000000

Each of them explains its options: `ghn-deepnets1m stats --help`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm, trange

from ghn_jax.cli import command
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.canonical import canonical
from ghn_jax.deepnets1m.distance import hungarian_distance
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, evaluation_set, pack
from ghn_jax.deepnets1m.freeze import generate
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.deepnets1m.reader import DeepNets1M, meta_path
from ghn_jax.deepnets1m.sampling import SPLITS, rules_of, sample_architecture
from ghn_jax.deepnets1m.statistics import statistics, table
from ghn_jax.deepnets1m.writer import entry_and_graph, write_deepnets1m
from ghn_jax.files.replace import write_beside

_DRAWN = 40  # graphs of each split whose distances are drawn

PROG = "ghn-deepnets1m"


@dataclasses.dataclass(frozen=True)
class Generated:
    """Generated architectures, as a sequence."""

    split: str
    seed: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Architecture:
        return sample_architecture(self.split, self.seed, index)


def _check_number(num: int | None) -> None:
    if num is not None and num < 1:
        raise ValueError(f"--num is {num}; allowed: 1 or more")


def stats(
    splits: tuple[str, ...] = tuple(SPLITS),
    num: int | None = None,
    nets: Path | None = None,
    seed: int | None = None,
    figures: Path | None = None,
) -> None:
    """Prints Table 1's rows for evaluation sets, generated or official architectures.

    Args:
      splits: one column for each.
      num: architectures of each split; default: all of an evaluation set or an official file, 1,000
        of what is generated.
      nets: official HDF5 file to take them from.
      seed: generate the architectures of every split with this seed; by default only train and
        search are generated (with 0), and the others are the frozen evaluation sets.
      figures: folder for pictures like the paper's Fig. 6 and Fig. 7.
    """
    _check_number(num)
    unknown = [split for split in splits if split not in SPLITS]
    if unknown and nets is None:
        raise ValueError(f"--splits has {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    if figures is not None and not figures.is_dir():
        raise ValueError(f"--figures is {figures}, which is not a folder; make it first")
    columns, some = {}, {}
    for split in splits:
        if nets is not None:
            found = DeepNets1M.open(nets, split)
        elif seed is None and split in EVALUATION_SIZES:
            found = evaluation_set(split)
        else:
            found = Generated(split, seed or 0, num or 1000)
        count = min(num or len(found), len(found))
        architectures = (found[i] for i in range(count))
        columns[split] = statistics(tqdm(architectures, desc=split, total=count, leave=False))
        some[split] = [build_graph(found[i], 1) for i in range(min(count, _DRAWN))]
    print(table(columns))
    if figures is None:
        return
    from ghn_jax.plot.splits import draw_examples, draw_statistics

    train = [build_graph(sample_architecture("train", seed or 0, i), 1) for i in range(_DRAWN)]
    distances = {
        split: [hungarian_distance(a, b) for a in tqdm(graphs, desc="distances") for b in train]
        for split, graphs in some.items()
        if split != "train"
    }
    draw_statistics(columns, figures / "statistics.png", distances=distances)
    draw_examples({split: graphs[:3] for split, graphs in some.items()}, figures / "examples.png")
    print(f"drew {figures / 'statistics.png'} and {figures / 'examples.png'}")


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


def unique(split: str = "train", num: int = 1_000_000, seed: int = 0) -> None:
    """Generates architectures and counts how many are the same network (Appendix A.2).

    Args:
      split: whose architectures.
      num: how many; a million take some five minutes.
      seed: of the architectures.
    """
    _check_number(num)
    rules_of(split)
    seen: set[bytes] = set()
    for i in trange(num, unit="network"):
        form = canonical(sample_architecture(split, seed, i))
        seen.add(hashlib.blake2b(repr(form).encode(), digest_size=16).digest())
    repeats = num - len(seen)
    print(
        f"{num:,} architectures of {split}: {len(seen):,} different networks (widths apart), "
        f"{repeats:,} ({repeats / num:.3%}) repeat one"
    )


def freeze(out: Path, seed: int = 0) -> None:
    """Generates the evaluation sets and writes them as the file that the package keeps.

    Args:
      out: the file to write, compressed JSON.
      seed: names the sets; those of the package have 0.
    """
    write_beside(out, pack(generate(seed)))


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    tyro.extras.subcommand_cli_from_dict(
        {"stats": stats, "export": export, "unique": unique, "freeze": freeze},
        prog=PROG,
        args=arguments,
        description=__doc__,
    )


run = command(PROG, main)

if __name__ == "__main__":
    run()
