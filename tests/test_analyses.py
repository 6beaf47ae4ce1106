"""The analyses of §§ B.2, C.2.2, C.4 and E: their smallest form, and what they refuse."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import ghn_jax
from ghn_jax.cli import paper
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.evaluation.activations import LayerStatistics
from ghn_jax.evaluation.experiments import (
    activations,
    convergence,
    generalisation,
    meta_batches,
    training_speed,
)
from ghn_jax.evaluation.experiments.records import Records, read_records
from ghn_jax.hypernet.checkpoint import Checkpoints, ghn_config, save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.plot.convergence import convergence_figure, meta_batch_figure
from ghn_jax.plot.figure import method_colors
from ghn_jax.plot.generalisation import generalisation_figure

EDGES = (("conv_1x1", 0), ("skip_connect", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), n_cells=1, C=8, fc_layers=1)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A GHN-1, whose programs all experiments here share."""
    folder = tmp_path_factory.mktemp("ghn") / "one"
    ghn = ghn_jax.ghn1(max_shape=(16, 16, 7, 7))
    save_ghn(folder, ghn, ghn.init_variables(5))
    return folder


@pytest.fixture
def small(monkeypatch):
    """The network that is asked for by name is a small one."""
    for experiment in (activations, convergence):
        monkeypatch.setattr(experiment, "by_name", lambda *_: [("small", SMALL)])


# --- Activations ----------------------------------------------------------------------------------


def test_claims_about_activations():
    def layers(*variances):
        return [LayerStatistics("x", "Conv", 0, v, 0, 0) for v in variances]

    curves = {
        activations.HE: layers(1, 2), activations.SGD: layers(0.1, 0.2),
        "a, begin": layers(1.9, 1.1), "a, trained": layers(0.3, 0.7),
        "b, begin": layers(0.1, 0.1), "b, trained": layers(1, 50),
    }  # fmt: skip
    normalises = {"a, begin": True, "a, trained": True, "b, begin": False, "b, trained": False}
    text = activations.claims(curves, normalises)
    assert text.count(": holds (") == 4
    assert "b, trained: activations explode: holds (the largest variance is 25 times He's)" in text
    worse = {
        **curves, "a, begin": layers(2.1, 2), "a, trained": layers(0.05, 0.1),
        "b, begin": layers(1, 1), "b, trained": layers(3, 3),
    }  # fmt: skip
    text = activations.claims(worse, normalises)
    assert text.count(": does not hold (") == 4
    assert "a, begin: activations are those of He initialisation: does not hold (up to 2.1" in text
    nan = activations.claims({**curves, "b, trained": layers(1, math.nan)}, normalises)
    assert "explode: holds (the largest variance is nan" in nan


def test_activations(one, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["activations", "--quick", "--image-size", "16", "--layers", "3",
                 "--ghn", str(one), "--out", str(out)]  # fmt: skip
    paper.main(arguments)
    text = (out / "table.md").read_text()
    records = read_records(out)
    assert list(records) == ["SGD, begin (He)", "one, begin", "one, trained"]
    # The beginning is another hypernetwork than the end: seed 0, not 5.
    begin, trained = (records[f"one, {part}"]["layers"] for part in ("begin", "trained"))
    assert begin[0]["variance"] != trained[0]["variance"]
    assert [layer["layer"] for layer in begin] == [layer["layer"] for layer in trained]
    assert "| one, trained | 3 |" in text and "| GHN-1, trained, the paper | 18 | – |" in text
    assert "one, begin: activations are small: holds" in text and text in capsys.readouterr().out
    for name in ("activations.png", "activations_before_norm.png"):
        assert (out / name).stat().st_size > 10_000
    # Nothing is computed again.
    monkeypatch.setattr(activations, "predict_network", None)
    paper.main(arguments)
    for more, message in (
        (["--layers", "0"], "--layers is 0"), (["--seed", "3"], r"seed 0 \(now 3\)"),
        (["--trained", str(tmp_path)], "make it with ghn-paper trained-networks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *more])


@pytest.mark.parametrize("training, seed, identity", [
    ({"run": {"seed": 7}}, 7, 0), ({"seed": 7, "identity": 2.0}, 7, 2), (None, 3, 0),
])  # fmt: skip
def test_where_a_run_began(tmp_path, training, seed, identity):
    described = {"ghn": {}} | ({} if training is None else {"training": training})
    (tmp_path / "config.json").write_text(json.dumps(described))
    ghn = GHN(max_shape=(8, 8, 3, 3), features=8)
    start = activations._start(tmp_path, 3)
    found = activations._begin(ghn, *start)["params"]
    expected = ghn.init_variables(seed)["params"]
    bias = found["decoder"]["conv_1"].pop("bias") - expected["decoder"]["conv_1"].pop("bias")
    np.testing.assert_allclose(bias.reshape(8, 8), identity * np.eye(8), atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, expected))


def test_a_beginning_that_is_not_told_is_left_out(tmp_path, capsys):
    """Of a name, and of a run that went on from another hypernetwork."""
    ghn, _ = ghn_jax.from_pretrained("ghn2-cifar10-small")
    described = {"ghn": ghn_config(ghn), "training": {"init": "runs/first"}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    sources = (Path("ghn2-cifar10-small"), tmp_path)
    loaded = {source.name: (ghn, {}) for source in sources}
    found = activations._hypernetworks(activations.Config(ghn=sources), loaded, 10)
    assert list(found) == [f"{source.name}, trained" for source in sources]
    assert capsys.readouterr().out.count("does not tell where its training began") == 2


# --- Generalisation -------------------------------------------------------------------------------


def networks(method="ghn", splits=generalisation.SPLITS, count=4):
    """Records as `predicted-networks` writes them; wider ones are worse, deeper ones better."""
    for split in splits:
        for i, arch in enumerate(evaluation_set(split)[:count]):
            top1 = 0.5 - arch.C / 4000 + arch.n_cells / 100
            yield {"name": f"{method}: {split}[{i}]", "method": method, "split": split,
                   "architecture": arch.to_dict(), "top1": top1}  # fmt: skip


def write_records(folder, records):
    found = Records.open(folder, {})
    for record in records:
        found.add(record)
    return folder


def test_generalisation_of_records(tmp_path, capsys):
    predicted = write_records(tmp_path / "predicted", networks())
    sgd = [{**r, "name": r["name"][5:], "final_test_top1": 0.9} for r in networks(splits=("test",))]
    trained = write_records(tmp_path / "sgd", sgd)
    out = tmp_path / "out"
    arguments = ["generalisation", "--predicted", str(predicted), "--out", str(out)]
    paper.main([*arguments, "--trained", str(trained)])
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| SGD | 90.0% | – | – | – | – |" in text
    assert "| GHN-2, the paper | 66.9% | 64.0% | 60.5% | 65.8% | 36.8% |" in text
    assert "ghn degrades in networks wider than in training: holds" in text
    assert (out / "generalisation.png").stat().st_size > 20_000
    for more, message in (
        (["--ghn", "x"], "both given"), (["--networks", "0"], "--networks is 0"),
        (["--trained", str(predicted)], "no records with 'final_test_top1'"),
        (["--predicted", str(out)], "no records with 'method'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *more])
    other = write_records(tmp_path / "other", [{**next(networks()), "split": "predefined"}])
    with pytest.raises(ValueError, match="no network of test, wide"):
        paper.main(["generalisation", "--predicted", str(other), "--out", str(out)])


def test_generalisation_evaluated_here(one, tmp_path, monkeypatch):
    def few(split, start, stop, image_size):
        return [(f"{split}[{i}]", SMALL) for i in range(stop)] if split == "test" else []

    monkeypatch.setattr(generalisation, "of_split", few)
    out = tmp_path / "out"
    arguments = ["generalisation", "--quick", "--networks", "2", "--ghn", str(one),
                 "--image-size", "16", "--batch-size", "382", "--out", str(out)]  # fmt: skip
    paper.main(arguments)
    assert list(read_records(out)) == ["one: test[0]", "one: test[1]"]
    assert "| width | 8 channels | no | one | 2 |" in (out / "table.md").read_text()
    with pytest.raises(ValueError, match=r"batch_size 382 \(now 64\)"):
        paper.main([*arguments, "--batch-size", "64"])


def test_groups():
    rows = generalisation.rows(networks(count=100), [])
    points = generalisation.groups(rows)
    for name, panel in generalisation.PANELS.items():
        mine = [p for p in points if p.panel == name]
        inside = [r for r in rows if r["split"] in panel.splits]
        assert sum(p.networks for p in mine) == len(inside)
        for point in mine:
            some = [r["top1"] for r in inside
                    if point.least <= panel.value(r["arch"]) <= point.most]  # fmt: skip
            assert point.networks == len(some)
            assert point.top1 == pytest.approx(np.mean(some))
            if len(some) > 1:
                assert point.error == pytest.approx(np.std(some, ddof=1) / len(some) ** 0.5)
        # No group has networks as in training beside others.
        low, high = panel.trained
        assert all(low <= p.least and p.most <= high or p.least > high for p in mine)
    beyond = {p.panel for p in points if p.value > generalisation.PANELS[p.panel].trained[1]}
    assert beyond == {"width", "depth", "nodes"}


def test_claims_about_generalisation():
    def point(panel, value, top1, method="ghn"):
        return generalisation.Group(panel, method, value, value, value, 2, top1, 0.0)

    free = "depth without batch norm"
    points = [
        point("width", 64, 0.5), point("width", 256, 0.4),
        *(point("depth", d, t) for d, t in ((5, 0.3), (12, 0.5), (30, 0.4))),
        *(point("nodes", n, t) for n, t in ((50, 0.5), (300, 0.4), (900, 0.3))),
        point(free, 5, 0.2), point(free, 12, 0.4), point(free, 12, 0.5, "SGD"),
    ]  # fmt: skip
    text = generalisation.claims(points)
    for line in (
        "wider than in training: holds (50.0% there, 40.0% beyond)",
        "best at some cells in between: holds (50.0% at 12 to 12)",
        "best at some nodes in between: does not hold (50.0% at 50 to 50)",
        "better from 10 cells on: holds (20.0% below, 40.0% there)",
        "as good as SGD: does not hold (40.0% and 50.0%)",
    ):
        assert line in text
    assert "SGD degrades" not in text
    assert generalisation.claims([point("width", 64, 0.5), point(free, 12, 0.5)]) == ""


def test_figure_of_generalisation(tmp_path):
    points = generalisation.groups(generalisation.rows(networks(), []))
    figure = generalisation_figure(points, generalisation.PANELS)
    assert len(figure.axes) == 4
    for axes, panel in zip(figure.axes, generalisation.PANELS.values(), strict=True):
        (ground,) = [patch for patch in axes.patches if patch.get_gid() == "training"]
        assert (ground.get_x(), ground.get_x() + ground.get_width()) == panel.trained
    for call, message in (
        (lambda: generalisation_figure([], generalisation.PANELS), "no points"),
        (lambda: generalisation_figure(points, generalisation.PANELS, "x.svg"), "suffixes"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- Convergence ----------------------------------------------------------------------------------


def test_convergence(one, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["convergence", "--quick", "--ghn", str(one), "--epochs", "2", "--batch-size",
                 "256", "--learning-rates", "0.1", "--out", str(out)]  # fmt: skip
    paper.main(arguments)
    records = read_records(out)
    assert list(records) == ["He, 0.1, 0.0003", "one, 0.1, 0.0003"]
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    for record in records.values():
        first, second = record["test_top1"].values()
        assert f"| {record['start']} | 0.1 | 0.0003 | {first:.1%} | {second:.1%} |" in text
    assert records["He, 0.1, 0.0003"]["loss"] != records["one, 0.1, 0.0003"]["loss"]
    assert (out / "convergence.png").stat().st_size > 20_000
    # Nothing is trained again.
    monkeypatch.setattr(convergence, "train_network", None)
    paper.main(arguments)
    for more, message in (
        (["--weight-decays"], "at least one learning rate"),
        (["--learning-rates", "-1"], "learning_rate is -1.0"),
        (["--batch-size", "2000"], "batch_size for digits"),
    ):
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *more])


def test_the_best_curve_of_each_beginning(one, small, tmp_path, monkeypatch, capsys):
    def train(training, params, recipe, *_, **options):
        # Better on validation images, and worse on test images, the nearer to 0.05.
        good = 0.9 - abs(recipe.learning_rate - 0.05)
        return {"loss": [1.0], "final_val_top1": good, "test_top1": {"1": 1 - good}}

    monkeypatch.setattr(convergence, "train_network", train)
    paper.main(["convergence", "--quick", "--ghn", str(one), "--learning-rates", "0.01", "0.05",
                "0.1", "--out", str(tmp_path)])  # fmt: skip
    assert len(read_records(tmp_path)) == 6
    text = capsys.readouterr().out
    assert "| He | 0.05 | 0.0003 | 10.0% |" in text and "| one | 0.05 | 0.0003 | 10.0% |" in text


def test_claims_about_convergence():
    def record(start, *top1):
        return {"start": start, "test_top1": {str(i): t for i, t in enumerate(top1, 1)}}

    he = record("He", 0.1, 0.2, 0.3, 0.4)
    text = convergence.claims([he, record("a", 0.2, 0.3, 0.2, 0.1), record("b", 0.1, 0.3, 0.3, 0.5),
                               record("c", 0, 0, 0, 0)])  # fmt: skip
    assert "From a: ahead of He in the first 2 of 4 epochs, behind or level after epoch 2" in text
    assert "From b: ahead of He in the first 0 of 4 epochs, behind or level after epoch 4" in text
    assert "From c: ahead of He in the first 0 of 4 epochs, behind or level after epoch 0" in text


def test_figure_of_convergence():
    record = {"start": "He", "loss": [2, math.inf], "test_top1": {"1": 0.1, "2": 0.5}}
    loss, accuracy = convergence_figure([record]).axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [2, np.nan])
    np.testing.assert_array_equal(accuracy.lines[0].get_xdata(), [1, 2])
    for call, message in ((lambda: convergence_figure([]), "no records"),
                          (lambda: convergence_figure([record], "x.gif"), "suffixes")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


# --- Meta-batches ---------------------------------------------------------------------------------


def write_run(folder, size, losses, **more):
    """What a run of `ghn-train` leaves."""
    training = {"space": {"meta_batch": size}}
    Checkpoints(folder).write_config(GHN(), training=training)
    lines = [{"step": i, "loss": loss, **more} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_meta_batches_of_runs(one, tmp_path, capsys):
    noisy = [2.0, 3.0] * 20
    noisy[5] = None
    runs = [write_run(tmp_path / "bm1", 1, noisy, grad_norm=7.0),
            write_run(tmp_path / "bm8", 8, [2.0, 1.0, 0.9, 0.8, 0.7])]  # fmt: skip
    arguments = ["meta-batches", "--out", str(tmp_path / "out"), "--runs"]
    paper.main([*arguments, *map(str, runs)])
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| bm1 | 1 | 40 | 1 | 2.667 |" in text and "| 7 ± 0 |" in text
    assert "| bm8 | 8 | 5 | 0 | 0.700 |" in text and "| the paper | 8 |" in text
    assert "b_m = 8 has a less noisy loss than b_m = 1: holds" in text
    assert "gradient norms" not in text  # one run did not log them
    assert (tmp_path / "out" / "meta_batches.png").stat().st_size > 20_000
    empty = write_run(tmp_path / "empty", 1, [])
    bad = write_run(tmp_path / "bad", 1, [1.0, 2.0])
    with (bad / "metrics.jsonl").open("a") as file:
        file.write('{"loss"\n')
    failed = write_run(tmp_path / "failed", 1, [1.0, None])
    for folders, message in (
        ([empty], "has no records"), ([bad], "line 3, is damaged"), ([one], "is no run of"),
        ([failed], "has 1 updates that did not fail"), (runs[:1] * 2, "one name"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *map(str, folders)])


def test_smoothed_losses():
    steps = np.arange(1, 1001)
    losses = np.where(steps % 10 == 0, np.nan, steps)
    x, y = meta_batches.smooth(steps, losses)
    assert len(x) == len(y) == meta_batches.POINTS
    assert (x[0], y[0], x[-1], y[-1]) == (5, 3, 1000, 997.5)
    x, y = meta_batches.smooth(steps[:2], np.array([np.nan, 2.0]))
    np.testing.assert_array_equal((x, y), ((1, 2), (np.nan, 2)))


def test_noise_is_around_the_trend():
    rng = np.random.default_rng(0)
    loss = np.linspace(10, 0, 4000) + 0.3 * rng.standard_normal(4000)
    found = meta_batches.describe_run(8, {"loss": loss, "grad_norm": np.full(4000, np.nan)})
    assert found["noise"] == pytest.approx(0.3, rel=0.05) and found["grad_norm"] is None


def test_runs_are_made_and_gone_on_with(tmp_path, monkeypatch):
    made = []

    def train(config, images, programs):
        made.append(config)
        if len(made) == 2:  # after a checkpoint
            checkpoints = Checkpoints(config.run.out)
            checkpoints.write_config(GHN(), training=config.describe())
            checkpoints.save(1, 0, params={"x": np.zeros(1)})
            raise KeyboardInterrupt
        losses = np.linspace(2, 1, config.data.steps).tolist()
        write_run(config.run.out, config.space.meta_batch, losses, grad_norm=1.0)

    monkeypatch.setattr(meta_batches, "train", train)
    arguments = ["meta-batches", "--quick", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        paper.main(arguments)
    paper.main(arguments)
    assert [c.space.meta_batch for c in made] == [1, 4, 4]
    assert [c.data.steps for c in made] == [600, 150, 150]
    assert [c.run.resume for c in made] == [False, False, True]
    # The learning rate falls at the same share of each run.
    shares = {c.optimiser.decay_epochs[0] / c.data.epochs for c in made}
    assert max(shares) - min(shares) < 0.01
    for more, message in (
        (["--meta-batches", "2", "2"], "'2 2'; allowed: different"),
        (["--seed", "1"], r"seed 0 \(now 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *more])


def test_figure_of_meta_batches():
    curves = {"a": (np.array([4, 8]), np.array([2.0, 1.0])), "b": (np.array([2, 4]), np.ones(2))}
    by_update, by_share = meta_batch_figure(curves).axes
    assert [list(line.get_xdata()) for line in by_update.lines] == [[4], [2, 4]]
    assert [list(line.get_xdata()) for line in by_share.lines] == [[0.5, 1], [0.5, 1]]
    with pytest.raises(ValueError, match="no curves"):
        meta_batch_figure({})


# --- Training speed -------------------------------------------------------------------------------


def test_training_speed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_speed, "sample_architecture", lambda *_, rules: SMALL)
    arguments = ["training-speed", "--quick", "--updates", "2", "--out", str(tmp_path)]
    paper.main([*arguments, "--models", "mlp", "--meta-batches", "1"])
    (record,) = read_records(tmp_path).values()
    assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0
    # Compiling takes longer than to run what is compiled, and is counted apart.
    assert record["programs"] > 10
    assert record["warm_seconds"] > 2 * sum(record["seconds"])
    text = (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed and printed.startswith("2 x cpu, jax ")
    assert "| mlp | 1 | digits | 2 x cpu |" in text

    def full(*_):
        raise training_speed.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(training_speed, "_of_hypernetwork", full)
    paper.main([*arguments, "--models", "mlp", "ghn1", "--meta-batches", "1"])
    assert "| ghn1 | 1 | digits | 2 x cpu | out of memory | – | – | – |" in capsys.readouterr().out
    for more, message in (
        (["--models", "ghn9"], "'ghn9'; allowed: ghn2"), (["--dataset", "x"], "allowed: cifar10"),
        (["--updates", "0"], "--updates is 0"), (["--network", "x"], "no network 'x'"),
        (["--updates", "3"], r"updates 2 \(now 3\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *more])


def test_each_update_is_timed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(training_speed.time, "perf_counter", lambda: next(clock) ** 2)
    made = []

    def make(state, i):
        made.append((state, i))
        return state + 1, np.zeros(1)

    # The clock is read at the start and after each update.
    assert training_speed.timed(make, 5, 3) == [1, 3, 5]
    assert made == [(5, 0), (6, 1), (7, 2)]


def test_table_of_training_speed():
    seconds = {"seconds": [3.0, 1.0, 2.0], "compile_seconds": 90.0}
    record = {"model": "ghn2", "network": "resnet50", "meta_batch": 8, "dataset": "cifar10",
              "devices": "1 x H100"}  # fmt: skip
    single = {**record, "model": training_speed.SINGLE, "meta_batch": 1, **seconds}
    text = training_speed.table([{**record, **seconds}, single])
    assert "| ghn2 | 8 | cifar10 | 1 x H100 | 2 | 0.39 | 3 | 90 |" in text
    assert "| resnet50 | 1 | cifar10 |" in text
    # The paper's own hours, from its seconds.
    for line in ("resnet50, the paper | 1 | cifar10 | 1 x V100 | 0.1 | 0.02 ",
                 "ghn2, the paper | 8 | cifar10 | 1 x V100 | 7.17 | 1.4 ",
                 "ghn2, the paper | 8 | cifar10 | 4 x V100 | 4.62 | 0.9 "):  # fmt: skip
        assert line in text
    assert training_speed.hours(5.53, "imagenet2012") == pytest.approx(7.40, abs=0.02)
    large = training_speed.table([{**record, "dataset": "imagenet2012", "seconds": None}])
    assert "1 x H100 | out of memory | – | – | – |" in large
    assert "ghn2, the paper | 8 | imagenet2012 | 1 x V100 | out of memory | – |" in large


def test_a_method_has_one_colour():
    some, others = method_colors(["GHN-1", "a", "GHN-2", "b"]), method_colors(["He", "GHN-2"])
    assert some["GHN-2"] == others["GHN-2"]
    assert len(set(some.values())) == 4
    assert len(set(method_colors(map(str, range(6))).values())) == 6
