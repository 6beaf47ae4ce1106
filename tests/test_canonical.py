"""When two architectures are the same network, against isomorphism of their graphs."""

import itertools
from collections import defaultdict

import networkx as nx
import pytest

from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture, Genotype
from ghn_jax.deepnets1m.canonical import canonical
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.deepnets1m.wiring import is_connected

KINDS = ("none", "skip_connect", "conv_1x1", "max_pool_3x3")


def network(edges, concat=(2, 3), **options):
    edges = tuple(edges)
    return Architecture(Genotype(edges, concat, edges, concat), **{"n_cells": 4, "C": 8, **options})


def as_networkx(arch):
    graph = build_graph(arch, 1)
    labels = zip(graph.primitives.tolist(), graph.param_shapes, strict=True)
    other = nx.DiGraph(graph.edges[:, :2].tolist())
    nx.set_node_attributes(other, {i: str(label) for i, label in enumerate(labels)}, "label")
    return other


def same_graph(a, b) -> bool:
    return nx.is_isomorphic(a, b, node_match=lambda x, y: x["label"] == y["label"])


@pytest.mark.filterwarnings("ignore:The hashes produced for directed graphs")
def test_forms_are_equal_where_graphs_are():
    """All networks of two nodes over four operations that add states up in the end."""
    by_graph = defaultdict(list)
    for kinds in itertools.product(KINDS, repeat=4):
        for sources in ((0, 1), (0, 2), (1, 2)):
            arch = network(zip(kinds, (0, 1, *sources), strict=True), (3,))
            if is_connected(arch):
                graph = as_networkx(arch)
                key = nx.weisfeiler_lehman_graph_hash(graph, node_attr="label", iterations=4)
                by_graph[key].append((graph, canonical(arch)))
    assert sum(map(len, by_graph.values())) > 600 > len(by_graph) > 200
    forms = defaultdict(set)
    repeated = 0
    for key, group in by_graph.items():
        for (a, form_a), (b, form_b) in itertools.pairwise(group):
            assert same_graph(a, b) == (form_a == form_b)
            repeated += form_a == form_b
        for _, form in group:
            forms[form].add(key)
    assert repeated > 300
    assert all(len(keys) == 1 for keys in forms.values())


def test_what_makes_no_difference():
    base = network((("conv_3x3", 0), ("cse", 1), ("skip_connect", 2), ("max_pool_3x3", 0)))
    form = canonical(base)
    assert canonical(base.replace(C=64, fc_dim=8)) == form
    assert canonical(base.replace(fc_layers=0)) == canonical(base.replace(fc_layers=1))
    vit = Architecture(VIT, 4, C=16, C_mult=1, preproc=False)
    for change in ({"ks": 7}, {"stem_type": 1}, {"stem_pool": True}):
        assert canonical(vit.replace(**change)) == canonical(vit)
        assert canonical(base.replace(**change)) != form
    pooled = base.replace(stem_type=1, stem_pool=True)
    assert canonical(pooled) == canonical(pooled.replace(stem_pool=False))


@pytest.mark.parametrize("change", [
    {"n_cells": 5}, {"C_mult": 1}, {"norm": None}, {"glob_avg": False}, {"fc_layers": 2},
    {"ks": 5}, {"stem_type": 1},
])  # fmt: skip
def test_what_makes_a_difference(change):
    arch = Architecture(DARTS, 4, C=16)
    assert canonical(arch.replace(**change)) != canonical(arch)


def test_operations_and_wiring_make_a_difference():
    base = (("conv_3x3", 0), ("cse", 1), ("sep_conv_3x3", 2), ("max_pool_3x3", 0))
    forms = {canonical(network(base))}
    for position in range(4):
        kind, source = base[position]
        for edge in (("conv_5x5", source), (kind, (source + 1) % 2)):
            forms.add(canonical(network((*base[:position], edge, *base[position + 1 :]))))
    forms.add(canonical(network(base, (3,))))
    assert len(forms) == 10
    # A state that is read twice is not the same as its operation done twice.
    once = (("conv_3x3", 0), ("none", 1), ("skip_connect", 2), ("max_pool_3x3", 1))
    twice = (*once[:2], ("conv_3x3", 0), once[3])
    assert canonical(network(once)) != canonical(network(twice))
    assert canonical(network(once, (3,))) == canonical(network(twice, (3,)))


def test_symmetric_cells_are_quick():
    """Ten equal nodes could be ordered in three million ways."""
    twins = tuple(("conv_1x1", s) for _ in range(10) for s in (0, 1))
    arch = network(twins, tuple(range(2, 12)))
    assert canonical(arch) == canonical(network(twins, tuple(reversed(range(2, 12)))))
