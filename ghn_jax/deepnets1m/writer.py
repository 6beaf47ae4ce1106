"""Writer of official DeepNets-1M files: HDF5 with the graphs, JSON with the architectures.

The authors' code reads what is written here, and what is read from an official file is written as
it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.reader import (
    META_DIGEST,
    STORED_PATHS,
    FileGraph,
    Tables,
    digests_path,
    graph_digest,
    meta_path,
)
from ghn_jax.deepnets1m.sampling import Rules, reference_size
from ghn_jax.files.replace import written_beside

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

# Bytes that a file may grow by beside what is written to it: HDF5 holds back as many at most.
_HDF5_ROOM = 2**25


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
) -> tuple[dict[str, Any], list[str]]:
    """Writes the graphs of a split; its part of the meta file, and the graphs' digests."""
    primitives, names = _Names(tables.primitives), _Names(tables.names)
    entries, digests = [], []
    for i, (entry, graph) in enumerate(networks):
        rows = zip(graph.extended, graph.cells.tolist(), graph.names, strict=True)
        nodes = np.array(
            [(primitives(p), cell, names(_local(name))) for p, cell, name in rows], np.uint16
        )
        _check_room(Path(group.file.filename), graph.distances.nbytes + nodes.nbytes)
        group.create_dataset(f"{i}/adj", data=graph.distances)
        group.create_dataset(f"{i}/nodes", data=nodes)
        entries.append(dict(entry))
        place = f"{group.name.removeprefix('/')}/{i}"
        digests.append(graph_digest(graph.distances, nodes, place))
    meta = {"primitives_ext": primitives.table(), "unique_op_names": names.table()}
    return {"nets": entries, "meta": meta}, digests


def _check_room(path: Path, more: int) -> None:
    """Raises OSError where a file cannot grow by so many bytes, and some for HDF5 itself.

    Some versions of HDF5 crash where they cannot write, so they are not let come to that.
    """
    needed = more + _HDF5_ROOM
    have = path.stat().st_size if path.exists() else 0
    if resource is not None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and have + needed > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_deepnets1m(
    path: str | os.PathLike[str],
    splits: Mapping[str, Iterable[tuple[Mapping[str, Any], FileGraph]]],
    tables: Mapping[str, Tables] | None = None,
) -> None:
    """Writes an official HDF5 file and, beside it, its meta file.

    They appear under their names only when they are complete. A third file has digests of what is
    in them, which have no place in the authors' formats.

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
    targets = (path, meta_path(path), digests_path(path))
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} exists; remove it or give another name")
    known = tables or {}
    with contextlib.ExitStack() as stack:
        # Entered first, renamed last: where there is the HDF5 file, there are the others.
        beside, meta_beside, digests_beside = (
            stack.enter_context(written_beside(target)) for target in targets
        )
        _check_room(beside, 0)
        with h5py.File(beside, "w") as file:
            file.attrs["title"] = "DeepNets-1M"
            written = {
                split: _write_split(
                    file.create_group(split),
                    networks,
                    known.get(split, Tables((), ())),
                )
                for split, networks in splits.items()
            }
        content = json.dumps({split: meta for split, (meta, _) in written.items()}).encode()
        meta_beside.write_bytes(content)
        digests = {split: digests for split, (_, digests) in written.items()}
        digests[META_DIGEST] = hashlib.sha256(content).hexdigest()
        digests_beside.write_text(json.dumps(digests))
