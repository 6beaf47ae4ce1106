"""Generated input: a valid architecture and a right graph, or a clear error."""

import json
import math

import networkx as nx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghn_jax.deepnets1m.architecture import OPERATIONS, Architecture, Genotype
from ghn_jax.deepnets1m.canonical import canonical
from ghn_jax.deepnets1m.counts import count_flops, count_parameters
from ghn_jax.deepnets1m.graph import PRIMITIVES, build_graph
from ghn_jax.deepnets1m.wiring import DisconnectedError, is_connected, wire

FIELDS = ("n_cells", "C", "C_mult", "ks", "stem_type", "stem_pool", "norm", "preproc", "glob_avg",
          "fc_layers", "fc_dim", "genotype")  # fmt: skip
fuzz = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=list(HealthCheck)
)


@st.composite
def cells(draw, nodes: int):
    edges = []
    for node in range(nodes):
        edges += [
            (draw(st.sampled_from(OPERATIONS)), draw(st.integers(0, node + 1))) for _ in range(2)
        ]
    return tuple(edges)


@st.composite
def architectures(draw):
    nodes = draw(st.integers(1, 4))
    concat = draw(
        st.lists(st.integers(2, nodes + 1), min_size=1, max_size=nodes, unique=True).map(tuple)
    )
    C_mult = draw(st.sampled_from((1, 2)))
    return Architecture(
        genotype=Genotype(draw(cells(nodes)), concat, draw(cells(nodes)), concat),
        n_cells=draw(st.integers(1, 9)),
        C=draw(st.sampled_from((8, 16, 40))),
        C_mult=C_mult,
        ks=draw(st.sampled_from((3, 5, 7))),
        stem_type=draw(st.integers(0, 1)),
        stem_pool=draw(st.booleans()),
        norm=draw(st.sampled_from(("bnorm", None))),
        preproc=True if C_mult > 1 or len(concat) > 1 else draw(st.booleans()),
        glob_avg=draw(st.booleans()),
        fc_layers=draw(st.integers(0, 3)),
        fc_dim=draw(st.sampled_from((8, 64))),
    )


@fuzz
@given(architectures(), st.sampled_from((32, 224)))
def test_an_architecture_has_a_right_graph_or_none(arch, image_size):
    assert Architecture.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch
    try:
        graph = build_graph(arch, 50, image_size=image_size)
    except DisconnectedError:
        assert not is_connected(arch)
        return
    assert is_connected(arch)
    n = len(graph)
    real = graph.edges[graph.edges[:, 2] == 1, :2]
    one_way = nx.DiGraph(real.tolist())
    assert (real[:, 0] < real[:, 1]).all() and (np.diff(graph.cells) >= 0).all()
    # From the images, or the positions added to them, to the last bias.
    starts = np.isin(graph.primitives, [PRIMITIVES.index(p) for p in ("input", "pos_enc")])
    sources = np.bincount(real[:, 1], minlength=n)
    assert ((sources == 0) == starts).all()
    assert nx.ancestors(one_way, n - 1) | {n - 1} == set(range(n))
    lengths = {
        (u, v): d
        for u, ends in nx.all_pairs_shortest_path_length(one_way, cutoff=50)
        for v, d in ends.items()
        if d
    }
    assert {(u, v): d for u, v, d in graph.edges.tolist()} == lengths
    # Parameters: each once, none that the network does not have.
    named = [name for name in graph.names if "." in name]
    assert len(set(named)) == len(named)
    shapes = zip(graph.names, graph.param_shapes, graph.primitives, strict=True)
    norms = (PRIMITIVES.index("bn"), PRIMITIVES.index("ln"))
    used = sum(math.prod(s) * (2 if p in norms else 1) for name, s, p in shapes if "." in name)
    assert 0 < used <= count_parameters(arch, image_size=image_size)
    assert count_flops(arch, image_size=image_size) > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@fuzz
@given(architectures(), st.data())
def test_a_changed_field_is_valid_or_named(arch, data):
    field = data.draw(st.sampled_from(FIELDS))
    entry = arch.to_dict()
    if field == "genotype" and data.draw(st.booleans()):
        field = data.draw(st.sampled_from(sorted(entry["genotype"])))
        entry["genotype"][field] = data.draw(json_values)
    else:
        entry[field] = data.draw(json_values)
    try:
        changed = Architecture.from_dict(entry)
    except ValueError as error:
        # C, preproc and fc_dim depend on other fields, and are named where they do not fit.
        assert any(f in str(error) for f in (field, "'C'", "preproc", "fc_dim", "genotype"))
    else:
        assert Architecture.from_dict(changed.to_dict()) == changed
        try:
            wire(changed)
        except DisconnectedError:
            assert not is_connected(changed)


@fuzz
@given(json_values)
def test_anything_else_is_no_architecture(data):
    try:
        Architecture.from_dict(data)
    except ValueError as error:
        assert "architecture" in str(error)
    else:
        raise AssertionError(data)


@st.composite
def renamed(draw, arch):
    """The same network: nodes in another order, edges swapped, something unused added."""
    genotype = arch.genotype
    nodes = len(genotype.normal) // 2
    parts = {}
    for which in ("normal", "reduce"):
        edges, concat = getattr(genotype, which), getattr(genotype, which + "_concat")
        pairs = [edges[2 * n : 2 * n + 2] for n in range(nodes)]
        order, waiting = [], list(range(nodes))
        while waiting:
            ready = [n for n in waiting
                     if all(s < 2 or s - 2 in order for _, s in pairs[n])]  # fmt: skip
            order.append(draw(st.sampled_from(ready)))
            waiting.remove(order[-1])
        number = {0: 0, 1: 1, **{old + 2: new + 2 for new, old in enumerate(order)}}
        new_edges = []
        for n in order:
            pair = [(kind, number[s]) for kind, s in pairs[n]]
            new_edges += draw(st.permutations(pair))
        unused = (draw(st.sampled_from(OPERATIONS[1:13])), 0)  # attention would change the stem
        parts[which] = (*new_edges, unused, ("conv_3x3", nodes + 1))
        parts[which + "_concat"] = tuple(draw(st.permutations([number[s] for s in concat])))
    return arch.replace(genotype=Genotype(**parts))


@fuzz
@given(architectures(), st.data())
def test_the_same_network_has_the_same_form(arch, data):
    assert canonical(data.draw(renamed(arch))) == canonical(arch)
