"""The generation rules (paper § 3, Appendix A): pure, and as the paper and its code state them."""

import collections
import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from ghn_jax.deepnets1m import sampling
from ghn_jax.deepnets1m.architecture import OPERATIONS, Architecture, Genotype
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.sampling import RULES, SPLITS, Rules, choose_width, sample_architecture
from ghn_jax.deepnets1m.wiring import wire

TRIPLES = (("train", 0, 0), ("wide", 3, 17), ("dense", 2**32 - 1, 5))

# Changes only when the same seeds no longer give the same architectures: a new major version.
GOLDEN = "3a03f2b8912aa0dcf91ca8428192b8173401f9f50b295de4be1cdbe1df8cccb4"

CELL = (("conv_3x3", 0), ("max_pool_3x3", 1))


def fingerprint() -> str:
    text = json.dumps([sample_architecture(*t).to_dict() for t in TRIPLES], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def network(edges=CELL, reduce=None, **changes) -> Architecture:
    """A network whose two cells have these edges and whose last node is the output."""
    concat = (len(edges) // 2 + 1,)
    genotype = Genotype(edges, concat, reduce or edges, concat)
    return Architecture(genotype, **{"n_cells": 4, **changes})


@pytest.fixture(scope="module")
def train() -> list[Architecture]:
    return [sample_architecture("train", 0, i) for i in range(300)]


# --- The same triple, the same architecture -------------------------------------------------------


def test_golden():
    assert fingerprint() == GOLDEN, (
        "the same seeds give other architectures than before; if that is meant (or NumPy changed "
        "its random numbers), say so in the changelog and update GOLDEN"
    )


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_same_in_every_process(hash_seed):
    code = (
        "import hashlib, json; from ghn_jax.sampling import sample_architecture\n"
        f"text = json.dumps([sample_architecture(*t).to_dict() for t in {TRIPLES}], sort_keys=True)"
        "\nprint(hashlib.sha256(text.encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == fingerprint()


def test_order_of_sampling_does_not_matter():
    forward = [sample_architecture("val", 1, i) for i in range(6)]
    backward = [sample_architecture("val", 1, i) for i in reversed(range(6))]
    assert forward == backward[::-1]


def test_split_seed_and_index_all_matter():
    triples = [(s, seed, i) for s in ("train", "val", "test") for seed in (0, 1) for i in (0, 1)]
    genotypes = [sample_architecture(*t).genotype for t in triples]
    assert len(set(genotypes)) == len(triples)


def test_numpy_integers_are_integers():
    given = sample_architecture("train", np.int64(4), np.uint32(9))
    assert given == sample_architecture("train", 4, 9)


def test_rejected_candidates_use_up_the_same_stream():
    """An index whose first candidate is rejected gives the second of its own numbers."""
    expected = []
    for i in range(20):
        rng = sampling.seeded("train", 0, i)
        candidates = (sampling._sample_candidate(rng, RULES["train"]) for _ in range(100))
        arch = next(a for a in candidates if a is not None and sampling.is_admissible(a, 10**7))
        expected.append(choose_width(arch, rng))
    assert [sample_architecture("train", 0, i) for i in range(20)] == expected


# --- What training architectures look like --------------------------------------------------------


def test_cells_and_nodes(train):
    cells = collections.Counter(a.n_cells for a in train)
    assert set(cells) == set(range(4, 19))
    for arch in train:
        nodes = len(arch.genotype.normal) // 2
        assert len(arch.genotype.reduce) == len(arch.genotype.normal)
        # The threshold t is 7 to 10.
        assert 1 <= nodes <= (2 if arch.n_cells > 10 else 4)
    few = [len(a.genotype.normal) // 2 for a in train if a.n_cells <= 7]
    assert set(few) == {1, 2, 3, 4}


def test_all_operations_are_as_likely_as_the_rules_make_them():
    """Before anything is rejected, the normal cell's operations are uniform."""
    rng = np.random.default_rng(0)
    counts = collections.Counter(
        name for _ in range(2000) for name, _ in sampling._sample_cell(rng, 3, OPERATIONS)
    )
    assert set(counts) == set(OPERATIONS)
    expected = 12_000 / 15
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values()), counts


def test_nodes_read_two_different_states():
    """Every ordered pair of earlier states is as likely, as by DARTS's parser of random scores."""
    rng = np.random.default_rng(0)
    pairs = collections.Counter()
    for _ in range(3000):
        edges = sampling._sample_cell(rng, 2, OPERATIONS)
        assert {edges[0][1], edges[1][1]} == {0, 1}
        pairs[edges[2][1], edges[3][1]] += 1
    assert set(pairs) == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert all(abs(n - 500) < 5 * 500**0.5 for n in pairs.values()), pairs


def test_every_operation_occurs(train):
    assert frozenset().union(*(a.genotype.operations for a in train)) == set(OPERATIONS)


def test_no_forbidden_cells(train):
    for arch in train:
        operations = arch.genotype.operations
        assert any("conv" in name or name == "msa" for name in operations)
        assert "cse" not in operations or any("conv" in name for name in operations)
        for cell in (arch.genotype.normal, arch.genotype.reduce):
            names = [name for name, _ in cell]
            assert names.count("cse") <= 1
            assert sum(name in ("conv_5x5", "conv_7x7") for name in names) <= 1
        if len(arch.genotype.normal) == 2:
            assert "none" not in operations


def test_half_of_the_networks_reduce_without_parameters(train):
    unlearned = {"none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"}
    share = np.mean([{n for n, _ in a.genotype.reduce} <= unlearned for a in train])
    assert 0.4 < share < 0.65  # 1/2, a few more by chance, fewer rejected


def test_concat(train):
    for arch in train:
        last = len(arch.genotype.normal) // 2 + 1
        assert arch.genotype.normal_concat == arch.genotype.reduce_concat
        assert arch.genotype.normal_concat[-1] == last
    several = [a for a in train if len(a.genotype.normal) == 4]
    share = np.mean([len(a.genotype.normal_concat) == 2 for a in several])
    assert 0.65 < share < 0.85  # dropped inputs for one half, of two nodes' first in half of them


def test_share_without_batch_norm(train):
    """3.5% in Table 1, and only shallow networks of few nodes."""
    without = [a for a in train if a.norm is None]
    assert 0.01 < len(without) / len(train) < 0.08
    assert all(a.n_cells <= 5 and len(a.genotype.normal) <= 4 for a in without)


def test_stems_heads_and_preprocessing(train):
    assert {a.ks for a in train} == {3, 5, 7}
    for field in ("C_mult", "stem_type", "fc_layers"):
        values = collections.Counter(getattr(a, field) for a in train)
        assert len(values) == 2 and min(values.values()) > 110, (field, values)
    simple = [a for a in train if a.stem_type == 0]
    assert 0.35 < np.mean([a.stem_pool for a in simple]) < 0.65
    assert not any(a.stem_pool for a in train if a.stem_type == 1)
    flat = [a for a in train if not a.glob_avg]
    assert flat and all(a.n_cells <= 10 and not a.has_attention for a in flat)
    bare = [a for a in train if not a.preproc]
    assert bare and all(a.has_attention and a.C_mult == 1 for a in bare)


def test_global_pooling_in_nine_of_ten():
    rules = dataclasses.replace(RULES["train"], n_cells=(4, 7))
    archs = [sample_architecture("train", 0, i, rules=rules) for i in range(250)]
    share = np.mean([a.glob_avg for a in archs if not a.has_attention])
    assert 0.82 < share < 0.97


def test_networks_are_connected(train):
    for arch in train:
        wire(arch)  # raises if not


# --- Rejections -----------------------------------------------------------------------------------

REJECTED = {
    "squeeze-excite without a convolution": [
        (("cse", 0), ("msa", 1)),
        (("cse", 0), ("skip_connect", 1)),
    ],
    "no convolution, attention or squeeze-excite": [(("skip_connect", 0), ("max_pool_3x3", 1))],
    "more than one squeeze-excite in a cell": [
        (("cse", 0), ("cse", 1), ("conv_1x1", 0), ("sep_conv_3x3", 2))
    ],
    "more than one dense 5x5 or 7x7 convolution in a cell": [
        (("conv_5x5", 0), ("conv_7x7", 1)),
        (("conv_5x5", 0), ("conv_5x5", 1)),
        (("conv_7x7", 0), ("conv_7x7", 1)),
    ],
}


@pytest.mark.parametrize(
    ("reason", "edges"), [(r, e) for r, several in REJECTED.items() for e in several]
)
def test_rejected_cells(reason, edges):
    assert sampling.rejection(network(edges).genotype) == reason
    if "more than one" in reason:  # either cell counts
        concat = network(edges).genotype.normal_concat
        plain = (("conv_1x1", 0), ("msa", 1)) * (len(edges) // 2)
        assert sampling.rejection(Genotype(plain, concat, edges, concat)) == reason


@pytest.mark.parametrize(
    "edges",
    [
        (("msa", 0), ("skip_connect", 1)),
        (("cse", 0), ("dil_conv_3x3", 1)),
        (("sep_conv_5x5", 0), ("conv_5x5", 1)),
        (("conv_7x1_1x7", 0), ("conv_7x7", 1)),
    ],
)
def test_cells_that_look_like_rejected_ones(edges):
    assert sampling.rejection(network(edges).genotype) is None


def test_one_of_each_in_both_cells_is_allowed():
    assert sampling.rejection(network((("cse", 0), ("conv_5x5", 1))).genotype) is None


def test_disconnected_networks_are_rejected():
    edges = (("conv_3x3", 0), ("conv_3x3", 1), ("none", 0), ("none", 1))
    assert not sampling.is_admissible(network(edges), 10**7)
    assert sampling.is_admissible(network((*edges[:3], ("skip_connect", 1))), 10**7)


def test_parameter_bound_counts_at_width_32_for_both_input_sizes():
    arch = network(C=128, fc_dim=64, fc_layers=2, glob_avg=False)
    reference = arch.replace(C=32, fc_dim=256)
    small, large = (count_parameters(reference, image_size=size) for size in (32, 224))
    assert large > small  # the flattening head is larger on larger images
    assert sampling.is_admissible(arch, large)
    assert not sampling.is_admissible(arch, large - 1)
    assert not sampling.is_admissible(arch, small)
    # and where the small images have more: a stem of three times the channels
    arch = network()
    small, large = (count_parameters(arch, image_size=size) for size in (32, 224))
    assert small > large
    assert not sampling.is_admissible(arch, small - 1)


@pytest.mark.parametrize("field", ["rejection", "is_admissible"])
def test_sampling_asks_every_rule(monkeypatch, field):
    """Each test of a candidate decides: with one that rejects all, nothing is left."""
    monkeypatch.setattr(sampling, field, lambda *_: "no" if field == "rejection" else False)
    monkeypatch.setattr(sampling, "_MAX_CANDIDATES", 20)
    with pytest.raises(ValueError, match="none of 20 candidates satisfies"):
        sample_architecture("train", 0, 0)


def test_small_bound_gives_small_networks():
    rules = dataclasses.replace(RULES["train"], max_params=100_000)
    for i in range(10):
        arch = sample_architecture("train", 0, i, rules=rules)
        assert count_parameters(arch.replace(C=32, fc_dim=256), image_size=32) <= 100_000


# --- The other splits -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "cells", "nodes", "deep_nodes", "threshold"),
    [
        ("deep", (10, 36), (1, 4), 2, 18),
        ("dense", (4, 18), (2, 10), 6, 10),
        ("bnfree", (4, 18), (1, 4), 2, 10),
        ("search", (6, 20), (1, 6), 3, 10),
    ],
)
def test_split_rules(split, cells, nodes, deep_nodes, threshold):
    archs = [sample_architecture(split, 0, i) for i in range(80)]
    assert min(a.n_cells for a in archs) in (cells[0], cells[0] + 1)
    assert cells[1] - 3 <= max(a.n_cells for a in archs) <= cells[1]
    counts = {"deep": [], "shallow": []}
    for a in archs:
        counts["deep" if a.n_cells > threshold else "shallow"].append(len(a.genotype.normal) // 2)
    assert min(counts["shallow"]) == nodes[0] and min(counts["deep"]) == nodes[0]
    assert deep_nodes < max(counts["shallow"]) <= nodes[1]
    assert max(counts["deep"]) == deep_nodes
    norms = {a.norm for a in archs}
    allowed = {"bnfree": {None}, "search": {"bnorm"}}.get(split, {None, "bnorm"})
    assert norms <= allowed and (split in ("bnfree", "search") or "bnorm" in norms)


def test_search_leaves_preprocessing_out_of_convolutional_networks_too():
    rules = dataclasses.replace(RULES["search"], nodes=(1, 1), deep_nodes=1)
    archs = [sample_architecture("search", 0, i, rules=rules) for i in range(60)]
    assert any(not a.preproc and not a.has_attention for a in archs)
    rules = dataclasses.replace(rules, preproc_share=1.0)
    archs = [sample_architecture("search", 0, i, rules=rules) for i in range(60)]
    assert not any(not a.preproc and not a.has_attention for a in archs)


def test_large_networks_only_in_deep_and_dense():
    assert {s for s in SPLITS if RULES[s].max_params == 10**8} == {"deep", "dense"}
    assert {RULES[s].max_params for s in SPLITS if s not in ("deep", "dense")} == {10**7}


def test_wide_is_test_four_times_as_wide():
    for i in range(15):
        test, wide = (sample_architecture(split, 5, i) for split in ("test", "wide"))
        assert wide == test.replace(C=4 * test.C)


def test_wide_for_imagenet():
    rules = dataclasses.replace(RULES["wide"], widen=2)
    test = sample_architecture("test", 0, 0)
    assert sample_architecture("wide", 0, 0, rules=rules) == test.replace(C=2 * test.C)


# --- Widths ---------------------------------------------------------------------------------------

SMALL = network((("sep_conv_3x3", 0), ("skip_connect", 1)), C_mult=1)  # 14 thousand parameters
ALL = tuple(range(32, 129, 16))


def widths_of(arch, n=400, **options):
    rng = np.random.default_rng(0)
    archs = [choose_width(arch, rng, **options) for _ in range(n)]
    return {a.C for a in archs}, archs


@pytest.mark.parametrize(
    ("arch", "num_params", "allowed"),
    [
        (SMALL, 800_001, ALL[:1]),
        (SMALL, 800_000, ALL[:2]),
        (SMALL, 400_001, ALL[:2]),
        (SMALL, 400_000, ALL[:3]),
        (SMALL, 200_001, ALL[:3]),
        (SMALL, 200_000, ALL),
        (SMALL.replace(n_cells=13), 1, ALL[:1]),
        (SMALL.replace(n_cells=12), 1, ALL[:2]),
        (SMALL.replace(n_cells=11), 1, ALL[:2]),
        (SMALL.replace(n_cells=10), 1, ALL[:3]),
        (SMALL.replace(n_cells=9), 1, ALL[:3]),
        (SMALL.replace(n_cells=8), 1, ALL),
        (SMALL.replace(glob_avg=False), 1, ALL[:1]),
        (network((("conv_5x5", 0), ("skip_connect", 1))), 1, ALL[:1]),
        (network((("msa", 0), ("msa", 1)), (("conv_7x7", 0), ("msa", 1))), 1, ALL[:1]),
        (network((("sep_conv_5x5", 0), ("conv_3x3", 1))), 1, ALL),
    ],
)
def test_training_width(arch, num_params, allowed):
    widths, archs = widths_of(arch, num_params=num_params)
    assert widths == set(allowed)
    # The hidden layer: one of the four narrowest, of all with few channels in the last case.
    few = {a.fc_dim for a in archs if a.C <= 64}
    many = {a.fc_dim for a in archs if a.C > 64}
    assert few == set(range(64, 513 if allowed == ALL else 257, 64))
    assert many == (set(range(64, 257, 64)) if allowed == ALL else set())


def test_training_width_counts_parameters_at_width_32():
    rng = np.random.default_rng(0)
    big = network(n_cells=6)
    size = count_parameters(big.replace(C=32, fc_dim=256))
    assert 400_000 < size < 800_000
    for C in (16, 512):
        assert widths_of(big.replace(C=C, fc_dim=16), 60)[0] == set(ALL[:2])
    assert choose_width(big, rng, widths=(8,), fc_dims=(32,)) == big.replace(C=8, fc_dim=32)


def test_training_width_looks_at_the_size_of_the_images(monkeypatch):
    sizes = []
    count = sampling.count_parameters
    monkeypatch.setattr(
        sampling,
        "count_parameters",
        lambda *a, image_size, **o: sizes.append(image_size) or count(*a, image_size=224, **o),
    )
    choose_width(SMALL, np.random.default_rng(0), image_size=224)
    assert sizes == [224]
    sizes.clear()
    rules = dataclasses.replace(RULES["train"], image_size=224)
    sample_architecture("train", 0, 0, rules=rules)
    assert sizes[-1] == 224 and set(sizes[:-1]) == {32}


def test_training_widths_and_layers_are_those_of_the_rules(train):
    assert {a.C for a in train} == set(ALL)
    assert {a.fc_dim for a in train} == set(range(64, 513, 64))


def test_evaluation_width_is_the_first_with_enough_parameters():
    """2.5M in Table 1, with channels from 32 in steps of 16."""
    for i in range(25):
        arch = sample_architecture("test", 0, i)
        assert arch.fc_dim == 256
        assert arch.C % 16 == 0 and 32 <= arch.C <= 336
        assert arch.C == 336 or count_parameters(arch) >= 2_500_000
        assert arch.C == 32 or count_parameters(arch.replace(C=arch.C - 16)) < 2_500_000


def test_evaluation_width_matches_the_published_sizes():
    """The authors' 500 test networks: median 2.96M parameters, 90% below 4.5M."""
    archs = [sample_architecture("test", 0, i) for i in range(100)]
    sizes = np.array([count_parameters(a) for a in archs]) / 1e6
    assert 2.8 < np.median(sizes) < 3.2
    assert 3.6 < np.quantile(sizes, 0.9) < 5.2
    assert np.mean(sizes >= 2.5) > 0.95


def test_evaluation_width_stops_at_the_last():
    assert sampling.smallest_width(SMALL, (32, 48), 10**9).C == 48
    assert sampling.smallest_width(SMALL, (32, 48), 1).C == 32
    exact = count_parameters(SMALL.replace(C=64))
    assert sampling.smallest_width(SMALL, (32, 48, 64, 80), exact).C == 64
    assert sampling.smallest_width(SMALL, (32, 48, 64, 80), exact + 1).C == 80
    # The architecture's own hidden layer counts.
    head = SMALL.replace(fc_layers=2, fc_dim=4096)
    assert sampling.smallest_width(head, (32, 48), count_parameters(head.replace(C=32))).C == 32


# --- Changed rules and wrong arguments ------------------------------------------------------------


def test_small_design_space():
    rules = dataclasses.replace(
        RULES["train"], n_cells=(4, 6), nodes=(1, 2), widths=(8, 16), fc_dims=(16,)
    )
    archs = [sample_architecture("train", 0, i, rules=rules) for i in range(40)]
    assert {a.n_cells for a in archs} == {4, 5, 6}
    assert {len(a.genotype.normal) // 2 for a in archs} == {1, 2}
    assert {a.C for a in archs} == {8, 16}
    assert {a.fc_dim for a in archs} == {16}


def test_splits():
    assert set(SPLITS) == {"train", "val", "test", "wide", "deep", "dense", "bnfree", "search"}


@pytest.mark.parametrize("split", ["predefined", "tset", "", None])
def test_unknown_split(split):
    with pytest.raises(ValueError, match="allowed: train, val, test, wide, deep, dense, bnfree"):
        sample_architecture(split, 0, 0)


@pytest.mark.parametrize(
    ("seed", "index", "name"), [(-1, 0, "seed"), (0, -1, "index"), (2**32, 0, "seed"),
                                (0, 1.5, "index"), (True, 0, "seed"), (0, "1", "index")]
)  # fmt: skip
def test_seed_and_index_out_of_range(seed, index, name):
    with pytest.raises(ValueError, match=rf"^{name} is .*; allowed: whole numbers from 0 to \d+$"):
        sample_architecture("train", seed, index)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_cells": (5, 4)},
        {"n_cells": (0, 4)},
        {"n_cells": 4},
        {"nodes": (0, 4)},
        {"deep_above": (7,)},
        {"nodes": (3, 4)},
        {"widths": ()},
        {"widths": (32, 16)},
        {"widths": (12,)},
        {"fc_dims": (0,)},
        {"fc_dims": (64, 64)},
        {"norm": None},
        {"preproc_share": 1.5},
        {"widen": 0},
    ],
)
def test_rules_out_of_range(changes):
    field = "deep_nodes" if changes == {"nodes": (3, 4)} else next(iter(changes))
    with pytest.raises(ValueError, match=f"^rule '{field}' is .*; allowed: "):
        Rules(**changes)
