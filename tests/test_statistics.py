"""Table 1's rows: of known graphs, of generated splits, of the official format."""

import itertools

import networkx as nx
import numpy as np
import pytest

from ghn_jax import zoo
from ghn_jax.cli.deepnets1m import main
from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture
from ghn_jax.deepnets1m.counts import count_parameters
from ghn_jax.deepnets1m.distance import hungarian_distance
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.statistics import degree_and_path, statistics, table
from ghn_jax.plot.splits import draw_examples, draw_statistics
from ghn_jax.tracing.model_graph import model_graph


def test_the_published_figures_of_resnet50_and_vit():
    vit = Architecture(VIT, n_cells=12, C=128, C_mult=1, preproc=False, fc_layers=1)
    for graph, nodes, degree, path in (
        (
            model_graph(zoo.resnet50(), np.zeros((1, 32, 32, 3)), 1),
            126,
            2.238095238095238,
            11.193269841269842,
        ),
        (build_graph(vit, 1), 129, 2.294573643410853, 10.700096899224807),
    ):
        assert len(graph) == nodes
        assert degree_and_path(graph.edges, nodes) == pytest.approx((degree, path), rel=1e-12)


def test_degree_and_path_are_networkx_own():
    for index in range(5):
        graph = build_graph(sample_architecture("dense", 3, index), 1)
        other = nx.Graph(graph.edges[:, :2].tolist())
        degree, path = degree_and_path(graph.edges, len(graph))
        assert degree == pytest.approx(np.mean([d for _, d in other.degree()]))
        assert path == pytest.approx(nx.average_shortest_path_length(other))


def test_statistics_are_of_the_architectures_given():
    small, large = Architecture(DARTS, 4, C=16, norm=None), Architecture(DARTS, 8, C=48)
    s = statistics(iter([small, large]))
    sizes = [len(build_graph(a, 1)) for a in (small, large)]
    assert len(s) == 2
    assert s.cells.tolist() == [4, 8]
    assert s.channels.tolist() == [16, 48]
    assert s.nodes.tolist() == sizes == s.primitives.sum(1).tolist()
    assert s.without_norm.tolist() == [True, False]
    assert s.parameters.tolist() == [count_parameters(small), count_parameters(large)]
    assert s.primitives[:, PRIMITIVES.index("bn")].tolist()[0] == 0 < s.primitives[1, 11]
    text = table({"a": s})
    assert "50.0%" in text
    assert f"{min(sizes)}-{max(sizes)}" in text
    with pytest.raises(ValueError, match="was given no architectures"):
        statistics([])


@pytest.mark.parametrize(
    ("split", "cells", "degree", "path"),
    [
        ("test", (4, 18), 2.3, 14.3),
        ("deep", (10, 36), 2.3, 26.2),
        ("dense", (4, 18), 2.4, 15.1),
        ("bnfree", (4, 18), 2.4, 10.0),
    ],
)
def test_generated_splits_look_like_the_official_ones(split, cells, degree, path):
    """Means of 60 are within three standard errors of the authors' (their files' statistics)."""
    s = statistics(sample_architecture(split, 0, i) for i in range(60))
    assert cells[0] <= s.cells.min() <= s.cells.max() <= cells[1]
    assert s.degree.mean() == pytest.approx(degree, abs=0.1)
    assert s.path.mean() == pytest.approx(path, abs=3 * s.path.std() / 60**0.5)
    assert s.parameters.min() >= 2.5e6


def test_the_program_reads_official_files(shared, capsys):
    path = shared / "golden" / "deepnets1m" / "deepnets1m_eval.hdf5"
    main(["stats", "--splits", "test", "deep", "--nets", str(path), "--num", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["test", "deep"]
    assert lines[1].split() == ["graphs", "4", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "easy"], "--splits has 'easy'; allowed: train, val, test"),
        (["--num", "0"], "--num is 0; allowed: 1 or more"),
        (["--nets", "/nowhere/nets.hdf5"], "nets.hdf5 does not exist"),
    ],
)
def test_what_cannot_work_ends_in_a_sentence(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        main(["stats", *arguments])


def test_hungarian_distance_counts_primitives_without_a_partner():
    graphs = [build_graph(sample_architecture("test", 3, i), 1) for i in range(4)]
    for a, b in itertools.combinations_with_replacement(graphs, 2):
        shared = np.minimum(*(np.bincount(g.primitives, minlength=15) for g in (a, b))).sum()
        assert hungarian_distance(a, b) == max(len(a), len(b)) - shared
        assert hungarian_distance(a, b) == hungarian_distance(b, a)
    assert hungarian_distance(graphs[0], graphs[0]) == 0 < hungarian_distance(*graphs[:2])


def test_figures_show_every_split(tmp_path, capsys):
    arguments = ["--splits", "test", "bnfree", "--num", "5", "--figures", str(tmp_path)]
    main(["stats", *arguments])
    assert {p.name for p in tmp_path.iterdir()} == {"statistics.png", "examples.png"}
    columns = {split: statistics(evaluation_set(split)[:5]) for split in ("test", "bnfree", "deep")}
    figure = draw_statistics(columns, distances={"test": [1.0, 2.0, 4.0]})
    a, b, _, _, e, h = figure.axes
    assert [t.get_text() for t in a.get_xticklabels()] == ["test", "bnfree", "deep"]
    assert [t.get_text() for t in h.get_xticklabels()] == ["test"]
    heights = np.array([bar.get_height() for bar in b.patches]).reshape(3, 15)
    np.testing.assert_allclose(heights.sum(1), 1)
    assert sum(len(c.get_offsets()) for c in e.collections) == 15
    graphs = [build_graph(arch, 1) for arch in evaluation_set("test")[:2]]
    titles = [x.get_title() for x in draw_examples({"test": graphs}).axes]
    assert titles == [f"test, {len(g)} nodes" for g in graphs]
    for draw in (draw_statistics, draw_examples):
        with pytest.raises(ValueError, match="was given"):
            draw({})
        with pytest.raises(ValueError, match="allowed suffixes"):
            draw(columns, "picture.bmp")
