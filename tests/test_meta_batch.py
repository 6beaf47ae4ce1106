"""Meta-batches: padded graphs, the stream that they come from, how many networks run at once."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from ghn_jax.deepnets1m.sampling import RULES, sample_architecture
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.training.mesh import networks_at_once
from ghn_jax.training.meta_batch import Stream, make_meta_batch

GHN_ = GHN(max_shape=(16, 16, 11, 11), virtual_includes_real=True)
SIZE = 16
RULES_ = dataclasses.replace(
    RULES["train"], widths=(8,), fc_dims=(16,), n_cells=(3, 4), nodes=(1, 1), deep_nodes=1
)
ARCHITECTURES = [sample_architecture("train", 7, i, rules=RULES_) for i in range(8)]


def meta_batch(architectures, **options):
    return make_meta_batch(GHN_, architectures, image_size=SIZE, **options)


def test_padded_graphs_have_the_room_that_was_asked_for():
    """Static sizes do not depend on the architectures, up to that room."""
    few, many = ARCHITECTURES[:2], ARCHITECTURES[3:5]

    def size(architectures, graph_nodes):
        return len(meta_batch(architectures, graph_nodes=graph_nodes).graph.nodes["primitive"])

    assert [size(a, 128) for a in (few, many)] == [256, 256]
    nodes = meta_batch(ARCHITECTURES[:2]).nodes
    assert nodes < size(few, 8) < 4 * nodes


def test_padded_sweeps_do_every_step_of_the_graphs():
    batch = meta_batch(ARCHITECTURES[:4])
    whole = pad_graphs([GHN_.graph(arch, image_size=SIZE) for arch in ARCHITECTURES[:4]])
    for name, rows in batch.graph.globals.items():
        assert len(rows) % 64 == 0
        n_node, before = len(batch.graph.nodes["primitive"]), len(whole.nodes["primitive"])
        kept, all_ = (
            r[(r < n).any(1)]
            for r, n in ((rows, n_node), (np.asarray(whole.globals[name]), before))
        )
        np.testing.assert_array_equal(np.where(kept < n_node, kept, -1),
                                      np.where(all_ < before, all_, -1))  # fmt: skip


def test_a_stream_goes_on_where_it_stopped():
    def architecture(position):
        return ARCHITECTURES[position % 8]

    stream = Stream(GHN_, architecture, size=3, image_size=SIZE, max_nodes=10_000)
    batches = stream.batches(0)
    first, second = next(batches), next(batches)
    assert first.architectures == tuple(ARCHITECTURES[:3])
    assert (first.position, second.position) == (3, 6)
    again = next(stream.batches(first.position))
    assert again.architectures == second.architectures
    jax.tree.map(np.testing.assert_array_equal, again.graph, second.graph)


def test_large_meta_batches_are_passed_over():
    sizes = [len(GHN_.graph(arch, image_size=SIZE)) for arch in ARCHITECTURES]
    limit = sorted(sizes)[4]
    stream = Stream(GHN_, lambda i: ARCHITECTURES[i % 8], size=1, image_size=SIZE, max_nodes=limit)
    batches = stream.batches(0)
    found = [next(batches) for _ in range(5)]
    assert [b.nodes for b in found] == [n for n in [*sizes, *sizes] if n <= limit][:5]


@pytest.mark.parametrize(
    "workers, devices, platform, expected",
    [
        (None, 1, "cpu", 2),
        (None, 1, "gpu", 4),
        (3, 1, "gpu", 3),
        (None, 2, "gpu", 1),
        (3, 2, "cpu", 1),
    ],
)
def test_how_many_networks_run_at_once(workers, devices, platform, expected):
    row = np.array([[types.SimpleNamespace(platform=platform)] * devices])
    mesh = types.SimpleNamespace(shape={"arch": 1, "data": devices}, devices=row)
    assert networks_at_once(workers, mesh) == expected
