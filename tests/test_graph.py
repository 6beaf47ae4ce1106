"""Computational graphs and padded batches; that they equal the authors' is in test_deepnets1m.py
and test_parity.py.
"""

import networkx as nx
import numpy as np
import pytest

from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture
from ghn_jax.deepnets1m.graph import PADDING_ID, PRIMITIVES, build_graph
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.wiring import DisconnectedError
from ghn_jax.hypernet.padding import SWEEP_WIDTH, pad_graphs

SAMPLES = [
    *(sample_architecture("train", 1, i) for i in range(12)),
    # Without convolutions at their inputs, cells join what they read in the middle of the next.
    *(sample_architecture("train", 1, i) for i in (23, 124)),
    *(sample_architecture(split, 1, i) for split in ("deep", "dense", "bnfree") for i in range(2)),
]
GRAPHS = [build_graph(arch) for arch in SAMPLES]


def as_networkx(graph):
    real = graph.edges[graph.edges[:, 2] == 1, :2]
    return nx.DiGraph([tuple(map(int, edge)) for edge in real])


@pytest.mark.parametrize("limit", [1, 2, 7, 50])
def test_edges_are_the_shortest_paths_up_to_a_length(limit):
    for arch, whole in zip(SAMPLES[:6], GRAPHS, strict=False):
        graph = build_graph(arch, limit)
        paths = nx.all_pairs_shortest_path_length(as_networkx(whole), cutoff=limit)
        expected = {(u, v, d) for u, ends in paths for v, d in ends.items() if d}
        assert set(map(tuple, graph.edges.tolist())) == expected
        assert len(graph.edges) == len(expected)


def test_nodes_are_in_topological_order_from_the_images_to_the_logits():
    for graph in GRAPHS:
        assert (graph.edges[:, 0] < graph.edges[:, 1]).all()
        assert (np.diff(graph.cells) >= 0).all()
        assert PRIMITIVES[graph.primitives[0]] == "input"
        one_way = as_networkx(graph)
        # Every node is between the images, or the positions added to them, and the last bias.
        starts = {0, *np.flatnonzero(graph.primitives == PRIMITIVES.index("pos_enc")).tolist()}
        after = set().union(*(nx.descendants(one_way, start) for start in starts))
        assert after | starts == set(range(len(graph)))
        assert nx.ancestors(one_way, len(graph) - 1) | {len(graph) - 1} == set(range(len(graph)))


def test_sums_and_concats_have_several_sources():
    for graph in GRAPHS:
        sources = np.bincount(graph.edges[graph.edges[:, 2] == 1, 1], minlength=len(graph))
        joins = np.isin(graph.primitives, [PRIMITIVES.index(p) for p in ("sum", "concat", "cse")])
        assert (sources[joins] >= 2).all()
        starts = np.isin(graph.primitives, [PRIMITIVES.index(p) for p in ("input", "pos_enc")])
        assert (sources[starts] == 0).all()
        assert (sources[~joins & ~starts] == 1).all()


def test_shapes_follow_classes_and_image_size():
    arch = Architecture(VIT, 3, C=16, C_mult=1, preproc=False)
    small, large = build_graph(arch, num_classes=7), build_graph(arch, image_size=224)
    assert small.param_shapes[-2:] == [(7, 16), (7,)]
    assert small.param_shapes[1:3] == [(16, 3, 3, 3), (1, 16, 11, 11)]
    assert large.param_shapes[1:3] == [(16, 3, 16, 16), (1, 16, 14, 14)]


def test_bad_arguments():
    arch = Architecture(DARTS, 4, C=16)
    with pytest.raises(ValueError, match="virtual_edges is 0; allowed: 1"):
        build_graph(arch, 0)
    with pytest.raises(ValueError, match="num_classes is 0"):
        build_graph(arch, num_classes=0)


def test_disconnected():
    cut = (("none", 0), ("none", 1), ("none", 0), ("none", 1))
    genotype = {"normal": cut, "normal_concat": [2, 3], "reduce": cut, "reduce_concat": [2, 3]}
    arch = Architecture.from_dict({"genotype": genotype, "n_cells": 4, "preproc": True})
    with pytest.raises(DisconnectedError, match="no path"):
        build_graph(arch)


# --- Padded batches -------------------------------------------------------------------------------


def test_a_padded_batch_holds_its_graphs_one_after_another():
    graphs = GRAPHS[:5]
    batch = pad_graphs(graphs)
    start = edge = 0
    for i, graph in enumerate(graphs):
        n, m = len(graph), len(graph.edges)
        assert (batch.n_node[i], batch.n_edge[i]) == (n, m)
        assert (batch.nodes["primitive"][start : start + n] == graph.primitives).all()
        here = slice(edge, edge + m)
        joined = np.stack([batch.senders[here], batch.receivers[here]], 1) - start
        assert (joined == graph.edges[:, :2]).all()
        assert (batch.edges["distance"][here] == graph.edges[:, 2]).all()
        for code, shape in zip(batch.nodes["shape"][start:], graph.param_shapes, strict=False):
            assert tuple(code) == ((0, 0, 0, 0) if shape is None else (*shape, 1, 1, 1)[:4])
        start, edge = start + n, edge + m
    assert batch.n_node.sum() == len(batch.nodes["primitive"])
    assert batch.n_edge.sum() == len(batch.senders)
    assert (batch.nodes["primitive"][start:] == PADDING_ID).all()
    assert (batch.senders[edge:] == len(batch.nodes["primitive"]) - 1).all()
    assert (batch.edges["distance"][edge:] == 0).all()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_sweep_updates_every_node_once_after_those_it_hears_from(direction):
    batch = pad_graphs(GRAPHS)
    rows = batch.globals[direction]
    assert rows.shape[1] == SWEEP_WIDTH
    total = sum(map(len, GRAPHS))
    used = rows[rows < total]
    assert sorted(used) == list(range(total))
    when = np.empty(total, int)
    when[used] = np.nonzero(rows < total)[0]
    real = batch.edges["distance"] == 1
    first, then = batch.senders[real], batch.receivers[real]
    if direction == "backward":
        first, then = then, first
    assert (when[first] < when[then]).all()


def test_sizes_are_as_asked_for():
    batch = pad_graphs(GRAPHS[:2], n_node=2000, n_edge=200_000, n_step=512)
    assert batch.nodes["primitive"].shape == (2000,)
    assert batch.senders.shape == batch.edges["distance"].shape == (200_000,)
    assert batch.globals["forward"].shape == (512, SWEEP_WIDTH)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_node": len(GRAPHS[0])}, "one node is kept for padding"),
        ({"n_edge": len(GRAPHS[0].edges) - 1}, "do not fit"),
        ({"n_step": 1}, "sweep steps"),
    ],
)
def test_graphs_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        pad_graphs(GRAPHS[:1], **sizes)


def test_no_graphs():
    with pytest.raises(ValueError, match="no graphs"):
        pad_graphs([])
