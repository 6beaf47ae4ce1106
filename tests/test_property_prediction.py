"""Properties predicted from embeddings: regression, the baseline, embeddings of many networks."""

import jax
import numpy as np
import pytest
from scipy.stats import kendalltau

import ghn_jax
from ghn_jax.deepnets1m.graph import build_graph
from ghn_jax.evaluation.experiments import neupred, properties, regression
from ghn_jax.evaluation.nasbench201 import OPERATIONS, cell_graph
from ghn_jax.hypernet import embedding
from ghn_jax.hypernet.embedding import embed_graphs
from ghn_jax.hypernet.padding import pad_graphs
from ghn_jax.plot.experiments import correlation_matrix, property_bars


@pytest.fixture(scope="module")
def architectures():
    """The smallest networks of two sets, which are soon compiled."""
    sizes = {a: len(build_graph(a, 1)) for a in ghn_jax.evaluation_set("val")[:100]}
    return sorted(sizes, key=sizes.get)[:24]


POOL = ghn_jax.PRIMITIVES.index("avg_pool")
CELLS = [
    tuple(OPERATIONS[i] for i in np.random.default_rng(seed).integers(1, 5, size=6))
    for seed in range(24)
]


@pytest.fixture(scope="module")
def graphs():
    """Small ones."""
    return [cell_graph(cell, 1, C=4, N=1) for cell in CELLS]


def encoder(make):
    """A hypernetwork and variables without decoders, which take longest to compile."""
    ghn = make()
    graph = cell_graph(CELLS[0], ghn.virtual_edges, C=4, N=1)
    return ghn, jax.jit(ghn.init)(jax.random.key(0), pad_graphs([graph]))


@pytest.fixture
def small_grid(monkeypatch):
    grid = {"C": [10, 100], "gamma": ["auto", 0.1], "epsilon": [0.1]}
    monkeypatch.setattr(regression, "GRID", grid)


# --- Regression -----------------------------------------------------------------------------------


def embeddings(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 8))


def test_a_property_that_embeddings_tell(small_grid):
    x = embeddings(160)
    y = 20 * np.tanh(x[:, 0]) + 3 * x[:, 1] + 50
    result = regression.predict_property(x[:100], y[:100], x[100:], y[100:], rounded=False)
    assert result.mean > 0.8
    assert len(result.taus) == 5
    assert result.mean == pytest.approx(np.mean(result.taus))
    assert result.std == pytest.approx(np.std(result.taus))
    rounded = regression.predict_property(x[:100], y[:100], x[100:], y[100:], rounded=True)
    predicted = regression.fit(x[:100], y[:100], np.arange(100)).predict(x[100:])
    for found, last in ((result, predicted), (rounded, np.round(predicted))):
        assert found.taus[-1] == regression.rank_correlation(last, y[100:])
    assert rounded.taus[-1] != result.taus[-1]


def test_a_property_that_embeddings_do_not_tell(small_grid):
    x, y = embeddings(160), np.random.default_rng(1).normal(50, 10, 160)
    result = regression.predict_property(x[:100], y[:100], x[100:], y[100:], rounded=True)
    assert abs(result.mean) < 0.2


def test_the_best_parameters_of_the_grid_are_found(monkeypatch):
    monkeypatch.setattr(
        regression, "GRID", {"C": [1e-6, 100], "gamma": [1e-6, 0.1], "epsilon": [0.1, 500]}
    )
    x = embeddings(60)
    found = regression.fit(x, 30 * x[:, 0], np.arange(60))
    assert (found.C, found.gamma, found.epsilon) == (100, 0.1, 0.1)
    assert found.kernel == "rbf"
    assert found.shape_fit_ == x.shape  # fitted to all, not to four folds


def test_the_permutation_decides_on_folds(monkeypatch):
    """In order, each fold holds out a range of its own, which a narrow kernel knows nothing of."""
    monkeypatch.setattr(regression, "GRID", {"C": [100], "gamma": [0.01, 5], "epsilon": [0.1]})
    x = np.linspace(0, 10, 50)[:, None]
    y = 10 * x[:, 0] + 10 * np.sin(3 * x[:, 0])
    mixed = regression.fit(x, y, regression.permutation(50, 0))
    in_order = regression.fit(x, y, regression.permutation(50, None))
    assert (mixed.gamma, in_order.gamma) == (5, 0.01)


def test_permutations_are_the_authors():
    np.random.seed(3)
    np.testing.assert_array_equal(regression.permutation(20, 3), np.random.permutation(20))
    np.testing.assert_array_equal(regression.permutation(4, None), range(4))


def test_kendalls_tau_with_ties():
    a, b = np.array([1, 2, 2, 3, 5, 5, 4]), np.array([1, 2, 3, 3, 4, 4, 4])
    # Of 21 pairs: 16 in the same order, none in the other; 2 ties of a, 4 of b, one in both.
    expected = 16 / np.sqrt((21 - 2) * (21 - 4))
    assert regression.rank_correlation(a, b) == pytest.approx(expected)
    assert regression.rank_correlation(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert regression.rank_correlation(a, -b) == pytest.approx(-expected)
    assert regression.rank_correlation(a, np.ones(7)) == 0


def test_correlations_between_properties():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    matrix = regression.correlations({"a": a, "-a": -a, "b": b})
    np.testing.assert_allclose(np.diag(matrix), 1)
    np.testing.assert_allclose(matrix, matrix.T)
    assert matrix[0, 1] == pytest.approx(-1)
    assert matrix[0, 2] == pytest.approx(kendalltau(a, b).statistic)


def test_what_cannot_be_fitted():
    x = embeddings(20)
    y = x[:, 0].copy()
    with pytest.raises(ValueError, match="9 networks to fit; allowed: 10 or more"):
        regression.fit(x[:9], y[:9], np.arange(9))
    with pytest.raises(ValueError, match="do not go together"):
        regression.fit(x, y[:19], np.arange(20))
    y[3] = np.nan
    with pytest.raises(ValueError, match="1 of the values are not finite"):
        regression.fit(x, y, np.arange(20))
    with pytest.raises(ValueError, match="not finite"):
        regression.rank_correlation(y, y)


# --- NeuPred --------------------------------------------------------------------------------------


def dense_network(params, graph):
    """The network on one graph, written out with a matrix of edges."""
    n = len(graph)
    adjacency = np.eye(n)
    for source, target, distance in graph.edges:
        if distance == 1:
            adjacency[source, target] = 1
    forward = adjacency / adjacency.sum(1, keepdims=True)
    backward = forward.T / forward.T.sum(1, keepdims=True)
    x = np.eye(15)[graph.primitives]
    for i in range(3):
        layer = params[f"gcn_{i}"]
        x = sum(
            np.maximum(matrix @ x @ layer[name], 0) / 2
            for name, matrix in (("forward", forward), ("backward", backward))
        )
    return (x.mean(0) @ params["fc1"]["kernel"] @ params["fc2"]["kernel"]).item()


@pytest.fixture(scope="module")
def fitted(graphs):
    values = np.array([100 * np.mean(g.primitives == POOL) + len(g) / 5 for g in graphs[:20]])
    return values, neupred.fit(graphs[:20], values, epochs=40, learning_rate=5e-3)


def test_neupred_overfits(graphs, fitted):
    values, found = fitted
    predicted = found.predict(graphs[:20])
    assert regression.rank_correlation(predicted, values) > 0.7
    assert np.sqrt(np.mean((predicted - values) ** 2)) < 0.4 * values.std()


def test_neupred_is_its_definition_and_padding_does_nothing(graphs, fitted):
    values, found = fitted
    expected = [dense_network(found.params, g) * values.std() + values.mean() for g in graphs]
    np.testing.assert_allclose(found.predict(graphs), expected, rtol=1e-4)
    for i in (0, 23):
        np.testing.assert_allclose(found.predict(graphs[i : i + 1]), expected[i : i + 1], rtol=1e-4)


def test_neupred_sees_real_edges_only(graphs, fitted):
    virtual = [cell_graph(cell, 50, C=4, N=1) for cell in CELLS[:3]]
    assert len(virtual[0].edges) > len(graphs[0].edges)
    np.testing.assert_array_equal(fitted[1].predict(virtual), fitted[1].predict(graphs[:3]))


def test_neupreds_parameters(fitted):
    shapes = jax.tree.map(np.shape, fitted[1].params)
    both = {"forward": (144, 144), "backward": (144, 144)}
    assert shapes == {
        "gcn_0": {"forward": (15, 144), "backward": (15, 144)},
        "gcn_1": both,
        "gcn_2": both,
        "fc1": {"kernel": (144, 128)},
        "fc2": {"kernel": (128, 1)},
    }


def test_neupred_depends_on_its_seed_alone(graphs):
    values = np.arange(12.0)
    a, b, c = (neupred.fit(graphs[:12], values, epochs=1, seed=s) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    # One update changes numbers by 1e-4: they start elsewhere.
    assert np.abs(a.params["fc1"]["kernel"] - c.params["fc1"]["kernel"]).max() > 0.01


def test_neupreds_updates(graphs, monkeypatch):
    """Ten graphs an update, what is left over left out; the rate falls as a cosine; dropout."""
    calls, update = [], neupred._update

    def note(params, opt_state, key, batch, targets, rate):
        calls.append((batch.n_node.copy(), targets.copy(), float(rate), key))
        return update(params, opt_state, key, batch, targets, rate)

    monkeypatch.setattr(neupred, "_update", note)
    values = np.arange(24.0)
    neupred.fit(graphs, values, epochs=4, learning_rate=1.0)
    assert len(calls) == 8
    rates = [(1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in (0, 0, 1, 1, 2, 2, 3, 3)]
    np.testing.assert_allclose([call[2] for call in calls], rates, rtol=1e-6)
    drawn = [np.concatenate([a[1], b[1]]) for a, b in zip(calls[::2], calls[1::2], strict=True)]
    for targets in drawn:
        ranks = np.round(targets * values.std() + values.mean()).astype(int)
        assert len({*ranks}) == 20
    assert not np.array_equal(drawn[0], drawn[1])
    n_node = [
        len(graphs[i]) for i in np.round(calls[0][1] * values.std() + values.mean()).astype(int)
    ]
    np.testing.assert_array_equal(calls[0][0], n_node)
    assert len({jax.random.key_data(call[3]).tobytes() for call in calls}) == 8


def test_neupreds_optimizer_is_pytorchs_adam_with_weight_decay():
    params = {"w": np.array([3.0, -2.0], np.float32)}
    gradients = np.array([[0.1, -0.2], [0.3, 0.1]], np.float32)
    state = neupred._OPTIMIZER.init(params)
    p, m, v = params["w"].copy(), 0, 0
    for step, gradient in enumerate(gradients, 1):
        changes, state = neupred._OPTIMIZER.update({"w": gradient}, state, {"w": p})
        g = gradient + 1e-3 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(changes["w"], expected, rtol=1e-4)
        p = p - 0.1 * expected


def test_what_neupred_cannot_fit(graphs):
    with pytest.raises(ValueError, match="9 graphs and values of shape"):
        neupred.fit(graphs[:9], np.arange(9.0))
    with pytest.raises(ValueError, match="12 graphs and values of shape"):
        neupred.fit(graphs[:12], np.arange(11.0))
    with pytest.raises(ValueError, match="1 of the values are not finite"):
        neupred.fit(graphs[:12], np.r_[np.inf, np.arange(11.0)])


# --- Embeddings -----------------------------------------------------------------------------------


def test_embeddings_of_many_are_those_of_each(architectures, monkeypatch):
    monkeypatch.setattr(embedding, "WINDOW", 2)  # batches: windows of 4 graphs and of 1
    ghn, variables = encoder(ghn_jax.GHN)
    some = [ghn.graph(a) for a in architectures[:5]]
    order = np.random.default_rng(0).permutation(5)
    together = embed_graphs(ghn, variables, (some[i] for i in order), batch_size=2)
    one_by_one = [np.asarray(ghn.embed(variables, some[i])).mean(0) for i in order]
    assert together.shape == (5, 32)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-5)
    assert np.ptp(together, axis=0).max() > 1e-2
    assert embed_graphs(ghn, variables, []).shape == (0, 32)


def test_batches_of_accelerators(architectures, monkeypatch):
    """They compute the graphs of a batch at once."""
    ghn, variables = encoder(ghn_jax.GHN)
    some = [ghn.graph(a) for a in architectures[:3]]
    expected = embed_graphs(ghn, variables, some, batch_size=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    embedding._means.clear_cache()
    found = embed_graphs(ghn, variables, some, batch_size=4)
    embedding._means.clear_cache()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# --- All properties -------------------------------------------------------------------------------


def record(architecture):
    nodes = len(build_graph(architecture, 1))
    return {
        "architecture": architecture.to_dict(),
        "final_val_top1": nodes / 200,
        "val_top1_noise": 0.9 - nodes / 200,
        "inference_seconds": 1e-3 * nodes,
        "convergence": nodes / 100,
    }


GRID = {"C": [10, 100], "gamma": ["auto"], "epsilon": [0.1]}


@pytest.fixture(scope="module")
def results(architectures):
    records = [record(a) for a in architectures]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "GRID", GRID)
        arguments = records[::2], records[1::2], {"GHN-1": encoder(ghn_jax.ghn1)}
        found = list(properties.predict_properties(*arguments, neupred_runs=2, neupred_epochs=1))
        # One that is known is left out; the others are the same without it.
        known = {r["name"] for r in found} - {found[1]["name"], found[-1]["name"]}
        again = properties.predict_properties(
            *arguments, neupred_runs=2, neupred_epochs=1, known=known
        )
        assert list(again) == [found[1], found[-1]]
        return properties.summarise(found)


def test_a_property_that_all_networks_share_is_not_ranked(architectures, monkeypatch):
    monkeypatch.setattr(regression, "GRID", GRID)
    records = [{**record(a), "convergence": 2.0} for a in architectures]
    ghns = {"GHN-1": encoder(ghn_jax.ghn1)}
    found = properties.predict_properties(records[::2], records[1::2], ghns, neupred_runs=0)
    results = properties.summarise(found)
    assert len(results) == 3
    assert properties.table(results).endswith("| convergence time | – |\n")


def test_properties(results, architectures, monkeypatch):
    monkeypatch.setattr(regression, "GRID", GRID)
    rows = {(r["property"], r["method"]): r for r in results}
    names = ["clean accuracy", "noisy accuracy", "inference time", "convergence time"]
    assert [*rows] == [(name, method) for name in names for method in ("GHN-1", "NeuPred")]
    ghn, variables = encoder(ghn_jax.ghn1)
    x = embed_graphs(ghn, variables, map(ghn.graph, architectures))
    graphs = [build_graph(a, 1) for a in architectures]
    nodes = np.array([len(g) for g in graphs])
    values = [nodes / 2, 90 - nodes / 2, 10 * nodes / nodes[::2].mean(), nodes / 100]
    for name, y, rounded in zip(names, values, (True, True, True, False), strict=True):
        expected = regression.predict_property(x[::2], y[::2], x[1::2], y[1::2], rounded)
        row = rows[name, "GHN-1"]
        np.testing.assert_allclose(row["taus"], expected.taus)
        assert (row["mean"], row["std"]) == pytest.approx((expected.mean, expected.std))
        row = rows[name, "NeuPred"]
        for seed in range(2):
            predicted = neupred.fit(graphs[::2], y[::2], epochs=1, seed=seed).predict(graphs[1::2])
            predicted = np.round(predicted) if rounded else predicted
            tau = regression.rank_correlation(predicted, y[1::2])
            assert row["taus"][seed] == pytest.approx(tau)


def test_seconds_do_not_depend_on_the_device():
    inference = properties.PROPERTIES[2]
    seconds = np.random.default_rng(0).uniform(1, 2, 10)
    for scale in (1e-3, 1e3):
        fit_y, test_y = properties._targets(inference, scale * seconds, scale * seconds[:3])
        np.testing.assert_allclose(fit_y, 10 * seconds / seconds.mean())
        np.testing.assert_allclose(test_y, fit_y[:3])


def test_values_of_records(architectures):
    records = [record(a) for a in architectures[:3]]
    values = properties.property_values(records)
    assert values["clean accuracy"][0] == pytest.approx(100 * records[0]["final_val_top1"])
    assert values["convergence time"][0] == records[0]["convergence"]
    with pytest.raises(ValueError, match=r"final_val_top1 of record 1 is 87.0; allowed: 0 to 1"):
        properties.property_values([records[0], {**records[1], "final_val_top1": 87.0}])
    with pytest.raises(ValueError, match="convergence of record 0 is None"):
        properties.property_values([{**records[0], "convergence": None}])
    with pytest.raises(ValueError, match="inference_seconds of record 0 is nan"):
        properties.property_values([{**records[0], "inference_seconds": float("nan")}])
    with pytest.raises(ValueError, match="no records"):
        properties.property_values([])


def test_table(results):
    lines = properties.table(results).splitlines()
    assert lines[0] == "| property | GHN-1 | NeuPred |"
    assert lines[1] == "|---|---|---|"
    first = results[0]
    assert lines[2].startswith(f"| clean accuracy | {first['mean']:.3f} ± {first['std']:.3f} | ")
    assert len(lines) == 6
    assert "| – |" in properties.table([*results[:1], *results[3:4]])


def test_figures(results, tmp_path):
    axes = property_bars(results, tmp_path / "a.png").axes[0]
    bars = {bar.get_label(): [b.get_height() for b in bar] for bar in axes.containers
            if hasattr(bar, "patches")}  # fmt: skip
    assert bars == {
        m: [r["mean"] for r in results if r["method"] == m] for m in ("GHN-1", "NeuPred")
    }
    assert [t.get_text() for t in axes.get_xticklabels()][0] == "clean accuracy"
    columns = {"a": np.arange(5.0), "b": -np.arange(5.0), "all the same": np.ones(5)}
    taus = regression.correlations(columns)
    axes = correlation_matrix(taus, list(columns), tmp_path / "b.pdf").axes[0]
    said = [t.get_text() for t in axes.texts]
    assert said == ["1.00", "-1.00", "–", "-1.00", "1.00", "–", "–", "–", "–"]
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.pdf").stat().st_size > 1000
    with pytest.raises(ValueError, match="no results"):
        property_bars([])
    with pytest.raises(ValueError, match="allowed suffixes"):
        correlation_matrix(taus, ["a", "b"], tmp_path / "c.txt")
