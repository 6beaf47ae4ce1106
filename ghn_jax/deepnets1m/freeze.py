"""Generates the frozen evaluation sets (`ghn_jax.evaluation_sets`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ghn_jax.deepnets1m.architecture import VIT, Architecture
from ghn_jax.deepnets1m.canonical import Form, canonical
from ghn_jax.deepnets1m.evaluation_sets import EVALUATION_SIZES, RESNET50
from ghn_jax.deepnets1m.sampling import RULES, sample_architecture

# The paper's ViT (§ 3): 12 layers of 128 channels.
PREDEFINED = (
    RESNET50,
    Architecture(
        VIT, n_cells=12, C=128, C_mult=1, preproc=False, stem_type=0, glob_avg=True, fc_layers=1
    ),
)


def _different(split: str, seed: int, seen: set[Form]) -> Iterator[Architecture]:
    """Architectures of a split that are not in `seen`, which grows by them."""
    for index in itertools.count():
        arch = sample_architecture(split, seed, index)
        form = canonical(arch)
        if form not in seen:
            seen.add(form)
            yield arch


def generate(seed: int = 0) -> dict[str, list[Architecture | str]]:
    """All evaluation sets (§ 3, Table 1): no network is in them twice, at whatever width.

    Only `wide` repeats others: it holds the first networks of `test`, four times as wide.
    """
    sets: dict[str, list[Architecture | str]] = {}
    seen = {canonical(arch) for arch in PREDEFINED if isinstance(arch, Architecture)}
    for split, size in EVALUATION_SIZES.items():
        if split == "wide":
            widen = RULES["wide"].widen
            sets[split] = [arch.replace(C=arch.C * widen) for arch in sets["test"][:size]]
        else:
            sets[split] = list(itertools.islice(_different(split, seed, seen), size))
    sets["predefined"] = list(PREDEFINED)
    return sets
