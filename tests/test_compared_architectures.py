"""Architectures compared by their embeddings (§ C.2.4)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

from ghn_jax.cli import paper
from ghn_jax.deepnets1m.distance import hungarian_distance
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.evaluation.experiments import compared_architectures as compared
from ghn_jax.evaluation.experiments.records import read_records
from ghn_jax.hypernet.checkpoint import save_ghn
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.tracing.model_graph import model_graph
from ghn_jax.zoo.resnet import Bottleneck, PlainBottleneck, ResNet


def test_frechet_distance_is_its_definition():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)) + 1
    b = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 4))
    first, second = np.cov(a.T), np.cov(b.T)
    root = sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert compared.frechet_distance(a, b) == pytest.approx(expected)
    assert compared.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    # Of numbers: between means, and between standard deviations.
    x, y = a[:, :1], b[:, :1]
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert compared.frechet_distance(x, y) == pytest.approx(expected)
    # Fewer than dimensions: singular, and still a number.
    assert np.isfinite(compared.frechet_distance(a[:3], b[:2]))
    with pytest.raises(ValueError, match="two or more of each"):
        compared.frechet_distance(a[:1], b)


def test_a_plain_resnet_has_no_shortcuts():
    sample = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    graphs = [
        model_graph(ResNet(block, (1, 1, 1, 1)), sample, 1)
        for block in (Bottleneck, PlainBottleneck)
    ]
    sums = [(g.primitives == PRIMITIVES.index("sum")).sum() for g in graphs]
    assert sums == [4, 0]
    assert not any("downsample" in name for name in graphs[1].names)
    # What is left is a chain.
    senders = graphs[1].edges[:, 0]
    assert len(np.unique(senders)) == len(senders) == len(graphs[1]) - 1


def test_the_command(tmp_path, capsys):
    ghn = GHN(max_shape=(16, 16, 11, 11))
    variables = ghn.init_variables(1)
    save_ghn(tmp_path / "one", ghn, variables)
    out = tmp_path / "out"
    arguments = ["compared-architectures", "--quick", "--ghn", str(tmp_path / "one"), "--training",
                 "5", "--networks", "3", "--pairs", "4", "--out", str(out)]  # fmt: skip
    paper.main(arguments)
    records = read_records(out)
    assert list(records) == ["one", "Hungarian"]
    # ViT's and the pair's, computed one by one.
    nets = evaluation_set("test")[:3]
    x = embed_graphs(ghn, variables, [ghn.graph(a) for a in nets])
    apart = {(i, j): np.linalg.norm(x[i] - x[j]) for i, j in ((0, 1), (0, 2), (1, 2))}
    assert tuple(records["one"]["closest"]) == min(apart, key=apart.get)
    assert tuple(records["one"]["farthest"]) == max(apart, key=apart.get)
    train = embed_graphs(
        ghn, variables, [ghn.graph(sample_architecture("train", 0, i)) for i in range(5)]
    )
    assert records["one"]["sets"][0] == pytest.approx(compared.frechet_distance(train, x), rel=1e-4)
    y = embed_graphs(ghn, variables, compared._named_graphs(50, 32))
    expected = np.linalg.norm(y[1:] - y[0], axis=1)
    np.testing.assert_allclose(records["one"]["named"], expected, rtol=1e-4)
    named = compared._named_graphs(1, 32)
    assert len(named[0]) > len(named[2]) > len(named[1])  # ResNet-50, its plain form, ResNet-34
    assert records["Hungarian"]["named"][2] == hungarian_distance(named[0], named[3])
    assert len(list(out.glob("one_*.png"))) == 4
    shown = capsys.readouterr().out
    assert (
        "| GHN-2, the paper | 1 | 1.3 | 3.1 | ResNet-34 < ResNet-50 without skips < ViT |" in shown
    )
    before = (out / "records.jsonl").read_text()
    paper.main(arguments)
    assert (out / "records.jsonl").read_text() == before
    for wrong, message in (
        (["--networks", "1"], "--networks is 1; allowed: 2 to 500"),
        (["--pairs", "0"], "--pairs is 0; allowed: 1 or more"),
        (["--training", "6"], "another folder"),
    ):
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *wrong])


def test_claims():
    rows = [
        {"name": "a", "named": [1, 2, 3], "sets": [1, 2, 3, 4, 5]},
        {"name": "b", "named": [2, 1, 3], "sets": [2, 1, 3, 4, 5]},
        {"name": "Hungarian", "named": [1, 2, 3], "sets": [1, 2, 3, 4, 5]},
    ]
    text = compared.table(rows)
    order = "the order from ResNet-50 is"
    assert f"a: {order} the paper's of GHN-2; nearest to train is test, as for GHN-2" in text
    assert f"b: {order} not the paper's of GHN-2; nearest to train is wide.\n" in text
    assert "Hungarian: the order" not in text


def test_sets_are_the_frozen_ones():
    sets = compared._sets(compared.Config(training=3, networks=2))
    assert {k: len(v) for k, v in sets.items()} == {"train": 3} | dict.fromkeys(compared.SPLITS, 2)
    whole = compared._sets(compared.Config(training=2))
    assert [len(whole[s]) for s in compared.SPLITS] == [500, 100, 100, 100, 100]
    assert len(build_graph(sets["deep"][0], 1)) > 100
