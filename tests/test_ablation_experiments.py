"""The experiments that train hypernetworks: ablations, and numbers of training architectures."""

import json

import numpy as np
import pytest

from ghn_jax.cli import paper
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.evaluation import networks
from ghn_jax.evaluation.experiments import ablations, trained_ghns, training_architectures
from ghn_jax.evaluation.experiments.records import read_records
from ghn_jax.hypernet.checkpoint import load_ghn
from ghn_jax.training import loop
from ghn_jax.training.ablations import ABLATIONS

EDGES = (("conv_1x1", 0), ("skip_connect", 1))
ARCH = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), 2, C=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both experiments, on one architecture: their hypernetworks have the same programs."""
    folder = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        patch.setattr(loop, "architecture_source", lambda *_: lambda position: ARCH)
        patch.setattr(
            networks, "sample_architecture",
            lambda *_, rules: ARCH if rules.norm == "always" else ARCH.replace(norm=None),
        )  # fmt: skip
        options = ["--quick", "--steps", "2", "--unseen", "2", "--out"]
        rows = ["--rows", "bm1", "bm1-longer", "bm1-no-tiling-mlp-decoder"]
        paper.main(["table8", *options, str(folder / "ablations"), *rows])
        counts = ["--counts", "1", "3", "--meta-batches", "1"]
        paper.main(["training-architectures", *options, str(folder / "counts"), *counts])
    return folder


def test_rows_are_trained_and_evaluated(folder):
    records = read_records(folder / "ablations")
    assert [records[row]["steps"] for row in ("bm1", "bm1-longer")] == [2, 16]
    refused = records["bm1-no-tiling-mlp-decoder"]
    assert (refused["refused"], refused["parameters"] > 10**8) == (True, True)
    for row in ("bm1", "bm1-longer"):
        assert records[row]["seconds"] > 0
        names = [f"{row}: {kind} {i}" for kind in ("unseen", "unseen, no BN") for i in range(2)]
        assert all(0 <= records[name]["top1"] <= 1 for name in names)
        ghn, variables = load_ghn(folder / "ablations" / "hypernetworks" / row)
        start = ghn.init_variables(0)["params"]["op_embedding"]
        assert (variables["params"]["op_embedding"] != start).any()
    text = (folder / "ablations" / "table.md").read_text()
    assert "| No Meta-batch (bm = 1) | 1.6M | 0.7 | 54.3 | 63.0 |" in text
    assert "| No tiling, MLP decoder | 0.1B: not trained | - |" in text
    assert "54.3, 47.5, 5.5 |" in text


def test_what_is_there_is_not_computed_again(folder, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(trained_ghns, "train", fail)
    monkeypatch.setattr(trained_ghns, "evaluate_ghn", fail)
    out, rows = folder / "ablations", ("bm1", "bm1-longer")
    config = ablations.Config(preset="digits", dataset="digits", steps=2, unseen=2, out=out,
                              rows=rows)  # fmt: skip
    found = ablations.run(config)
    assert len(found) == 2 + 2 * 4
    # Without its record, a row's checkpoint is enough.
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["name"] != "bm1"]
    (out / "records.jsonl").write_text("".join(kept))
    assert ablations.run(config)[0] == found[0]
    with pytest.raises(ValueError, match="has records with seed 0 .now 1."):
        ablations.run(ablations.Config(preset="digits", dataset="digits", steps=2, seed=1, out=out))


def test_numbers_of_training_architectures(folder):
    records = read_records(folder / "counts")
    rows = [r for r in records.values() if "count" in r]
    assert [(r["count"], r["meta_batch"], r["steps"]) for r in rows] == [(1, 1, 2), (3, 1, 2)]
    config = json.loads(
        (folder / "counts" / "hypernetworks" / "3-bm1" / "config.json").read_text()
    )["training"]
    assert (config["training_architectures"], config["meta_batch"]) == (3, 1)
    assert (folder / "counts" / "figure3.png").stat().st_size > 5000
    assert "| 3 | 1 | " in (folder / "counts" / "table.md").read_text()
    results = [{"count": 100, "meta_batch": 8, "train_top1": 0.5, "shown": ["1", "2"]}]
    assert "| 100 | 8 | 50.0 | 1 | 2 | 47.1, 30.0 |" in training_architectures.table(results)


def test_the_papers_numbers_agree_with_each_other():
    trainable = [name for name in ABLATIONS if "no-tiling" not in name]
    assert list(ablations.PAPER) == trainable
    for row, (id_, ood, _) in ablations.PAPER_5.items():
        assert ablations.PAPER[row][1] == id_
        assert np.mean(ablations.PAPER[row][3:7]) == pytest.approx(ood, abs=0.06)


def test_average_ranks():
    nets = {row: [{"top1": x} for x in top1] for row, top1 in
            {"a": (0.9, 0.5, 0.1), "b": (0.8, 0.5, 0.2), "c": (0.1, 0.2, 0.3)}.items()}  # fmt: skip
    ranks = ablations.average_ranks(nets)
    assert ranks == pytest.approx({"a": (1 + 1.5 + 3) / 3, "b": (2 + 1.5 + 2) / 3, "c": 7 / 3})


def test_unseen_networks_are_none_of_training():
    from ghn_jax.training.config import preset

    config = preset("digits")
    pairs = trained_ghns.unseen_networks(config, 3, (), 16)
    assert [split for split, _ in pairs] == ["unseen"] * 3 + ["unseen, no BN"] * 3
    source = loop.architecture_source(config, 16)
    drawn = {source(i) for i in range(30)}
    for split, (_, arch) in pairs:
        assert (arch.norm is None) == (split == "unseen, no BN")
        assert arch not in drawn
        assert arch.C == 8
    with pytest.raises(ValueError, match="--unseen is 0; allowed: 1 or more"):
        trained_ghns.unseen_networks(config, 0, (), 16)
    splits = trained_ghns.unseen_networks(config, None, ("test", "wide"), 32)
    assert [sum(s == split for s, _ in splits) for split in ("test", "wide")] == [500, 100]
