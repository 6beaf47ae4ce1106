"""Pictures of graphs, training and accuracies: what is drawn is what was given."""

import concurrent.futures
import itertools
import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from ghn_jax.deepnets1m.graph import PRIMITIVES
from ghn_jax.plot import charts, drawing, layout

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GHN_JAX_SHARED", ROOT.parent / "shared"))
SAMPLE = SHARED / "golden" / "deepnets1m"
needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason=f"no sample files at {SAMPLE}; set GHN_JAX_SHARED"
)


def make_graph(names, edges, shapes=None):
    """A graph of named primitives; edges are (source, target) or (source, target, distance)."""
    rows = [(*edge, 1)[:3] for edge in edges]
    return SimpleNamespace(
        primitives=np.array([PRIMITIVES.index(name) for name in names], np.int32),
        edges=np.array(rows, np.int32).reshape(-1, 3),
        param_shapes=[None] * len(names) if shapes is None else shapes,
    )


def small_graph():
    """A residual block with a pooling branch, its nodes not in a topological order."""
    names = ["bias", "input", "conv", "bn", "conv", "max_pool", "sum", "conv"]
    shapes = [(10,), None, (8, 3, 3, 3), (8,), (8, 8, 1, 1), (1, 1, 3, 3), None, (10, 8)]
    real = [(1, 2), (2, 3), (3, 4), (3, 5), (4, 6), (5, 6), (2, 6), (6, 7), (7, 0)]
    virtual = [(1, 3, 2), (1, 6, 2), (2, 7, 2), (3, 6, 2)]
    return make_graph(names, [*real, *virtual], shapes)


def sample_graphs(split, indices):
    """Graphs of the official file format: adjacency [source, target] holds path lengths."""
    name = "train" if split == "train" else "eval"
    meta = json.loads((SAMPLE / f"deepnets1m_{name}_meta.json").read_text())[split]["meta"]
    with h5py.File(SAMPLE / f"deepnets1m_{name}.hdf5") as file:
        for i in indices:
            distance = file[split][str(i)]["adj"][()]
            nodes = file[split][str(i)]["nodes"][()]
            extended = [meta["primitives_ext"][str(row[0])] for row in nodes]
            names = ["conv" if n == "conv_1x1" else n for n in extended]
            shapes = [(3, 16, 1, 1) if n == "conv_1x1" else None for n in extended]
            source, target = np.nonzero(distance)
            edges = np.stack([source, target, distance[source, target]], 1).tolist()
            yield make_graph(names, edges, shapes)


def real_edges(graph):
    return graph.edges[graph.edges[:, 2] == 1, :2]


def lay_out(graph):
    return layout.layout_graph(len(graph.primitives), real_edges(graph))


def markers(figure):
    """{kind: (count, 2) positions} of the markers in a figure."""
    collections = [c for axes in figure.axes for c in axes.collections if c.get_gid()]
    return {c.get_gid().removeprefix("nodes:"): np.asarray(c.get_offsets()) for c in collections}


def traced_edges(placed):
    """The edges that an eye would see: (source, target) joined by the layout's polylines."""

    def key(point):
        return round(float(point[0]), 6), round(float(point[1]), 6)

    follow = {}
    for line in [*placed.curves, *placed.carried]:
        follow.setdefault(key(line[0]), set()).add(key(line[-1]))
    node_at = {key(point): node for node, point in enumerate(placed.positions)}
    edges = set()
    for start, source in node_at.items():
        frontier = list(follow.get(start, ()))
        while frontier:
            point = frontier.pop()
            if point in node_at:
                edges.add((source, node_at[point]))
            else:
                assert follow.get(point), "a line ends nowhere"
                frontier += follow[point]
    return edges


def check_layout(graph):
    placed, edges = lay_out(graph), real_edges(graph)
    source, target = edges.T
    # Layers are longest paths: below every source, and right below one of them.
    assert (placed.layers[target] > placed.layers[source]).all()
    nearest = np.full(len(graph.primitives), -1)
    np.maximum.at(nearest, target, placed.layers[source])
    np.testing.assert_array_equal(placed.layers, nearest + 1)
    # Edges point downwards on the page, or on to a later column.
    same = placed.columns[source] == placed.columns[target]
    assert (placed.positions[target, 1] < placed.positions[source, 1])[same].all()
    assert (placed.columns[target] >= placed.columns[source]).all()
    # Columns do not overlap.
    for column in range(placed.columns.max()):
        left, right = (placed.positions[placed.columns == column + i, 0] for i in (0, 1))
        assert left.max() + 1 < right.min()
    # No marker lies on another.
    away = placed.positions[:, None] - placed.positions
    distance = np.hypot(away[..., 0], away[..., 1]) + 9 * np.eye(len(away))
    assert distance.min() > 0.99
    # Exactly the real edges are drawn.
    assert traced_edges(placed) == {tuple(edge) for edge in edges.tolist()}
    return placed


# --- Layout ---------------------------------------------------------------------------------------


def test_layout_of_the_small_graph():
    placed = check_layout(small_graph())
    assert placed.layers.tolist() == [6, 0, 1, 2, 3, 3, 4, 5]
    assert placed.columns.max() == 0


@needs_sample
def test_layout_of_the_training_sample():
    for graph in sample_graphs("train", range(0, 60, 3)):
        check_layout(graph)


@needs_sample
@pytest.mark.parametrize("split", ["deep", "dense", "bnfree"])
def test_layout_of_the_evaluation_samples(split):
    columns = [check_layout(graph).columns.max() + 1 for graph in sample_graphs(split, range(6))]
    assert max(columns) > 1  # the check above saw lines carried from column to column


@needs_sample
def test_carried_lines_keep_off_the_nodes():
    for graph in sample_graphs("dense", range(6)):
        placed = lay_out(graph)
        for line in placed.carried:
            pieces = np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(line)])
            away = pieces[:, None] - placed.positions
            distance = np.hypot(away[..., 0], away[..., 1])
            ends = (np.abs(placed.positions - line[0]) < 1e-6).all(1)
            ends |= (np.abs(placed.positions - line[-1]) < 1e-6).all(1)
            assert distance[:, ~ends].min(initial=9) > 0.4


def test_a_short_chain_is_one_column_and_a_long_one_a_page():
    chain = [(i, i + 1) for i in range(299)]
    assert layout.layout_graph(25, chain[:24]).columns.max() == 0
    placed = layout.layout_graph(300, chain)
    heights = np.bincount(placed.columns)
    width, height = np.ptp(placed.positions, axis=0)
    assert 0.5 < width / height < 2
    assert heights.min() > 0.7 * heights.max()
    assert len(placed.carried) == len(heights) - 1
    for column in range(len(heights)):  # a chain is drawn straight
        assert np.ptp(placed.positions[placed.columns == column, 0]) < 1e-6


def test_a_chain_stays_straight_beside_its_residual_connections():
    edges = [(i, i + 1) for i in range(20)] + [(i, i + 5) for i in range(0, 20, 5)]
    placed = layout.layout_graph(21, edges)
    assert np.ptp(placed.positions[:, 0]) < 1e-6
    lines = np.concatenate(placed.curves)
    assert np.ptp(lines[:, 0]) > 0.5  # the connections go around the nodes


def test_lines_do_not_cross_where_they_need_not():
    # Two chains listed in opposite orders from layer to layer.
    edges = [(0, 3), (1, 2), (3, 4), (2, 5), (4, 7), (5, 6)]
    placed = layout.layout_graph(8, edges)
    side = np.sign(placed.positions[[0, 3, 4, 7], 0] - placed.positions[[1, 2, 5, 6], 0])
    assert abs(side.sum()) == 4


def test_each_move_undoes_a_crossing():
    tracks = layout._tracks(np.array([0, 0, 1, 1]), np.array([(0, 3), (1, 2)]))
    for move in (layout._Order.swap, lambda order: order.sweep(down=True)):
        order = layout._Order(tracks)
        assert order.crossings() == 9  # two edges of weight 3
        move(order)
        assert order.crossings() == 0


def test_layout_is_deterministic():
    edges = real_edges(small_graph())
    first, again = layout.layout_graph(8, edges), layout.layout_graph(8, edges[::-1])
    np.testing.assert_array_equal(first.positions, again.positions)


@pytest.mark.parametrize(
    ("n", "edges", "message"),
    [
        (0, [], "no nodes"),
        (3, [(0, 3)], "allowed: 0 to 2"),
        (3, [(-1, 2)], "allowed: 0 to 2"),
        (4, [(0, 1), (1, 2), (2, 1), (2, 3)], "cycle"),
        (1, [(0, 0)], "cycle"),
    ],
)
def test_layout_refuses(n, edges, message):
    with pytest.raises(ValueError, match=message):
        layout.layout_graph(n, np.array(edges, int).reshape(-1, 2))


# --- Graphs ---------------------------------------------------------------------------------------


def test_every_marker_of_the_small_graph():
    graph = small_graph()
    drawn = markers(drawing.draw_graph(graph))
    expected = {"bias": 1, "input": 1, "conv": 1, "bn": 1, "conv_1x1": 2, "max_pool": 1, "sum": 1}
    assert {kind: len(at) for kind, at in drawn.items()} == expected
    positions = lay_out(graph).positions
    np.testing.assert_array_equal(drawn["conv"], positions[[2]])
    np.testing.assert_array_equal(drawn["conv_1x1"], positions[[4, 7]])
    np.testing.assert_array_equal(drawn["bias"], positions[[0]])


@needs_sample
@pytest.mark.parametrize(("split", "index"), [("train", 0), ("train", 36), ("dense", 5)])
def test_every_marker_of_real_graphs(split, index):
    (graph,) = sample_graphs(split, [index])
    figure = drawing.draw_graph(graph)
    drawn = markers(figure)
    counts = Counter(PRIMITIVES[p] for p in graph.primitives)
    pointwise = sum(shape is not None for shape in graph.param_shapes)
    assert len(drawn.pop("conv_1x1")) == pointwise > 0
    assert len(drawn["conv"]) == counts.pop("conv") - pointwise
    drawn.pop("conv")
    assert {kind: len(at) for kind, at in drawn.items()} == dict(counts)
    # Everything is on the page: axes limits contain the markers, and the figure the axes.
    (axes,) = figure.axes
    for at in markers(figure).values():
        assert (at[:, 0] > axes.get_xlim()[0]).all() and (at[:, 0] < axes.get_xlim()[1]).all()
        assert (at[:, 1] > axes.get_ylim()[0]).all() and (at[:, 1] < axes.get_ylim()[1]).all()
    figure.canvas.draw()
    (legend,) = figure.legends
    box, text = axes.get_window_extent(), legend.get_window_extent()
    page = figure.bbox
    assert box.x1 <= text.x0 and text.x1 <= page.x1 and page.y0 <= text.y0
    assert page.x0 <= box.x0 and page.y0 <= box.y0 and box.y1 <= page.y1


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("conv", (8, 4, 1, 1), "conv_1x1"),
        ("conv", (8, 4), "conv_1x1"),
        ("conv", (8, 4, 3, 3), "conv"),
        ("conv", (8, 4, 1, 7), "conv"),
        ("conv", None, "conv"),
        ("sep_conv", (8, 1, 1, 1), "sep_conv"),
        ("bias", (8,), "bias"),
        ("pos_enc", (1, 8, 1, 1), "pos_enc"),
    ],
)
def test_only_pointwise_convolutions_are_triangles(name, shape, kind):
    assert list(markers(drawing.draw_graph(make_graph([name], [], [shape])))) == [kind]


def test_pointwise_convolutions_are_blue_triangles():
    figure = drawing.draw_graph(small_graph())
    found = {c.get_gid(): c for c in figure.axes[0].collections if c.get_gid()}
    pointwise, conv = found["nodes:conv_1x1"], found["nodes:conv"]
    assert to_hex(pointwise.get_facecolor()[0]) == to_hex(conv.get_facecolor()[0]) == "#0008ff"
    assert len(pointwise.get_paths()[0].vertices) == 4  # three corners and back
    assert len(conv.get_paths()[0].vertices) > 10  # a circle


def test_every_primitive_has_a_look_of_its_own():
    assert set(drawing.STYLES) == {*PRIMITIVES, "conv_1x1"}
    looks = {(s.color, s.marker) for s in drawing.STYLES.values()}
    assert len(looks) == len(drawing.STYLES)
    assert len({s.label for s in drawing.STYLES.values()}) == len(drawing.STYLES)


@needs_sample
def test_legend_is_sorted_by_frequency_in_the_training_set():
    counts = Counter()
    for graph in sample_graphs("train", range(60)):
        counts.update(PRIMITIVES[p] for p in graph.primitives)
    order = [kind for kind in drawing.STYLES if kind != "conv_1x1"]
    assert order == [name for name, _ in counts.most_common()]


def test_legend_counts_what_is_drawn():
    (legend,) = drawing.draw_graph(small_graph()).legends
    labels = [text.get_text() for text in legend.get_texts()]
    expected = ["conv 1×1, FC (2)", "conv (1)", "BN (1)", "sum (1)", "bias (1)"]
    assert labels == [*expected, "max pool (1)", "input (1)"]
    figure = drawing.draw_graph(small_graph(), legend=False, title="a residual block")
    assert not figure.legends
    assert [text.get_text() for text in figure.texts] == ["a residual block"]


def test_virtual_edges_are_not_drawn():
    graph = small_graph()
    bare = make_graph(["input"] * 8, real_edges(graph).tolist())
    drawn, expected = (drawing.draw_graph(g).axes[0].collections for g in (graph, bare))
    lines = [[p.vertices for c in cs[:2] for p in c.get_paths()] for cs in (drawn, expected)]
    assert len(lines[0]) >= 9
    np.testing.assert_array_equal(*(np.concatenate(paths) for paths in lines))


def test_a_graph_of_one_node():
    assert len(markers(drawing.draw_graph(make_graph(["input"], [])))["input"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"primitives": np.array([0] * 7 + [15])}, "allowed: 0 to 14"),
        ({"param_shapes": [None] * 7}, "8 primitives but 7 param_shapes"),
        ({"primitives": np.zeros(0, int), "param_shapes": []}, "no nodes"),
    ],
)
def test_draw_graph_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        drawing.draw_graph(SimpleNamespace(**{**vars(small_graph()), **change}))


def test_a_thousand_nodes_take_seconds():
    rng = np.random.default_rng(0)
    edges = {(i, i + 1) for i in range(999)}
    edges |= {(i, min(999, i + 2 + int(rng.exponential(8)))) for i in range(0, 990, 3)}
    graph = make_graph([PRIMITIVES[p] for p in rng.integers(0, 15, 1000)], sorted(edges))
    start = time.perf_counter()
    figure = drawing.draw_graph(graph)
    figure.canvas.draw()
    assert time.perf_counter() - start < 15  # about two on one core
    assert sum(len(at) for at in markers(figure).values()) == 1000
    assert max(figure.get_size_inches()) < 45


def test_threads_draw_the_same_pictures_and_pyplot_sees_nothing(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    drawing.draw_graph(small_graph(), paths[0])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: drawing.draw_graph(small_graph(), path), paths[1:]))
    assert len({path.read_bytes() for path in paths}) == 1
    assert plt.get_fignums() == []


# --- Files ----------------------------------------------------------------------------------------


def metrics_file(folder, losses, top1=None):
    path = folder / "metrics.jsonl"
    top1 = [0.5] * len(losses) if top1 is None else top1
    rows = [
        {"step": i, "loss": loss, "top1": accuracy, "seconds": 0.1, "nodes": 9, "compilations": 0}
        for i, (loss, accuracy) in enumerate(zip(losses, top1, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw_each(folder):
    """The three functions, each taking the path to save to."""
    metrics = metrics_file(folder, [2.0, 1.0])
    records = [{"name": "a", "top1": 0.5, "top1_random": 0.1}]
    return [
        lambda path: drawing.draw_graph(small_graph(), path),
        lambda path: charts.training_curve(metrics, path),
        lambda path: charts.accuracy_bars(records, path, chance=0.1),
    ]


@pytest.mark.parametrize("which", range(3))
def test_saves_png_and_pdf(which, tmp_path):
    function = draw_each(tmp_path)[which]
    figure = function(tmp_path / "a.png")
    width, height = figure.get_size_inches() * figure.dpi
    assert plt.imread(tmp_path / "a.png").shape[:2] == (int(height), int(width))
    for name in ("a.pdf", "b.PDF"):
        function(str(tmp_path / name))
        assert (tmp_path / name).read_bytes()[:5] == b"%PDF-"
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.PDF").read_bytes()


@pytest.mark.parametrize(
    "function", [drawing.draw_graph, charts.training_curve, charts.accuracy_bars]
)
def test_bad_paths_are_refused_before_drawing(function, tmp_path):
    unusable = None  # not even looked at
    for name in ("a.jpg", "a"):
        with pytest.raises(ValueError, match=r"allowed suffixes: \.png, \.pdf"):
            function(unusable, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.*does not exist"):
        function(unusable, tmp_path / "missing" / "a.png")
    assert not list(tmp_path.iterdir())


# --- Training -------------------------------------------------------------------------------------


def curves(figure):
    """{(panel, gid): (x, y)} of the lines of the two panels."""
    panels = zip(("loss", "top1"), figure.axes, strict=True)
    return {(p, line.get_gid()): line.get_data() for p, axes in panels for line in axes.lines}


@pytest.mark.parametrize("failure", [None, math.nan, math.inf])
def test_curve_skips_a_failed_step(failure, tmp_path):
    losses = [4.0, 3.0, failure, 2.0, 1.0]
    path = metrics_file(tmp_path, losses, [0.1, 0.2, 0.9, 0.3, 0.4])
    lines = curves(charts.training_curve(path))
    assert {key for key in lines} == {
        ("loss", "raw"),
        ("loss", "mean"),
        ("loss", "failed"),
        ("top1", "raw"),
        ("top1", "mean"),
    }
    for panel, expected in (("loss", [4, 3, np.nan, 2, 1]), ("top1", [0.1, 0.2, np.nan, 0.3, 0.4])):
        x, y = lines[panel, "raw"]
        np.testing.assert_array_equal(x, range(5))
        np.testing.assert_allclose(y, expected)
    np.testing.assert_array_equal(lines["loss", "failed"][0], [2])


def test_the_mean_runs_over_the_last_fiftieth(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.uniform(1, 2, 200).tolist()
    losses[100] = None
    _, mean = curves(charts.training_curve(metrics_file(tmp_path, losses)))["loss", "mean"]
    finite = np.array(losses, float)
    expected = [np.nanmean(finite[max(0, i - 3) : i + 1]) for i in range(200)]
    np.testing.assert_allclose(mean, expected)


def test_a_run_of_failures_leaves_a_gap(tmp_path):
    losses = [1.0] * 3 + [None] * 5 + [1.0] * 3
    _, mean = curves(charts.training_curve(metrics_file(tmp_path, losses)))["loss", "mean"]
    np.testing.assert_array_equal(np.isnan(mean), [loss is None for loss in losses])
    charts.training_curve(metrics_file(tmp_path, [None, None]), tmp_path / "nothing.png")


def test_without_failures_none_are_marked(tmp_path):
    figure = charts.training_curve(metrics_file(tmp_path, [2.0, 1.0]))
    assert ("loss", "failed") not in curves(figure)
    assert figure.axes[0].get_yscale() == "linear"


def test_a_loss_that_blows_up_is_on_a_logarithmic_axis(tmp_path):
    figure = charts.training_curve(metrics_file(tmp_path, [2.0, 1.5, 900.0, 1.0]))
    assert figure.axes[0].get_yscale() == "log"


def test_repeated_steps_count_once(tmp_path):
    path = metrics_file(tmp_path, [4.0, 3.0, 2.0])
    with path.open("a") as file:  # the run resumed from step 1
        file.write('{"step": 1, "loss": 2.5, "top1": 0.3}\n\n{"step": 2, "loss": 1')
    x, y = curves(charts.training_curve(path))["loss", "raw"]
    np.testing.assert_array_equal(x, [0, 1, 2])
    np.testing.assert_array_equal(y, [4, 2.5, 2])


@pytest.mark.parametrize(
    "line", ["{", '{"step": 3, "loss": 1.0}', "[]", '{"step": null, "loss": 1, "top1": 1}']
)
def test_curve_names_the_broken_line(line, tmp_path):
    path = metrics_file(tmp_path, [4.0, 3.0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3"):
        charts.training_curve(path)


def test_curve_refuses_an_empty_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        charts.training_curve(metrics_file(tmp_path, []))
    with pytest.raises(FileNotFoundError):
        charts.training_curve(tmp_path / "other.jsonl")


# --- Accuracy -------------------------------------------------------------------------------------

RECORDS = [
    {"name": "middle", "top1": 0.4, "top1_random": 0.12},
    {"name": "worst", "top1": 0.2, "top1_random": 0.25},
    {"name": "best", "top1": 0.6, "top1_random": 0.08},
]


def test_bars_are_sorted_and_side_by_side():
    figure = charts.accuracy_bars(RECORDS, chance=0.1)
    (axes,) = figure.axes
    predicted, random = axes.containers
    assert (predicted.get_label(), random.get_label()) == ("predicted", "random (He)")
    assert [bar.get_width() for bar in predicted] == [0.6, 0.4, 0.2]
    assert [bar.get_width() for bar in random] == [0.08, 0.12, 0.25]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["best", "middle", "worst"]
    low, high = axes.get_ylim()
    assert low > high  # the first bar is at the top
    for one, other in zip(predicted, random, strict=True):
        assert one.get_y() + one.get_height() == pytest.approx(other.get_y())


def test_bars_have_mean_and_chance_lines():
    (axes,) = charts.accuracy_bars(RECORDS, chance=0.1).axes
    lines = {line.get_gid(): line.get_xdata()[0] for line in axes.lines}
    assert lines == pytest.approx({"mean:predicted": 0.4, "mean:random (He)": 0.15, "chance": 0.1})
    (axes,) = charts.accuracy_bars(RECORDS).axes
    assert "chance" not in {line.get_gid() for line in axes.lines}


def test_many_networks_fit_a_page():
    rng = np.random.default_rng(0)
    records = [
        {"name": f"net {i}", "top1": t, "top1_random": r}
        for i, (t, r) in enumerate(rng.uniform(0, 1, (500, 2)))
    ]
    figure = charts.accuracy_bars(records)
    assert max(figure.get_size_inches()) < 20
    assert [len(bars) for bars in figure.axes[0].containers] == [500, 500]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records"),
        ([{"name": "a", "top1": 0.5}], "record 0 lacks top1_random"),
        ([{"name": "a", "top1": 53.0, "top1_random": 0.1}], "top1 of 'a' is 53.0; allowed"),
        ([{"name": "a", "top1": 0.5, "top1_random": math.nan}], "top1_random of 'a' is nan"),
        ([{"name": "a", "top1": None, "top1_random": 0.1}], "top1 of 'a' is None"),
    ],
)
def test_bars_refuse(records, message):
    with pytest.raises(ValueError, match=message):
        charts.accuracy_bars(records)


def test_bars_refuse_a_chance_in_percent():
    with pytest.raises(ValueError, match="chance is 10"):
        charts.accuracy_bars(RECORDS, chance=10)
