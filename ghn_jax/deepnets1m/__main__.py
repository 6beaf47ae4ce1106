"""DeepNets-1M on the command line.

python -m ghn_jax.deepnets1m stats --splits test deep --num 100
python -m ghn_jax.deepnets1m stats --splits test --nets deepnets1m_eval.hdf5
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from ghn_jax.deepnets1m.reader import DeepNets1M
from ghn_jax.deepnets1m.statistics import statistics, table
from ghn_jax.sampling import SPLITS, sample_architecture


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
    if num is not None and num < 1:
        raise ValueError(f"--num is {num}; allowed: 1 or more")
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


def main(arguments: list[str]) -> None:
    """Entry point."""
    tyro.extras.subcommand_cli_from_dict({"stats": stats}, args=arguments, description=__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"ghn_jax.deepnets1m: {error}")
