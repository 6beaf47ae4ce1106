"""Reader of the official DeepNets-1M files (paper § 3): an HDF5 file and its `_meta.json`.

The meta file holds the architectures, the HDF5 file their graphs:

    nets = DeepNets1M.open("deepnets1m_eval.hdf5", "test")
    arch = nets[0]  # Architecture
    graph = nets.graph(0)  # read from the HDF5 file now

Graphs need not be read for training or evaluation: `ghn_jax.graph.build_graph` makes them from the
architecture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.deepnets1m.sampling import Rules, rules_of, seeded, set_width
from ghn_jax.deepnets1m.task import Task
from ghn_jax.files.digest import digest_of_arrays
from ghn_jax.files.json_file import parse_json, read_json
from ghn_jax.files.messages import in_a_line

# On ImageNet the authors' loader widens `wide` by less than on CIFAR-10.
_IMAGENET_WIDEN = 2

STORED_PATHS = 250  # longest paths in the files

# In the file of digests, beside those of the graphs of each split; official files have none.
META_DIGEST = "meta_sha256"

# What HDF5 raises where a file is damaged.
_DAMAGED = (
    KeyError, OSError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError,
    MemoryError,
)  # fmt: skip
# Deflate makes no more of a byte; a size beyond is not that of what the file holds.
_MOST_COMPRESSED = 1032


@dataclasses.dataclass(frozen=True)
class FileGraph:
    """A graph as it is stored, N nodes in the file's order.

    Attributes:
      primitives: N names of the 15 primitives of Table 1.
      names: N official parameter names ('cells.0._ops.1.op.1.weight'), or, without a parameter, the
        primitive's name.
      cells: (N,) int32, the cell that each node is counted to.
      distances: (N, N) uint8, [source, target]: length of the shortest directed path, 1 for a real
        edge, 0 where there is none of at most 250 edges (`STORED_PATHS`).
      extended: N names of primitives as the file has them, 'conv_1x1' among them.
    """

    primitives: list[str]
    names: list[str]
    cells: np.ndarray
    distances: np.ndarray
    extended: list[str]

    def __len__(self) -> int:
        return len(self.primitives)


class Tables(NamedTuple):
    """The names that a split's nodes refer to by number.

    Attributes:
      primitives: names of primitives, 'conv_1x1' among them.
      names: of parameters, without their cells, and of primitives without parameters.
    """

    primitives: Sequence[str]
    names: Sequence[str]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _table_1_name(name: str) -> str:
    """The primitive behind a name in the file, which may add a kernel size ('conv_1x1')."""
    if name == "fc-b":
        return "bias"
    for suffix in ("_1x1", "_3x3", "_5x5", "_7x7", "_1x7", "_7x1"):
        name = name.removesuffix(suffix)
    _require(name in PRIMITIVES, f"unknown primitive {name!r}; allowed: {', '.join(PRIMITIVES)}")
    return name


def _canonical(name: str) -> str:
    """A parameter's name within its cell; files of earlier versions leave parts of it out."""
    if name.endswith(".to_out.0."):
        return name + "weight"
    parts = name.split(".")
    # '_ops.3.1.weight' for '_ops.3.op.1.weight'
    if parts[0] == "_ops" and len(parts) > 2 and parts[2].isdigit():
        parts.insert(2, "op")
    return ".".join(parts)


def _name(name: str, primitive: str, cell: int) -> str:
    """The full name of a node; the file leaves out the cell."""
    if name.startswith(("_ops.", "preprocess")):
        return f"cells.{cell}.{_canonical(name)}"
    return name if name.endswith((".weight", ".bias")) else primitive


def _table(meta: Mapping[str, Any], key: str, path: Path) -> list[str]:
    """A table of names from the meta file, which holds it as {"0": name, "1": name, ...}."""
    try:
        table = meta[key]
        return [str(table[str(i)]) for i in range(len(table))]
    except (KeyError, TypeError):
        raise ValueError(
            f"{path}: '{key}' is missing or not a table of names; download the meta file again"
        ) from None


def _read_meta(path: Path, digest: str | None) -> dict[str, Any]:
    """The meta file, if it has that digest or none is known."""
    _require_file(path, "the file with the architectures, which belongs beside the HDF5 file")
    content = path.read_bytes()
    try:
        meta = parse_json(content)
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(
            f"{path} is truncated or not JSON ({in_a_line(error)}); download it again"
        ) from None
    _require(isinstance(meta, dict), f"{path} holds no splits; expected a JSON object of splits")
    _require(
        digest is None or digest == hashlib.sha256(content).hexdigest(),
        f"{path} is not the meta file that was written with the HDF5 file: its digest differs; "
        "get both again",
    )
    return meta


def _read_digests(path: Path) -> dict[str, Any]:
    """Digests of a meta file and of the graphs of each split; none of official files."""
    if not path.exists():
        return {}
    digests = read_json(path, "remove it to read the files unchecked")
    _require(isinstance(digests, dict), f"{path} is damaged; remove it to read the files unchecked")
    return digests


def graph_digest(distances: np.ndarray, nodes: np.ndarray, place: str) -> str:
    """Of what an HDF5 file holds of a graph, and of where: 'test/7'."""
    return digest_of_arrays((distances, nodes), place)[:16]


def _stored(dataset: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A dataset's numbers, if it is what it should be; nothing is made room for before.

    Raises:
      ValueError: it is not.
    """
    nbytes = dataset.size * dataset.dtype.itemsize
    filtered = _MOST_COMPRESSED if dataset.compression or dataset.chunks else 1
    _require(
        dataset.shape == shape
        and dataset.dtype.kind in "iu"
        and nbytes <= filtered * dataset.id.get_storage_size(),
        f"{dataset.name} has the shape {dataset.shape} in {dataset.id.get_storage_size()} bytes, "
        f"expected {shape}",
    )
    return dataset[()]


def meta_path(path: Path) -> Path:
    """The meta file that belongs to an HDF5 file."""
    return path.with_name(path.stem + "_meta.json")


def digests_path(path: Path) -> Path:
    """The file beside an HDF5 file that says what it and its meta file held when written."""
    return path.with_name(path.stem + "_digests.json")


def _require_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {what}")


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is truncated or not HDF5 ({in_a_line(error)}); download it again"
        ) from error


def _choose_split(
    split: str | None, groups: Sequence[str], meta: Mapping[str, Any], path: Path
) -> str:
    present = [name for name in groups if name in meta]
    _require(len(present) > 0, f"{path} and its meta file have no split in common")
    if split is None:
        _require(
            len(present) == 1, f"{path} holds several splits; name one of: {', '.join(present)}"
        )
        return present[0]
    _require(split in present, f"split {split!r} is not in {path}; present: {', '.join(present)}")
    return split


class DeepNets1M:
    """A split of an official file: a sequence of architectures, with their stored graphs.

    Attributes:
      path, split: the HDF5 file and the split in it.
      tables: the names that the split's nodes refer to.

    Safe to read from several threads. Copies in other processes (forked, or sent there by pickling)
    open the file again for themselves.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        meta: Mapping[str, Any],
        digests: Sequence[str] | None,
        rules: Rules,
        image_size: int,
        seed: int,
    ):
        """Use `DeepNets1M.open`."""
        self.path = path
        self.split = split
        self.seed = seed
        self._rules = rules
        self._image_size = image_size
        self._nets, self._digests = meta["nets"], digests
        tables = meta["meta"]
        self.tables = Tables(
            _table(tables, "primitives_ext", path), _table(tables, "unique_op_names", path)
        )
        self._primitives = [_table_1_name(name) for name in self.tables.primitives]
        self._file: h5py.File | None = None
        self._file_pid = -1
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        split: str | None = None,
        *,
        image_size: int = 32,
        rules: Rules | None = None,
        seed: int = 0,
    ) -> DeepNets1M:
        """Opens an official file and checks it.

        Args:
          path: the HDF5 file; its meta file has the same name with '_meta.json' for '.hdf5'.
          split: the split in the file; None where it has only one.
          image_size: height in pixels of the images that the networks are for. Above 96, `wide`
            is widened by 2, not 4, as the authors did for ImageNet, and the training rule for
            widths uses the number of parameters for 224x224 images.
          rules: whose widths to use for networks without their own, instead of the split's.
          seed: the widths of training networks, which the file leaves out, depend on it.

        Raises:
          FileNotFoundError: the HDF5 file or its meta file does not exist.
          ValueError: a file is truncated or of another format, the split is not in it, or the two
            files hold different numbers of networks. The message says which, in one sentence.
        """
        path = Path(path)
        _require_file(path, "give the path of an official file such as deepnets1m_eval.hdf5")
        with _open_hdf5(path) as file:
            try:
                present = list(file)
                sizes = {name: len(file[name]) for name in present}
            except _DAMAGED as error:
                raise ValueError(
                    f"{path} is damaged ({in_a_line(error)}); download it again"
                ) from error
        digests = _read_digests(digests_path(path))
        meta = _read_meta(meta_path(path), digests.get(META_DIGEST))
        split = _choose_split(split, present, meta, path)
        graphs, meta = sizes[split], meta[split]
        _require(
            isinstance(meta, dict)
            and isinstance(meta.get("nets"), list)
            and all(isinstance(net, dict) for net in meta["nets"])
            and isinstance(meta.get("meta"), dict)
            and len(digests.get(split, meta["nets"])) == len(meta["nets"]),
            f"{meta_path(path)}: split {split!r} has no 'nets' and 'meta'; download it again",
        )
        _require(
            graphs == len(meta["nets"]),
            f"{path} holds {graphs} graphs of split {split!r} and {meta_path(path).name} "
            f"{len(meta['nets'])} networks; the files do not belong together, download both again",
        )
        if rules is None:
            rules = rules_of(split)
        rules = dataclasses.replace(rules, image_size=image_size)
        if rules.widen > 1 and Task(image_size=image_size).large:
            rules = dataclasses.replace(rules, widen=_IMAGENET_WIDEN)
        return cls(path, split, meta, digests.get(split), rules, image_size, seed)

    def __len__(self) -> int:
        return len(self._nets)

    def __getitem__(self, index: int) -> Architecture:
        """The architecture at an index, at the width that `architecture` gives it."""
        return self.architecture(index)

    def architecture(self, index: int, *, seed: int | None = None) -> Architecture:
        """The architecture at an index.

        Training networks have no width in the file. It is drawn (`sampling.choose_width`) from
        (seed, index), so that another seed, as for each epoch, gives other widths.

        Raises:
          IndexError: the index is out of range.
          ValueError: the entry is not an architecture.
        """
        entry = self.entry(index)
        try:
            arch = Architecture.from_dict(entry)
        except ValueError as error:
            raise ValueError(
                f"{self.path}, split {self.split!r}, network {index}: {error}"
            ) from None
        if "C" not in entry:
            # A generator of its own, not the one that `sample_architecture` starts from.
            rng = seeded(f"deepnets1m/{self.split}", self.seed if seed is None else seed, index)
            arch = set_width(arch, self._rules, rng, num_params=self._num_params(entry))
        return arch.replace(C=arch.C * self._rules.widen)

    def entry(self, index: int) -> Mapping[str, Any]:
        """The meta file's entry at an index.

        Raises:
          IndexError: the index is out of range.
        """
        index = operator.index(index)
        if not 0 <= index < len(self._nets):
            raise IndexError(
                f"index {index} is out of range; split {self.split!r} of {self.path} has networks "
                f"0 to {len(self._nets) - 1}"
            )
        return self._nets[index]

    def num_nodes(self, index: int) -> int:
        """Number of nodes of a stored graph, from the meta file.

        Raises:
          IndexError: the index is out of range.
          ValueError: the meta file does not say.
        """
        nodes = self.entry(index).get("num_nodes")
        _require(
            isinstance(nodes, int),
            f"{self.path}, split {self.split!r}, network {index}: the meta file has no "
            "'num_nodes'; download it again",
        )
        return nodes

    def graph(self, index: int) -> FileGraph:
        """Reads a stored graph.

        Raises:
          IndexError: the index is out of range.
          ValueError: the graph is damaged.
        """
        n = self.num_nodes(index)
        place = f"{self.split}/{operator.index(index)}"
        where = f"{self.path}, split {self.split!r}, graph {index}"
        try:
            with self._lock:
                group = self._open()[place]
                distances, nodes = group["adj"], group["nodes"]
                shapes = distances.shape, nodes.shape
                fit = shapes == ((n, n), (n, 3))
                if fit:
                    distances, nodes = _stored(distances, (n, n)), _stored(nodes, (n, 3))
        except _DAMAGED as error:
            raise ValueError(
                f"{where} cannot be read ({in_a_line(error)}); download the file again"
            ) from error
        _require(
            fit,
            f"{where} has adjacency {shapes[0]} and nodes {shapes[1]}, and the meta file says {n} "
            "nodes; download both files again",
        )
        _require(
            self._digests is None or self._digests[index] == graph_digest(distances, nodes, place),
            f"{where} is not as it was written: its digest differs; get the file again",
        )
        _require(
            n > 0
            and nodes.min() >= 0
            and nodes[:, 0].max() < len(self._primitives)
            and nodes[:, 2].max() < len(self.tables.names),
            f"{where} uses names that the meta file lacks; download both files again",
        )
        primitives = [self._primitives[i] for i in nodes[:, 0]]
        names = [
            _name(self.tables.names[op], primitive, cell)
            for primitive, (_, cell, op) in zip(primitives, nodes.tolist(), strict=True)
        ]
        extended = [self.tables.primitives[i] for i in nodes[:, 0]]
        return FileGraph(primitives, names, nodes[:, 1].astype(np.int32), distances, extended)

    def close(self) -> None:
        """Closes the HDF5 file; reading another graph opens it again."""
        with self._lock:
            if self._file is not None and self._file_pid == os.getpid():
                self._file.close()
            self._file = None

    def _num_params(self, entry: Mapping[str, Any]) -> int | None:
        style = "imagenet" if Task(image_size=self._image_size).large else "cifar10"
        return entry.get("num_params", {}).get(style)

    def _open(self) -> h5py.File:
        """The HDF5 file, opened once in each process: a fork must not share its parent's handle."""
        if self._file is None or self._file_pid != os.getpid():
            self._file = _open_hdf5(self.path)
            self._file_pid = os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def read_architectures(path: str | os.PathLike) -> dict[str, Architecture]:
    """Architectures of a JSON file, name -> `Architecture.to_dict`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file holds something else, or nothing.
    """
    entries = read_json(path, "give architectures by name")
    try:
        found = {name: Architecture.from_dict(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of architectures by name: {error}") from error
    if not found:
        raise ValueError(f"{path} has no architectures")
    return found
