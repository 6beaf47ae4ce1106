"""Buckets: the exact shapes that one compiled program is made for.

Architectures of one bucket share every tensor shape, so nothing is padded in channels. A bucket has
a few *planes*, the (size, channels) that its states can have, and a list of *kinds* of
instructions, each from one plane to another. Everything else about an architecture is data.
"""

from __future__ import annotations

import dataclasses
import functools

from ghn_jax.wiring import Wiring


@dataclasses.dataclass(frozen=True, order=True)
class Kind:
    """A kind of instruction: what it computes, from which plane to which.

    Attributes:
      name: a key of `branches.BRANCHES`.
      source, target: indices of planes; -1 for the images, or for the head's bins.
    """

    name: str
    source: int
    target: int


# Operations of a cell as instructions. Separable convolutions are two instructions of one kind.
UNITS = {
    "max_pool_3x3": "max_pool",
    "avg_pool_3x3": "avg_pool",
    "skip_connect": "identity",
    "subsample": "identity",
    "sep_conv_3x3": "depthwise_3",
    "sep_conv_5x5": "depthwise_5",
    "dil_conv_3x3": "dilated_3",
    "dil_conv_5x5": "dilated_5",
    "conv_1x1": "conv_1",
    "conv_3x3": "conv_3",
    "conv_5x5": "conv_5",
    "conv_7x7": "conv_7",
    "conv_7x1_1x7": "conv_7x1",
    "msa": "attention",
    "cse": "excite",
    "preprocess": "mix",
    "factorized_reduce": "reduce",
    "stem_pool": "max_pool",
    "stem_reduce": "conv_3",
}
_CELL = sorted({UNITS[op] for op in UNITS if not op.startswith("stem")} - {"mix", "reduce"})
_STEM_KERNELS = (3, 5, 7)
MAX_HIDDEN = 512  # hidden fully connected layers are padded to this width
UNIT = 8  # numbers: states start and end at multiples of this, for each image


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """The shapes of a group of architectures.

    Attributes:
      channels, multiplier: C and C_mult of the architectures.
      image_size: height and width of the images, in pixels.
      stem: 'full', the first cells run at the stem's resolution; 'half', the stem ends in a
        stride (max-pool or the ImageNet-style stem); 'vit', attention: no strides at all.
    """

    channels: int
    multiplier: int
    image_size: int
    stem: str

    @classmethod
    def of(cls, wiring: Wiring) -> Bucket:
        """The bucket of an architecture.

        Raises:
          ValueError: the executor cannot run it (fewer than three cells, more than two fully
            connected layers, more than 512 hidden units, a stem kernel other than 3, 5 or 7, a
            width that is no multiple of 8).
        """
        arch = wiring.arch
        if arch.C % UNIT:
            raise ValueError(
                f"the executor runs widths that are multiples of {UNIT}, given C={arch.C}; use "
                "build_network for others"
            )
        if arch.n_cells < 3:
            raise ValueError(
                f"the executor runs architectures of 3 cells or more, given {arch.n_cells}; use "
                "build_network for smaller ones"
            )
        if len(wiring.head.dims) > 3:
            raise ValueError(
                f"the executor runs 1 or 2 fully connected layers, given {arch.fc_layers}; use "
                "build_network for more"
            )
        if len(wiring.head.dims) == 3 and wiring.head.dims[1] > MAX_HIDDEN:
            raise ValueError(
                f"the executor runs {MAX_HIDDEN} hidden units or less, given "
                f"fc_dim={arch.fc_dim}; use build_network for more"
            )
        if arch.has_attention:
            stem = "vit"
        else:
            if arch.ks not in _STEM_KERNELS:
                raise ValueError(
                    f"the executor runs stem kernels {_STEM_KERNELS}, given ks={arch.ks}; use "
                    "build_network for others"
                )
            stem = "half" if arch.stem_type == 1 or arch.stem_pool else "full"
        return cls(arch.C, arch.C_mult, wiring.image_size, stem)

    @functools.cached_property
    def _sizes(self) -> tuple[tuple[int, int], ...]:
        """(size, channels) by role: stem, then for each stage its own and the one between."""
        large = self.image_size > 96
        c = [self.channels * self.multiplier**i for i in range(3)]
        if self.stem == "vit":
            size = self.image_size // 16 if large else (self.image_size + 2 - 3) // 3 + 1
            return tuple((size, n) for n in c)
        size = -(-self.image_size // (4 if large else 1))
        first = -(-size // 2) if self.stem == "half" else size
        second = -(-first // 2)
        third = -(-second // 2)
        return (size, c[0]), (first, c[0]), (first, c[1]), (second, c[1]), (second, c[2]), (
            third, c[2],
        )  # fmt: skip

    @functools.cached_property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """The distinct (size, channels) of the bucket's states, in order of first use."""
        return tuple(dict.fromkeys(self._sizes))

    def plane(self, size: int, channels: int) -> int:
        """Index of a plane."""
        return self.planes.index((size, channels))

    def units(self, plane: int) -> int:
        """Length of a plane's states in the arenas."""
        size, channels = self.planes[plane]
        return size * size * channels // UNIT

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind of instruction that an architecture of the bucket can need."""
        p = [self.plane(*s) for s in self._sizes]
        kinds: dict[Kind, None] = {}

        def add(names, source, target):
            kinds.update(dict.fromkeys(Kind(name, source, target) for name in names))

        if self.stem == "vit":
            add(["stem_vit"], -1, p[0])
            for i in range(3):
                add(_CELL, p[i], p[i])
                for j in range(i, 3):
                    add(["mix"], p[i], p[j])
            add(["flatten", "average"], p[2], -1)
            return tuple(kinds)
        stem, s0, r0, s1, r1, s2 = p
        add([f"stem_{k}" for k in _STEM_KERNELS], -1, stem)
        if self.stem == "half":
            add([f"stem_double_{k}" for k in _STEM_KERNELS], -1, stem)
            add(["conv_3", "max_pool", "reduce", "identity"], stem, s0)
        cell = [name for name in _CELL if name != "attention"]
        for stage, between, after in ((s0, r0, s1), (s1, r1, s2), (s2, None, None)):
            add(cell, stage, stage)
            add(["mix"], stage, stage)
            if between is not None:
                add(["mix"], stage, between)
                add(["reduce"], stage, after)
                add([*cell, "reduce"], between, after)
        add(["reduce"], s0, r1)  # two reduction cells in a row
        add(["flatten", "average"], s2, -1)
        return tuple(kinds)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a program has room for (static).

    Attributes:
      values: length of the arena of states, in units of `UNIT` numbers for each image.
      gradients: length of the arena of their cotangents.
      instructions: rows of the instruction table.
      parts: states that one concatenation can join.
    """

    values: int
    gradients: int
    instructions: int
    parts: int
