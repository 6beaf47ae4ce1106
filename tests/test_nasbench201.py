"""NAS-Bench-201: its cells, networks, graphs and costs, and search by what methods predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ghn_jax
from ghn_jax.evaluation import nasbench201 as nb
from ghn_jax.evaluation.experiments import nasbench201 as experiment
from ghn_jax.evaluation.experiments import neupred, regression
from ghn_jax.interop.comparison import compare_graphs, labels

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
NONE, SKIP, ONE, THREE, POOL = nb.OPERATIONS
# In the order of edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3.
CELLS = {
    "all convolutions": (THREE,) * 6,
    "all skips": (SKIP,) * 6,
    "all pools": (POOL,) * 6,
    "a chain": (ONE, NONE, THREE, NONE, NONE, POOL),
    "one skip": (NONE, NONE, NONE, SKIP, NONE, NONE),
    "one convolution": (NONE, NONE, NONE, THREE, NONE, NONE),
    "state 1 is zero": (NONE, THREE, POOL, NONE, ONE, SKIP),
    "state 2 is zero": (ONE, NONE, NONE, POOL, SKIP, THREE),
    "state 2 is not read": (ONE, THREE, ONE, SKIP, ONE, NONE),
    "state 1 is not read": (ONE, THREE, NONE, SKIP, NONE, ONE),
    "a state twice": (SKIP, SKIP, SKIP, NONE, NONE, ONE),
    "a state and its double": (SKIP, NONE, SKIP, SKIP, SKIP, SKIP),
    "mixed": (POOL, ONE, SKIP, THREE, NONE, SKIP),
}
DISCONNECTED = (NONE, NONE, THREE, NONE, ONE, SKIP)


def random_cells(n, seed=0):
    rng = np.random.default_rng(seed)
    cells = [tuple(nb.OPERATIONS[i] for i in rng.integers(5, size=6)) for _ in range(2 * n)]
    return [cell for cell in cells if nb.is_connected(cell)][:n]


# --- Cells ----------------------------------------------------------------------------------------


def test_a_cell_string():
    text = "|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|skip_connect~0|none~1|avg_pool_3x3~2|"
    assert nb.parse_cell(text) == (THREE, NONE, ONE, SKIP, NONE, POOL)
    assert nb.format_cell((THREE, NONE, ONE, SKIP, NONE, POOL)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no cell"),
        ("nonsense", "is no cell"),
        ("|none~0|+|none~0|none~1|", "is no cell"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|none~1|", "is no cell"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|none|", "is no cell"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|none~2", "is no cell"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|max_pool~2|", "'max_pool' in .*allowed: none, "),
    ],
)
def test_what_is_no_cell(text, message):
    with pytest.raises(ValueError, match=message):
        nb.parse_cell(text)


def test_connection():
    assert all(nb.is_connected(cell) for cell in CELLS.values())
    assert not nb.is_connected(DISCONNECTED)
    assert not nb.is_connected((NONE,) * 6)
    assert not nb.is_connected((THREE, THREE, THREE, NONE, NONE, NONE))


def test_what_a_cell_computes():
    """Its networks and its graphs follow the same walk, so that is held against the definition."""

    def walk(cell):
        return nb._walk_cell(cell, "x", lambda kind, i, x: f"{kind}{i}({x})", "({}+{})".format)

    assert walk(tuple("abcdef")) == "((d3(x)+e4(a0(x)))+f5((b1(x)+c2(a0(x)))))"
    assert walk(("a", NONE, "c", NONE, "e", "f")) == "(e4(a0(x))+f5(c2(a0(x))))"
    assert walk((NONE, "b", "c", NONE, "e", "f")) == "f5(b1(x))"
    assert walk(DISCONNECTED) is None


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELLS)
def test_graphs_are_those_of_traced_networks(name):
    cell = CELLS[name]
    network = nb.NASBench201(cell, N=2)
    traced, built = ghn_jax.model_graph(network, IMAGES), nb.cell_graph(cell, N=2)
    np.testing.assert_array_equal(traced.primitives, built.primitives)
    np.testing.assert_array_equal(traced.edges, built.edges)
    assert traced.param_shapes == built.param_shapes
    assert traced.names == built.names
    np.testing.assert_array_equal(traced.cells, built.cells)
    assert traced.classifier == built.classifier


def test_a_whole_graph_is_that_of_a_traced_network():
    cell = CELLS["mixed"]
    traced = ghn_jax.model_graph(nb.NASBench201(cell, 100), IMAGES, 1)
    built = nb.cell_graph(cell, 1, num_classes=100)
    labelled = [
        (labels([ghn_jax.PRIMITIVES[p] for p in g.primitives], g.param_shapes), g.edges)
        for g in (traced, built)
    ]
    assert compare_graphs(*labelled)[0] == 0
    assert len(traced.edges) == len(built.edges)


def test_disconnected_cells_have_no_graph():
    with pytest.raises(ghn_jax.DisconnectedError, match=r"none~0\|nor_conv_3x3~1.*is_connected"):
        nb.cell_graph(DISCONNECTED)
    with pytest.raises(ghn_jax.DisconnectedError, match="no path"):
        jax.eval_shape(
            nb.NASBench201(DISCONNECTED).init, jax.random.key(0), jnp.zeros(IMAGES.shape)
        )


def test_costs_are_the_benchmarks():
    # From the benchmark: parameters and millions of multiply-adds, the largest and the smallest.
    assert nb.count_parameters((THREE,) * 6) == 1_531_546
    assert nb.count_flops((THREE,) * 6) / 2e6 == pytest.approx(220.12, abs=0.005)
    assert nb.count_parameters((NONE,) * 6) == 73_306
    assert nb.count_flops((NONE,) * 6) / 2e6 == pytest.approx(7.78, abs=0.005)
    # Where edges lead does not matter.
    assert nb.count_flops((ONE, NONE, NONE, THREE, NONE, NONE)) == nb.count_flops(
        (NONE, THREE, ONE, NONE, NONE, NONE)
    )


@pytest.mark.parametrize("name", ["all convolutions", "mixed"])
def test_costs_are_those_of_the_module(name):
    network = nb.NASBench201(CELLS[name], 7, C=4, N=1)
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert nb.count_parameters(CELLS[name], num_classes=7, C=4, N=1) == count
    graph = nb.cell_graph(CELLS[name], 1, num_classes=7, C=4, N=1)
    # A convolution's size follows from its channels: 4 at 32 pixels, 8 at 16, 16 at 8.
    products = sum(
        np.prod(shape) * (32 * 4 // shape[0]) ** (2 * (len(shape) == 4))
        for shape, p in zip(graph.param_shapes, graph.primitives, strict=True)
        if ghn_jax.PRIMITIVES[p] == "conv"
    )
    assert nb.count_flops(CELLS[name], num_classes=7, C=4, N=1) == 2 * products


def test_what_a_network_computes():
    """A cell by hand: (x + pool(x)), and a mean without the border's zeros."""
    cell = (NONE, NONE, NONE, SKIP, NONE, NONE)
    pooled = (POOL, NONE, NONE, SKIP, SKIP, NONE)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    plain, other = (nb.NASBench201(c, C=4, N=1) for c in (cell, pooled))
    variables = plain.init(jax.random.key(1), images)
    jax.tree.map(np.testing.assert_array_equal, variables, other.init(jax.random.key(1), images))
    states = {}
    for network in (plain, other):
        _, seen = network.apply(
            variables, images, capture_intermediates=lambda m, _: m.name in ("stem_bn", "last_bn",
            "reduction_1_a"), mutable="intermediates",
        )  # fmt: skip
        states[network] = seen["intermediates"]
    x = np.asarray(states[plain]["stem_bn"]["__call__"][0])
    padded = np.pad(np.where(True, x, 0), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=np.nan)
    windows = [padded[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)]
    expected = x + np.nanmean(windows, 0)
    # The convolution that reads the first cell's output: a ReLU before it.
    kernel = variables["params"]["reduction_1_a"]["conv"]["kernel"]
    for network, state in ((plain, x), (other, expected)):
        out = jax.lax.conv_general_dilated(
            np.maximum(state, 0), kernel, (2, 2), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        found = states[network]["reduction_1_a"]["__call__"][0]
        np.testing.assert_allclose(found, out / np.sqrt(1 + 1e-5), rtol=1e-3, atol=1e-5)


def test_parameters_are_predicted_for_them():
    ghn = ghn_jax.GHN(max_shape=(16, 16, 11, 11))
    network = nb.NASBench201(CELLS["mixed"], C=4, N=1)
    predicted, report = ghn_jax.predict_model(ghn, ghn.init_variables(0), network, IMAGES)
    assert not report.notes
    assert network.apply(predicted, jnp.ones((2, 32, 32, 3))).shape == (2, 10)


# --- The table ------------------------------------------------------------------------------------


def test_reading_a_table(tmp_path):
    path = tmp_path / "table.npz"
    cells = np.array([nb.format_cell(c).encode() for c in CELLS.values()])
    accuracy = np.random.default_rng(0).uniform(10, 90, (len(cells), 2)).astype(np.float32)
    columns = np.array([b"cifar10-test", b"cifar10-val"])
    np.savez(path, cell=cells, columns=columns, accuracy=accuracy)
    table = nb.read(path)
    assert [nb.parse_cell(text) for text in table.cells] == [*CELLS.values()]
    assert [*table.accuracy] == ["cifar10-test", "cifar10-val"]
    np.testing.assert_array_equal(table.accuracy["cifar10-val"], accuracy[:, 1])


def test_files_that_are_no_table(tmp_path):
    path = tmp_path / "table.npz"
    good = {
        "cell": np.array(["|a~0|"] * 3), "columns": np.array(["x"]), "accuracy": np.ones((3, 1)),
    }  # fmt: skip

    def message(match, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=match):
            nb.read(path)

    message("lacks accuracy, columns", cell=good["cell"])
    message(r"accuracy has shape \(3, 2\)", **{**good, "accuracy": np.ones((3, 2))})
    message("no percentages", **{**good, "accuracy": np.full((3, 1), np.nan)})
    message("no percentages", **{**good, "accuracy": np.full((3, 1), 101.0)})
    message("no percentages", **{**good, "accuracy": np.array([["a"]] * 3)})
    message("cannot be read", **{**good, "cell": np.array([{}] * 3, object)})
    for contents in (b"", b"nothing", b"PK\x03\x04nothing"):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"is no \.npz file"):
            nb.read(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match="single array"):
        nb.read(path)
    with pytest.raises(FileNotFoundError):
        nb.read(tmp_path / "absent.npz")


# --- Search ---------------------------------------------------------------------------------------


def test_embeddings_of_cells():
    ghn, cells = ghn_jax.GHN(virtual_edges=10), random_cells(3)
    variables = jax.jit(ghn.init)(
        jax.random.key(0), ghn_jax.pad_graphs([nb.cell_graph(cells[0], 10)])
    )
    found = experiment.embed_cells(ghn, variables, cells)
    for cell, embedding in zip(cells, found, strict=True):
        states = np.asarray(ghn.embed(variables, nb.cell_graph(cell, 10)))
        np.testing.assert_allclose(embedding, states.mean(0), rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_grid(monkeypatch):
    grid = {"C": [10, 100], "gamma": ["auto"], "epsilon": [0.1]}
    monkeypatch.setattr(regression, "GRID", grid)


def test_search(small_grid):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4))
    validation = 60 + 8 * x[:, 0]
    test = validation - 1
    features = {"told": x, "rank": validation, "wrong": -validation, "noise": rng.normal(size=120)}
    rows = experiment.search_curve(features, validation, test, (10, 40), 3)
    found = {(row.method, row.size): row for row in rows}
    methods = (*features, experiment.RANDOM, experiment.BEST)
    assert [*found] == [(method, size) for size in (10, 40) for method in methods]
    assert found["rank", 10].tau.mean == pytest.approx(1)
    assert found["wrong", 10].tau.mean == pytest.approx(-1)
    assert abs(found["noise", 40].tau.mean) < 0.2
    assert 0.3 < found["told", 10].tau.mean < found["told", 40].tau.mean
    assert len(found["told", 40].accuracy.taus) == 3
    best = found[experiment.BEST, 40].accuracy.mean
    assert best == test.max()
    assert found["told", 40].accuracy.mean > found[experiment.RANDOM, 10].accuracy.mean
    for seed in range(3):
        drawn = np.random.default_rng(seed).permutation(120)[:10]
        assert found[experiment.RANDOM, 10].accuracy.taus[seed] == test[drawn].max()
        others = np.delete(test, drawn)  # what was measured is not found again
        assert found["rank", 10].accuracy.taus[seed] == others.max()
        assert found["wrong", 10].accuracy.taus[seed] == others.min()


def test_search_with_neupred(monkeypatch):
    cells = random_cells(14)
    graphs = [nb.cell_graph(c, 1, C=4, N=1) for c in cells]
    values = np.array([float(len(g)) for g in graphs])
    calls, fit = [], neupred.fit

    def short(graphs, values, *, seed):
        calls.append((graphs, values, seed))
        return fit(graphs, values, epochs=1, seed=seed)

    monkeypatch.setattr(neupred, "fit", short)
    (row, *_) = experiment.search_curve({"NeuPred": graphs}, values, values, (10,), 2)
    assert [call[2] for call in calls] == [0, 1]
    assert all([len(g) for g in call[0]] == [*call[1]] for call in calls)
    assert row.method == "NeuPred"
    assert np.isfinite(row.tau.taus).all()


def test_what_cannot_be_searched():
    y = np.arange(20.0)
    with pytest.raises(ValueError, match="'a' has 19 networks, validation 20"):
        experiment.search_curve({"a": y[:19]}, y, y)
    with pytest.raises(ValueError, match="20 networks to fit to; allowed: fewer than all 20"):
        experiment.search_curve({"a": y}, y, y, (10, 20))


@pytest.fixture(scope="module")
def table(shared):
    path = shared / "data" / "nasbench201.npz"
    if not path.is_file():
        pytest.skip(f"no table at {path}")
    return nb.read(path)


def test_the_benchmarks_table(table):
    cells = [nb.parse_cell(text) for text in table.cells]
    assert len({*cells}) == 5**6
    # A network whose logits depend on no image guesses.
    accuracy = table.accuracy["cifar10-test"]
    connected = np.array([nb.is_connected(cell) for cell in cells])
    assert (~connected).sum() == 341
    assert accuracy[~connected].max() == 10
    assert accuracy[connected].min() > 25


def test_costs_rank_networks_of_the_benchmark(table):
    flops = np.array([nb.count_flops(nb.parse_cell(text)) for text in table.cells])
    validation, test = table.accuracy["cifar10-val"], table.accuracy["cifar10-test"]
    assert regression.rank_correlation(flops, test) == pytest.approx(0.383, abs=1e-3)
    (row, *_) = experiment.search_curve(
        {"FLOPs": flops[:200]}, validation[:200], test[:200], (10,), 2
    )
    assert 0.2 < row.tau.mean < 0.4
