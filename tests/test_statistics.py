"""Table 1's rows: of known graphs, of generated splits, of the official format."""

import networkx as nx
import numpy as np
import pytest

from ghn_jax.architecture import DARTS, VIT, Architecture
from ghn_jax.counts import count_parameters
from ghn_jax.deepnets1m.__main__ import main
from ghn_jax.deepnets1m.statistics import degree_and_path, statistics, table
from ghn_jax.graph import build_graph
from ghn_jax.resnet import resnet50_graph
from ghn_jax.sampling import sample_architecture


def test_the_published_figures_of_resnet50_and_vit():
    vit = Architecture(VIT, n_cells=12, C=128, C_mult=1, preproc=False, fc_layers=1)
    for graph, nodes, degree, path in (
        (resnet50_graph(1), 126, 2.238095238095238, 11.193269841269842),
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
    assert s.graphs == 2
    assert (s.cells.low, s.cells.high) == (4, 8)
    assert (s.channels.low, s.channels.high) == (16, 48)
    assert (s.nodes.low, s.nodes.high) == (min(sizes), max(sizes))
    assert s.nodes.mean == np.mean(sizes)
    assert s.nodes.std == np.std(sizes)
    assert s.without_norm == 0.5
    assert s.millions.high == count_parameters(large) / 1e6
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
    assert cells[0] <= s.cells.low <= s.cells.high <= cells[1]
    assert s.degree.mean == pytest.approx(degree, abs=0.1)
    assert s.path.mean == pytest.approx(path, abs=3 * s.path.std / 60**0.5)
    assert s.millions.low >= 2.5


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
