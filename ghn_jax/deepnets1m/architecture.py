"""Architectures as plain data (paper § 3 and Appendix A.1).

An `Architecture` holds what the official DeepNets-1M meta files hold for a network, under the
same keys. Nothing here builds a network or a graph: `graph.py`, `network.py` and `engine/` read
it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

# The 15 operations of a cell, in the order of the official generator.
OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "conv_1x1",
    "conv_7x1_1x7",
    "conv_3x3",
    "conv_5x5",
    "conv_7x7",
    "msa",
    "cse",
)

MAX_CELL_NODES = 64  # intermediate nodes in a cell; the official files have up to 10

Edge = tuple[str, int]  # (operation, index of the state it reads)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _integer(value: Any, field: str, low: int, high: int) -> int:
    allowed = f"{low} to {high}"
    _require(
        not isinstance(value, bool) and hasattr(value, "__index__"),
        f"architecture field {field!r} is {value!r}; allowed: an integer, {allowed}",
    )
    number = int(value)
    _require(
        low <= number <= high,
        f"architecture field {field!r} is {number}; allowed: {allowed}",
    )
    return number


def _cell(edges: Any, concat: Any, which: str) -> tuple[tuple[Edge, ...], tuple[int, ...]]:
    """Checks one cell of a genotype and returns it as tuples."""
    field = f"genotype.{which}"
    try:
        flat, sizes = _ungrouped(edges)
        edges = tuple((str(name), source) for name, source in flat)
        concat = tuple(concat)
    except (TypeError, ValueError):
        raise ValueError(
            f"architecture field {field!r} must be a list of [operation, state] pairs, and "
            f"'{field}_concat' a list of states; given {edges!r} and {concat!r}"
        ) from None
    _require(
        set(sizes) <= {2},
        f"architecture field {field!r} has groups of {sizes} edges; allowed: two for each node",
    )
    _require(
        0 < len(edges) <= 2 * MAX_CELL_NODES and len(edges) % 2 == 0,
        f"architecture field {field!r} has {len(edges)} edges; allowed: two for each node, 1 to "
        f"{MAX_CELL_NODES} nodes",
    )
    steps = len(edges) // 2
    checked = []
    for position, (name, source) in enumerate(edges):
        _require(
            name in OPERATIONS,
            f"architecture field {field!r} names the operation {name!r}; allowed: "
            + ", ".join(OPERATIONS),
        )
        # Node i (state i + 2) may only read the two inputs and the nodes before it.
        highest = position // 2 + 1
        checked.append((name, _integer(source, f"{field}[{position}]", 0, highest)))
    _require(len(concat) > 0, f"architecture field '{field}_concat' is empty; name a state or more")
    concat = tuple(_integer(s, f"{field}_concat", 2, steps + 1) for s in concat)
    _require(
        len(set(concat)) == len(concat),
        f"architecture field '{field}_concat' is {list(concat)}; each state may appear once",
    )
    return tuple(checked), concat


def _ungrouped(edges):
    """Edges one after another, and the sizes of the groups that they were in, if in any."""
    groups = list(edges)
    if groups and all(
        isinstance(group, (list, tuple)) and all(isinstance(edge, (list, tuple)) for edge in group)
        for group in groups
    ):
        return [edge for group in groups for edge in group], [len(group) for group in groups]
    return groups, []


@dataclasses.dataclass(frozen=True)
class Genotype:
    """The two cells of a DARTS-style network.

    Attributes:
      normal, reduce: edges `(operation, state)`, two for each intermediate node. States 0 and 1
        are the cell's inputs (the outputs of the cell before last and of the last cell); state
        i + 2 is the sum of node i's two edges.
      normal_concat, reduce_concat: the states whose concatenation is the cell's output.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self):
        for which in ("normal", "reduce"):
            edges, concat = _cell(getattr(self, which), getattr(self, which + "_concat"), which)
            object.__setattr__(self, which, edges)
            object.__setattr__(self, which + "_concat", concat)
        _require(
            len(self.normal_concat) == len(self.reduce_concat),
            f"architecture field 'genotype.normal_concat' has {len(self.normal_concat)} states and "
            f"'genotype.reduce_concat' {len(self.reduce_concat)}; both cells must be as wide",
        )

    @classmethod
    def of(cls, published) -> Genotype:
        """Reads a genotype as papers' code has it.

        Args:
          published: a mapping, or a namedtuple or another object, with the four fields; edges
            may be grouped by node.

        Raises:
          ValueError: a field is missing or out of range; the message names it.
        """
        if isinstance(published, cls):
            return published
        fields = [field.name for field in dataclasses.fields(cls)]
        found = published
        if not isinstance(published, Mapping):
            found = {name: getattr(published, name) for name in fields if hasattr(published, name)}
            _require(
                bool(found),
                f"architecture field 'genotype' is {published!r}; allowed: a mapping or a "
                f"namedtuple with {', '.join(fields)}",
            )
        for name in fields:
            _require(name in found, f"architecture field 'genotype.{name}' is missing")
        return cls(**{name: found[name] for name in fields})

    @functools.cached_property
    def operations(self) -> frozenset[str]:
        """The operations named anywhere in the genotype."""
        return frozenset(name for name, _ in self.normal + self.reduce)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One network of the DeepNets-1M design space (Appendix A.1), as plain data.

    Attributes (the official meta-file keys):
      genotype: the normal and the reduction cell.
      n_cells: number of cells; reduction cells stand at n_cells // 3 and 2 * n_cells // 3.
      C: initial number of channels.
      C_mult: channel multiplier of reduction cells (1: no width expansion, 2).
      ks: kernel size of the stem's first convolution (3, 5 or 7).
      stem_type: 0, one convolution; 1, the ImageNet-style stem of DARTS. Ignored by networks with
        attention, which have a ViT stem.
      stem_pool: whether a max-pool follows the stem of type 0.
      norm: 'bnorm' (any name that starts with 'bn') or None for no batch norm.
      preproc: whether 1x1 convolutions match the channels at each cell's inputs.
      glob_avg: global average pooling before the classifier, else the VGG-style flattening head.
      fc_layers: fully connected layers of the head (0 counts as 1, as in the official files).
      fc_dim: width of the hidden fully connected layers.

    Raises:
      ValueError: a field is out of range; the message names the field and what is allowed.
    """

    genotype: Genotype
    n_cells: int
    C: int = 32
    C_mult: int = 2
    ks: int = 3
    stem_type: int = 0
    stem_pool: bool = False
    norm: str | None = "bnorm"
    preproc: bool = True
    glob_avg: bool = True
    fc_layers: int = 1
    fc_dim: int = 256

    def __post_init__(self):
        object.__setattr__(self, "genotype", Genotype.of(self.genotype))
        for field, low, high in (
            ("n_cells", 1, 1000),
            ("C", 2, 2**16),
            ("C_mult", 1, 2),
            ("ks", 1, 11),
            ("stem_type", 0, 1),
            ("fc_layers", 0, 16),
            ("fc_dim", 0, 2**16),
        ):
            object.__setattr__(self, field, _integer(getattr(self, field), field, low, high))
        _require(self.ks % 2 == 1, f"architecture field 'ks' is {self.ks}; allowed: odd numbers")
        _require(self.C % 2 == 0, f"architecture field 'C' is {self.C}; allowed: even numbers")
        for field in ("stem_pool", "preproc", "glob_avg"):
            value = getattr(self, field)
            _require(
                value in (True, False),
                f"architecture field {field!r} is {value!r}; allowed: true or false",
            )
            object.__setattr__(self, field, bool(value))
        _require(
            self.norm is None or (isinstance(self.norm, str) and self.norm.startswith("bn")),
            f"architecture field 'norm' is {self.norm!r}; allowed: 'bnorm' or None",
        )
        _require(
            self.preproc or (len(self.genotype.normal_concat) == 1 and self.C_mult == 1),
            "architecture field 'preproc' is false; allowed only with C_mult 1 and one state in "
            f"the concat, given C_mult {self.C_mult} and {len(self.genotype.normal_concat)} states",
        )
        _require(
            self.fc_layers < 2 or self.fc_dim > 0,
            f"architecture field 'fc_dim' is {self.fc_dim}; allowed with {self.fc_layers} fully "
            "connected layers: 1 or more",
        )
        _require(
            not self.has_attention or self.C % 8 == 0,
            f"architecture field 'C' is {self.C}; allowed with attention (8 heads): multiples of 8",
        )

    @functools.cached_property
    def has_attention(self) -> bool:
        """Whether any operation is attention; such networks have the ViT stem and no strides."""
        return "msa" in self.genotype.operations

    def is_reduction(self, cell: int) -> bool:
        """Whether the cell at this index is a reduction cell (paper § 2.1)."""
        return cell > 0 and cell in (self.n_cells // 3, 2 * self.n_cells // 3)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Reads an entry of an official meta file; counts such as `num_nodes` are ignored.

        Raises:
          ValueError: a field is missing or out of range; the message names it.
        """
        _require(
            isinstance(data, Mapping),
            f"an architecture is given as {type(data).__name__}; allowed: a mapping",
        )
        for field in ("genotype", "n_cells"):
            _require(field in data, f"architecture field {field!r} is missing")
        others = {f.name for f in dataclasses.fields(cls)} - {"genotype"}
        return cls(
            genotype=Genotype.of(data["genotype"]),
            **{k: v for k, v in data.items() if k in others},
        )

    def to_dict(self) -> dict[str, Any]:
        """The architecture as JSON-ready data; `from_dict` reads it back."""
        data = dataclasses.asdict(self)
        genotype = data["genotype"]
        for cell in ("normal", "reduce"):
            genotype[cell] = [list(edge) for edge in genotype[cell]]
            genotype[cell + "_concat"] = list(genotype[cell + "_concat"])
        return data

    def replace(self, **changes: Any) -> Architecture:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _genotype(normal: str, reduce: str, concat: range) -> Genotype:
    def edges(text: str) -> tuple[Edge, ...]:
        return tuple((op, int(state)) for op, state in (e.split(":") for e in text.split()))

    return Genotype(edges(normal), tuple(concat), edges(reduce), tuple(concat))


# The named cells of the paper: DARTS (Liu et al., 2019), PDARTS (Chen et al., 2019), and the ViT.
DARTS = _genotype(
    "sep_conv_3x3:0 sep_conv_3x3:1 sep_conv_3x3:0 sep_conv_3x3:1 "
    "sep_conv_3x3:1 skip_connect:0 skip_connect:0 dil_conv_3x3:2",
    "max_pool_3x3:0 max_pool_3x3:1 skip_connect:2 max_pool_3x3:1 "
    "max_pool_3x3:0 skip_connect:2 skip_connect:2 max_pool_3x3:1",
    range(2, 6),
)
PDARTS = _genotype(
    "skip_connect:0 dil_conv_3x3:1 skip_connect:0 sep_conv_3x3:1 "
    "sep_conv_3x3:1 sep_conv_3x3:3 sep_conv_3x3:0 dil_conv_5x5:4",
    "avg_pool_3x3:0 sep_conv_5x5:1 sep_conv_3x3:0 dil_conv_5x5:2 "
    "max_pool_3x3:0 dil_conv_3x3:1 dil_conv_3x3:1 dil_conv_5x5:3",
    range(2, 6),
)
VIT = _genotype("none:0 msa:1", "none:0 avg_pool_3x3:1", range(2, 3))
