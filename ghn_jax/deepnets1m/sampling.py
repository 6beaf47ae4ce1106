"""Random architectures by the generation rules of DeepNets-1M (paper § 3 and Appendix A).

`sample_architecture(split, seed, index)` is a pure function: the same three values always give the
same architecture, in any process. The rules are data (`RULES`); a smaller design space is a changed
copy of them:

    rules = dataclasses.replace(RULES["train"], n_cells=(4, 6), nodes=(1, 2), widths=(16, 32))
    arch = sample_architecture("train", seed=0, index=7, rules=rules)

Training has no fixed width: it is drawn small enough for the network's size (`choose_width`).
"""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ghn_jax.deepnets1m.architecture import OPERATIONS, Architecture, Edge, Genotype
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.evaluation_sets import is_held_out
from ghn_jax.deepnets1m.wiring import is_connected

# The generator judges the size of every network at this width, hidden layer and number of classes.
REFERENCE_WIDTH = 32
REFERENCE_FC_DIM = 256
REFERENCE_CLASSES = 10
# Parameters of a ViT's stem for 224x224 images at that width: 16x16 patches, 14x14 positions. Below
# an average over positions nothing else grows with the images.
_LARGE_STEM = REFERENCE_WIDTH * (3 * 16**2 + 14**2)

# Operations without parameters, `none` first; half of the networks reduce with these only.
_UNLEARNED = OPERATIONS[: OPERATIONS.index("skip_connect") + 1]
_LARGE_CONVOLUTIONS = ("conv_5x5", "conv_7x7")

# Seed words are 32 bits: larger numbers would spill into the next word and might collide.
_MAX_SEED = 2**32 - 1
# Half of the candidates or more pass the official rules; only hopeless rules get here.
_MAX_CANDIDATES = 10_000


@dataclasses.dataclass(frozen=True)
class Rules:
    """How the architectures of a split are generated.

    Attributes:
      n_cells: fewest and most cells n (Table 1).
      deep_above: range of the threshold t, drawn for each network; networks with n > t have fewer
        nodes and always global average pooling.
      nodes: fewest and most intermediate nodes in a cell if n <= t.
      deep_nodes: most intermediate nodes in a cell if n > t.
      norm: 'mixed', batch norm except in half of the networks that are shallow (n at most one above
        the fewest cells) with at most `deep_nodes` nodes; 'always'; or 'never'.
      preproc_share: share of convolutional networks with 1x1 convolutions at the inputs of their
        cells, where these may be left out. For networks with attention it is 1/5 in every split.
      max_params: most parameters at C = 32, for 32x32 and for 224x224 images.
      widths: numbers of channels C to choose from, ascending.
      min_params: evaluation splits: C is the first of `widths` with this many parameters on
        CIFAR-10. None for the training rule, `choose_width`.
      fc_dims: widths of the hidden fully connected layer to choose from, for the training rule.
        Without it the width is 256.
      image_size: height of the training images in pixels: the training rule looks at the number of
        parameters for this size.
      widen: C is multiplied by this after it has been chosen.
      stream: name of the split whose random numbers are used; None for the split's own. Splits with
        one stream and equal rules have equal genotypes.

    Raises:
      ValueError: a field is out of range; the message names the field and what is allowed.
    """

    n_cells: tuple[int, int] = (4, 18)
    deep_above: tuple[int, int] = (7, 10)
    nodes: tuple[int, int] = (1, 4)
    deep_nodes: int = 2
    norm: str = "mixed"
    preproc_share: float = 1.0
    max_params: int = 10**7
    widths: tuple[int, ...] = tuple(range(32, 129, 16))
    min_params: int | None = None
    fc_dims: tuple[int, ...] = tuple(range(64, 513, 64))
    image_size: int = 32
    widen: int = 1
    stream: str | None = None

    def __post_init__(self):
        for field in ("n_cells", "deep_above", "nodes"):
            value = _numbers(getattr(self, field))
            _require(
                len(value) == 2 and 1 <= value[0] <= value[1],
                f"rule {field!r} is {getattr(self, field)!r}; allowed: (low, high) with "
                "1 <= low <= high",
            )
            object.__setattr__(self, field, value)
        for field, step in (("widths", 8), ("fc_dims", 1)):
            value = _numbers(getattr(self, field))
            _require(
                len(value) > 0
                and all(v > 0 and v % step == 0 for v in value)
                and list(value) == sorted(set(value)),
                f"rule {field!r} is {getattr(self, field)!r}; allowed: ascending "
                + ("multiples of 8 (attention has 8 heads)" if step == 8 else "positive numbers"),
            )
            object.__setattr__(self, field, value)
        _require(
            self.nodes[0] <= self.deep_nodes,
            f"rule 'deep_nodes' is {self.deep_nodes}; allowed: at least the fewest nodes, "
            f"{self.nodes[0]}",
        )
        _require(
            self.norm in ("mixed", "always", "never"),
            f"rule 'norm' is {self.norm!r}; allowed: 'mixed', 'always', 'never'",
        )
        _require(
            0 <= self.preproc_share <= 1,
            f"rule 'preproc_share' is {self.preproc_share}; allowed: 0 to 1",
        )
        _require(self.widen >= 1, f"rule 'widen' is {self.widen}; allowed: 1 or more")


def _numbers(value: Any) -> tuple[int, ...]:
    """The whole numbers in a sequence; empty, hence out of every range, if it is none."""
    try:
        return tuple(operator.index(v) for v in value)
    except TypeError:
        return ()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# The width of evaluation networks. The paper (§ 3) only says that it is fixed, and the released
# generator leaves it out. What is published pins it down: each of the authors' 1,400 evaluation
# networks has at least 2.5M parameters on CIFAR-10 (Table 1; in their results files `test` has
# 2.5005M at least, 2.96M in the median, 4.5M at the ninth decile), every range of channels in
# Table 1 starts at 32 and ends at a multiple of 16, and each `wide` network has 14.7 to 15.9 times
# the parameters of the `test` network with its index. So C is the first of 32, 48, ... that reaches
# 2.5M; networks sampled so have 2.96M in the median and 4.3M at the ninth decile. Where to stop is
# our choice: at 336, the largest in Table 1, for every split; one network in a hundred stays below
# 2.5M there. Table 1 has 128 as the largest of `val` and `test`, but 1216 = 4 * 304 for `wide`,
# which is `test` four times as wide, and a fifth of the networks do not reach 2.5M with 128.
_EVALUATION = Rules(widths=tuple(range(32, 337, 16)), min_params=2_500_000)

RULES: dict[str, Rules] = {
    "train": Rules(),
    "val": _EVALUATION,
    "test": _EVALUATION,
    # Four times as wide on CIFAR-10. On ImageNet the authors' files widen by two: replace `widen`.
    "wide": dataclasses.replace(_EVALUATION, widen=4, stream="test"),
    "deep": dataclasses.replace(
        _EVALUATION, n_cells=(10, 36), deep_above=(18, 18), max_params=10**8
    ),
    "dense": dataclasses.replace(_EVALUATION, nodes=(2, 10), deep_nodes=6, max_params=10**8),
    "bnfree": dataclasses.replace(_EVALUATION, norm="never"),
    # For the architecture search (C.2.4). The paper gives it no widths; these are `test`'s.
    "search": dataclasses.replace(
        _EVALUATION,
        n_cells=(6, 20),
        deep_above=(10, 10),
        nodes=(1, 6),
        deep_nodes=3,
        norm="always",
        preproc_share=0.8,
    ),
}

SPLITS = tuple(RULES)


# --- Random draws ---------------------------------------------------------------------------------
# All of them use `Generator.random`: it is fast for single numbers, and its stream is the one that
# NumPy is least likely to change between versions.


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, uniformly."""
    return options[int(rng.random() * len(options))]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number from low to high, both included, uniformly."""
    return low + int(rng.random() * (high - low + 1))


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _sample_cell(
    rng: np.random.Generator, nodes: int, operations: Sequence[str]
) -> tuple[Edge, ...]:
    """The edges of a cell: each node reads two different earlier states.

    The authors draw a random score for every (edge, operation) and let DARTS's parser take the best
    operation of the two best edges of each node. Scores are exchangeable, so that is a uniform
    choice of two states, in random order, and of an operation for each.
    """
    edges = []
    for node in range(nodes):
        first = _between(rng, 0, node + 1)
        second = _between(rng, 0, node)
        second += second >= first
        edges += [(_pick(rng, operations), first), (_pick(rng, operations), second)]
    return tuple(edges)


def _sample_genotype(rng: np.random.Generator, nodes: int) -> Genotype:
    """Both cells (Appendix A.1); `none` needs two nodes, as it would cut off a single one."""
    skip = 0 if nodes > 1 else 1
    only_pool = _chance(rng, 0.5)
    drop_concat = nodes > 1 and _chance(rng, 0.5)
    normal = _sample_cell(rng, nodes, OPERATIONS[skip:])
    reduce = _sample_cell(rng, nodes, (_UNLEARNED if only_pool else OPERATIONS)[skip:])
    concat = tuple(range(2, nodes + 2))
    if drop_concat:
        # The last node always stays: nothing else can read it.
        concat = (*(s for s in concat[:-1] if _chance(rng, 0.5)), concat[-1])
    return Genotype(normal, concat, reduce, concat)


def rejection(genotype: Genotype) -> str | None:
    """Why the generator rejects a pair of cells, or None if it does not.

    Networks with several squeeze-excites are hard to train, several large dense convolutions need
    too much memory, and without anything to learn there is nothing to predict.
    """
    operations = genotype.operations
    convolution = any("conv" in name for name in operations)
    if "cse" in operations and not convolution:
        return "squeeze-excite without a convolution"
    if not convolution and not operations & {"msa", "cse"}:
        return "no convolution, attention or squeeze-excite"
    for cell in (genotype.normal, genotype.reduce):
        names = [name for name, _ in cell]
        if names.count("cse") > 1:
            return "more than one squeeze-excite in a cell"
        if sum(name in _LARGE_CONVOLUTIONS for name in names) > 1:
            return "more than one dense 5x5 or 7x7 convolution in a cell"
    return None


def _sample_candidate(rng: np.random.Generator, rules: Rules) -> Architecture | None:
    """One architecture at the reference width, or None if its cells are rejected."""
    n_cells = _between(rng, *rules.n_cells)
    deep = n_cells > _between(rng, *rules.deep_above)
    nodes = _between(rng, rules.nodes[0], rules.deep_nodes if deep else rules.nodes[1])
    genotype = _sample_genotype(rng, nodes)
    if rejection(genotype) is not None:
        return None
    attention = "msa" in genotype.operations
    C_mult = _pick(rng, (1, 2))
    # Without 1x1 convolutions at its inputs a cell cannot change the number of channels.
    preproc = nodes > 1 or C_mult > 1 or _chance(rng, 0.2 if attention else rules.preproc_share)
    glob_avg = attention or deep or _chance(rng, 0.9)
    shallow = n_cells <= rules.n_cells[0] + 1 and nodes <= rules.deep_nodes
    if rules.norm == "mixed":
        norm = None if shallow and _chance(rng, 0.5) else "bnorm"
    else:
        norm = "bnorm" if rules.norm == "always" else None
    stem_type = _pick(rng, (0, 1))
    return Architecture(
        genotype=genotype,
        n_cells=n_cells,
        C=REFERENCE_WIDTH,
        C_mult=C_mult,
        ks=_pick(rng, (3, 5, 7)),
        stem_type=stem_type,
        stem_pool=stem_type == 0 and _chance(rng, 0.5),
        norm=norm,
        preproc=preproc,
        glob_avg=glob_avg,
        fc_layers=_pick(rng, (1, 2)),
        fc_dim=REFERENCE_FC_DIM,
    )


def _count_at(arch: Architecture, image_size: int, C: int, fc_dim: int) -> int:
    if (arch.C, arch.fc_dim) != (C, fc_dim):
        arch = arch.replace(C=C, fc_dim=fc_dim)
    return count_parameters(arch, num_classes=REFERENCE_CLASSES, image_size=image_size)


def reference_size(arch: Architecture, image_size: int) -> int:
    """Number of parameters at the width, hidden layer and classes that the generator looks at."""
    return _count_at(arch, image_size, REFERENCE_WIDTH, REFERENCE_FC_DIM)


def is_admissible(arch: Architecture, max_params: int) -> bool:
    """Whether a network is connected and has at most max_params parameters at C = 32.

    The number of parameters counts for both styles of input, 32x32 and 224x224 pixels.
    """
    if not is_connected(arch):
        return False
    small = reference_size(arch, 32)
    if arch.glob_avg and small + _LARGE_STEM <= max_params:
        return True
    return max(small, reference_size(arch, 224)) <= max_params


# --- Widths ---------------------------------------------------------------------------------------


def choose_width(
    arch: Architecture,
    rng: np.random.Generator,
    *,
    widths: Sequence[int] = RULES["train"].widths,
    fc_dims: Sequence[int] = RULES["train"].fc_dims,
    image_size: int = 32,
    num_params: int | None = None,
) -> Architecture:
    """Draws C and fc_dim of a training network: the larger it is, the fewer channels (§ 3).

    The rule is the authors' code's, which keeps training networks to around 3M parameters. Its
    sizes: p, millions of parameters at C = 32 with fc_dim 256 and 10 classes.

    Args:
      arch: the architecture; its C and fc_dim do not matter.
      rng: gives two or three numbers.
      widths, fc_dims: what to choose from, ascending. The authors' code trains on CIFAR-10 with 32,
        48, ..., 128 channels; the paper's Table 1 says 16-128.
      image_size: height of the training images in pixels.
      num_params: p * 10**6 where it is known, else it is counted.

    Returns:
      The architecture with C and fc_dim set.
    """
    if num_params is None:
        num_params = reference_size(arch, image_size)
    fc_dim = _pick(rng, fc_dims[:4])
    if (
        num_params > 800_000
        or not arch.glob_avg
        or arch.genotype.operations.intersection(_LARGE_CONVOLUTIONS)
        or arch.n_cells > 12
    ):
        C = widths[0]
    elif num_params > 400_000 or arch.n_cells > 10:
        C = _pick(rng, widths[:2])
    elif num_params > 200_000 or arch.n_cells > 8:
        C = _pick(rng, widths[:3])
    else:
        C = _pick(rng, widths)
        if C <= 64:
            fc_dim = _pick(rng, fc_dims)
    return arch.replace(C=C, fc_dim=fc_dim)


def smallest_width(arch: Architecture, widths: Sequence[int], min_params: int) -> Architecture:
    """The architecture at the first width with min_params parameters on CIFAR-10, else at the last.

    This is the width of the evaluation splits' networks (see the comment at `RULES`).
    """
    low, high = 0, len(widths) - 1
    while low < high:  # the number of parameters grows with the width
        middle = (low + high) // 2
        if _count_at(arch, 32, C=widths[middle], fc_dim=arch.fc_dim) >= min_params:
            high = middle
        else:
            low = middle + 1
    return arch.replace(C=widths[low])


def set_width(
    arch: Architecture,
    rules: Rules,
    rng: np.random.Generator,
    *,
    num_params: int | None = None,
) -> Architecture:
    """Sets the width that the rules give an architecture, before it is widened.

    Args:
      arch: the architecture at any width.
      rules: of its split.
      rng: used by the training rule only.
      num_params: of the architecture at C = 32 for `rules.image_size`, where it is known.
    """
    if rules.min_params is not None:
        return smallest_width(arch, rules.widths, rules.min_params)
    return choose_width(
        arch,
        rng,
        widths=rules.widths,
        fc_dims=rules.fc_dims,
        image_size=rules.image_size,
        num_params=num_params,
    )


def seeded(stream: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one architecture, equal in every process.

    Raises:
      ValueError: seed or index is not a whole number from 0 to 2**32 - 1.
    """
    for name, value in (("seed", seed), ("index", index)):
        _require(
            hasattr(value, "__index__")
            and not isinstance(value, bool)
            and 0 <= int(value) <= _MAX_SEED,
            f"{name} is {value!r}; allowed: whole numbers from 0 to {_MAX_SEED}",
        )
    return np.random.default_rng([zlib.crc32(stream.encode()), int(seed), int(index)])


def rules_of(split: str) -> Rules:
    """The rules of a split.

    Raises:
      ValueError: no architectures are generated for this split; the message names the splits.
    """
    _require(
        split in RULES,
        f"split {split!r} has no generated architectures; allowed: {', '.join(SPLITS)}"
        + (" ('predefined' holds named networks only)" if split == "predefined" else ""),
    )
    return RULES[split]


def sample_architecture(
    split: str, seed: int, index: int, *, rules: Rules | None = None
) -> Architecture:
    """Generates one architecture of a split (§ 3, Appendix A).

    Args:
      split: 'train', 'val', 'test', 'wide', 'deep', 'dense', 'bnfree' or 'search'. `wide` holds
        the networks of `test` with the same seed and index, four times as wide. `train` passes over
        networks that are in the frozen evaluation sets (`evaluation_sets`).
      seed: names a set of architectures, 0 to 2**32 - 1.
      index: position in that set, 0 to 2**32 - 1.
      rules: other rules than `RULES[split]`.

    Returns:
      A connected architecture with C and fc_dim set; the same one for the same arguments.

    Raises:
      ValueError: an argument is out of range, or (after 10,000 rejected candidates) the rules leave
        no architecture.
    """
    split_rules = rules_of(split)
    rules = split_rules if rules is None else rules
    rng = seeded(rules.stream or split, seed, index)
    for _ in range(_MAX_CANDIDATES):
        arch = _sample_candidate(rng, rules)
        if (
            arch is not None
            and is_admissible(arch, rules.max_params)
            and not (split == "train" and is_held_out(arch))
        ):
            arch = set_width(arch, rules, rng)
            return arch if rules.widen == 1 else arch.replace(C=arch.C * rules.widen)
    raise ValueError(
        f"none of {_MAX_CANDIDATES} candidates satisfies the rules of split {split!r}; allow more "
        f"than max_params={rules.max_params} or other n_cells and nodes: {rules}"
    )
