"""The frozen evaluation sets."""

import collections
from importlib import resources

import pytest

from ghn_jax import sample_architecture
from ghn_jax.cli.deepnets1m import main
from ghn_jax.deepnets1m.architecture import Architecture
from ghn_jax.deepnets1m.canonical import canonical
from ghn_jax.deepnets1m.evaluation_sets import (
    EVALUATION_SIZES,
    FILE,
    RESNET50,
    evaluation_set,
    is_held_out,
)
from ghn_jax.deepnets1m.sampling import RULES


def test_they_are_generated_again_byte_for_byte(tmp_path):
    main(["freeze", "--out", str(tmp_path / FILE)])
    packed = (resources.files("ghn_jax.deepnets1m") / FILE).read_bytes()
    assert (tmp_path / FILE).read_bytes() == packed
    assert len(packed) < 100_000


def test_sizes_are_the_papers():
    sizes = {split: len(evaluation_set(split)) for split in (*EVALUATION_SIZES, "predefined")}
    assert sizes == {"val": 500, "test": 500, "wide": 100, "deep": 100, "dense": 100,
                     "bnfree": 100, "predefined": 2}  # fmt: skip


def test_no_network_is_in_them_twice():
    forms = collections.Counter(
        canonical(arch)
        for split in EVALUATION_SIZES
        if split != "wide"
        for arch in evaluation_set(split)
    )
    assert sum(forms.values()) == 1300 and set(forms.values()) == {1}


def test_wide_is_test_but_wider():
    for size, factor in ((32, 4), (224, 2)):
        wide, test = (evaluation_set(split, image_size=size) for split in ("wide", "test"))
        assert [w.C for w in wide] == [factor * t.C for t in test[:100]]
        assert all(w.replace(C=8) == t.replace(C=8) for w, t in zip(wide, test, strict=False))


@pytest.mark.parametrize("split", EVALUATION_SIZES)
def test_they_follow_the_rules_of_their_splits(split):
    rules = RULES[split]
    for arch in evaluation_set(split):
        nodes = len(arch.genotype.normal) // 2
        assert rules.n_cells[0] <= arch.n_cells <= rules.n_cells[1]
        assert rules.nodes[0] <= nodes <= rules.nodes[1]
        assert arch.C % rules.widen == 0 and arch.C // rules.widen in rules.widths
        assert (arch.norm is None) == (rules.norm == "never") or rules.norm == "mixed"


def test_training_passes_over_them(monkeypatch):
    first = sample_architecture("train", 0, 0)
    assert not is_held_out(first)
    assert is_held_out(evaluation_set("dense")[7].replace(C=8))
    monkeypatch.setattr(
        "ghn_jax.deepnets1m.sampling.is_held_out", lambda arch: canonical(arch) == canonical(first)
    )
    other = sample_architecture("train", 0, 0)
    assert canonical(other) != canonical(first)
    # Evaluation sets are not held out from themselves.
    monkeypatch.setattr("ghn_jax.deepnets1m.sampling.is_held_out", lambda arch: True)
    assert isinstance(sample_architecture("test", 0, 0), Architecture)


def test_unknown_split():
    with pytest.raises(ValueError, match="split 'train' has no evaluation set; allowed: val, test"):
        evaluation_set("train")
    assert evaluation_set("predefined")[0] == RESNET50
