"""Writer of official DeepNets-1M files: HDF5 with the graphs, JSON with the architectures.

The authors' code reads what is written here, and what is read from an official file is written as
it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.reader import (
    GRAPH_DIGESTS,
    META_DIGEST,
    STORED_PATHS,
    FileGraph,
    Tables,
    graph_digest,
    meta_path,
)
from ghn_jax.deepnets1m.sampling import Rules, reference_size
from ghn_jax.files.replace import written_beside


def entry_and_graph(arch: Architecture, rules: Rules) -> tuple[dict[str, Any], FileGraph]:
    """What official files hold for an architecture of a split with some rules.

    Training networks have no width there: it is drawn when they are read. Others have the one they
    are widened from.
    """
    graph = build_graph(arch, STORED_PATHS)
    primitives = [PRIMITIVES[p] for p in graph.primitives]
    distances = np.zeros((len(graph), len(graph)), np.uint8)
    distances[graph.edges[:, 0], graph.edges[:, 1]] = graph.edges[:, 2]
    extended = [
        "conv_1x1" if primitive == "conv" and shape[2:] in ((), (1, 1)) else primitive
        for primitive, shape in zip(primitives, graph.param_shapes, strict=True)
    ]
    data = arch.to_dict()
    keys = ("stem_type", "stem_pool", "norm", "preproc", "fc_layers", "glob_avg", "genotype",
            "n_cells", "ks", "C_mult", "fc_dim")  # fmt: skip
    entry = {key: data[key] for key in keys}
    if rules.min_params is None:
        entry["fc_dim"] = 256
    entry["num_nodes"] = len(graph)
    entry["num_params"] = {
        style: reference_size(arch, size) for style, size in (("cifar10", 32), ("imagenet", 224))
    }
    if rules.min_params is not None:
        entry["C"] = arch.C // rules.widen
    return entry, FileGraph(primitives, graph.names, graph.cells, distances, extended)


class _Names:
    """Numbers names in the order in which they come, after those that have numbers already."""

    def __init__(self, known: Sequence[str]):
        self.numbers = {name: number for number, name in enumerate(known)}

    def __call__(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def table(self) -> dict[str, str]:
        return {str(number): name for name, number in self.numbers.items()}


def _local(name: str) -> str:
    """A parameter's name without its cell, which is stored beside it."""
    return name.split(".", 2)[2] if name.startswith("cells.") else name


def _write_split(
    group: h5py.Group, networks: Iterable[tuple[Mapping, FileGraph]], tables: Tables
) -> dict:
    primitives, names = _Names(tables.primitives), _Names(tables.names)
    entries, digests = [], []
    for i, (entry, graph) in enumerate(networks):
        rows = zip(graph.extended, graph.cells.tolist(), graph.names, strict=True)
        nodes = np.array(
            [(primitives(p), cell, names(_local(name))) for p, cell, name in rows], np.uint16
        )
        group.create_dataset(f"{i}/adj", data=graph.distances)
        group.create_dataset(f"{i}/nodes", data=nodes)
        entries.append(dict(entry))
        place = f"{group.name.removeprefix('/')}/{i}"
        digests.append(graph_digest(graph.distances, nodes, place))
    return {
        "nets": entries,
        "meta": {"primitives_ext": primitives.table(), "unique_op_names": names.table()},
        GRAPH_DIGESTS: digests,
    }


class _Sink:
    """A file that HDF5 writes to: some versions of it crash where writing fails.

    It is told of no failure, and what it writes after one is dropped; `checked` tells.
    """

    def __init__(self, file: io.BufferedRandom):
        self._file = file
        self._error: OSError | None = None
        self.seek, self.tell = file.seek, file.tell
        self.read, self.readinto = file.read, file.readinto

    def write(self, data) -> int:
        self._try(self._file.write, data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._try(self._file.truncate, size)
        return size or 0

    def flush(self) -> None:
        self._try(self._file.flush)

    def _try(self, act: Callable, *args: Any) -> None:
        if self._error is None:
            try:
                act(*args)
            except OSError as error:
                self._error = error

    def checked(self, passed: Any = None) -> Any:
        """Passes something on if all has been written so far.

        Raises:
          OSError: that of the first failure.
        """
        if self._error is not None:
            raise self._error
        return passed


def write_deepnets1m(
    path: str | os.PathLike[str],
    splits: Mapping[str, Iterable[tuple[Mapping[str, Any], FileGraph]]],
    tables: Mapping[str, Tables] | None = None,
) -> None:
    """Writes an official HDF5 file and, beside it, its meta file.

    Both appear under their names only when they are complete. They hold digests of what is in them,
    which the authors' code passes over.

    Args:
      path: the HDF5 file, such as 'deepnets1m_eval.hdf5'.
      splits: meta-file entries and graphs of each split's networks, from `entry_and_graph` or from
        `DeepNets1M.entry` and `.graph`.
      tables: `DeepNets1M.tables` of splits that are copied, whose names keep their numbers.

    Raises:
      FileExistsError: one of the files exists.
      OSError: they could not be written; nothing is left of them.
    """
    path = Path(path)
    targets = (path, meta_path(path))
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists; remove it or give another name")
    known = tables or {}
    with contextlib.ExitStack() as stack:
        # Entered first, renamed last: where there is the HDF5 file, there is its meta file.
        beside, meta_beside = (stack.enter_context(written_beside(target)) for target in targets)
        sink = _Sink(stack.enter_context(beside.open("wb+")))
        with h5py.File(sink, "w") as file:
            file.attrs["title"] = "DeepNets-1M"
            meta = {
                split: _write_split(
                    file.create_group(split),
                    map(sink.checked, networks),
                    known.get(split, Tables((), ())),
                )
                for split, networks in splits.items()
            }
            content = json.dumps(meta).encode()
            file.attrs[META_DIGEST] = hashlib.sha256(content).hexdigest()
        sink.checked()
        meta_beside.write_bytes(content)
