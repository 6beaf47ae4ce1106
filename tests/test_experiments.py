"""Experiments: their quick presets run, go on where they were, and refuse what cannot work."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from ghn_jax.cli import paper
from ghn_jax.data.augment import cut_out
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.counts import count_flops, count_parameters
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation import nasbench201
from ghn_jax.evaluation.accuracy import evaluate_ghn, random_parameters
from ghn_jax.evaluation.experiments import (
    convergence,
    few_shot,
    predicted_networks,
    regression,
    search,
    trained_networks,
)
from ghn_jax.evaluation.experiments.cluster import ClusterConfig, units
from ghn_jax.evaluation.experiments.kept_parameters import parameters_file
from ghn_jax.evaluation.experiments.records import Records, read_records
from ghn_jax.evaluation.experiments.saved_state import SavedState
from ghn_jax.evaluation.experiments.trained_networks import (
    NEVER,
    noisy,
    train_network,
    training_of,
)
from ghn_jax.evaluation.networks import by_name, module_of, of_file, of_split
from ghn_jax.evaluation.recipe import Recipe, final
from ghn_jax.hypernet.checkpoint import load_ghn, save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.plot.experiments import pareto_front

# Few operations, so that little is compiled.
EDGES = (("conv_1x1", 0), ("skip_connect", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), n_cells=2, C=8, fc_layers=1)


def write_networks(path, count):
    """A file with some networks that need the same programs."""
    path.write_text(json.dumps({f"net {i}": SMALL.to_dict() for i in range(count)}))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def digits():
    return {part: load_images("digits", part) for part in ("train", "val", "test")}


# --- Which networks -------------------------------------------------------------------------------


def test_networks_of_a_split_and_by_name(tmp_path):
    names = [name for name, _ in of_split("test", 3, 6)]
    assert names == ["test[3]", "test[4]", "test[5]"]
    assert of_split("test", 3, 6, width=24)[0][1].C == 24
    assert of_split("search", 0, 2, seed=1)[1][1] != of_split("search", 0, 2, seed=2)[1][1]
    assert [n for _, n in by_name(["resnet18", "ViT"])][0] == "resnet18"
    path = write_networks(tmp_path / "nets.json", 2)
    assert of_file(path) == [("net 0", SMALL), ("net 1", SMALL)]
    for call, message in (
        (lambda: of_split("tests"), "'tests'; allowed: val, test"),
        (lambda: of_split("test", 500, 600), "no network from 500"),
        (lambda: by_name(["resnet51"]), "no network 'resnet51'; allowed: DARTS"),
        (lambda: of_file(__file__), "truncated or not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- Training -------------------------------------------------------------------------------------


def test_recipes():
    recipe = Recipe(epochs=4, learning_rate=0.5)
    assert recipe.optimizer(7) is Recipe(epochs=4, learning_rate=0.5).optimizer(7)
    # The learning rate falls at the end of an epoch, along a cosine; weight decay is L2.
    optimizer = Recipe(epochs=4, learning_rate=0.5, weight_decay=0.1).optimizer(2)
    state, rates = optimizer.init(np.float32(2.0)), []
    for step in range(8):
        # The momentum of a single gradient fades by 0.9 a step.
        update, state = optimizer.update(np.float32(-0.2 if step else 0.8), state, np.float32(2.0))
        rates.append(-float(update) / 0.9**step)
    expected = [0.25 * (1 + np.cos(np.pi * (step // 2) / 4)) for step in range(8)]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)
    assert [final(10).drop_probability(e) for e in (0, 5)] == [0, 0.1]
    for wrong, message in (({"learning_rate": 0.0}, "learning_rate is 0.0"),
                           ({"epochs": 0}, "epochs is 0"), ({"smoothing": 1.0}, "smoothing is 1.0"),
                           ({"learning_rate": float("nan")}, "learning_rate is nan")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Recipe(**wrong).check()


def test_an_interrupted_network_ends_as_an_uninterrupted_one(digits, tmp_path):
    recipe = Recipe(epochs=3, batch_size=128, cutout=4)
    engine = Engine()
    params = random_parameters(module_of(SMALL, digits["train"].task), 16, 0)

    class Killed(Exception):
        pass

    def train(saved=None, until=99):
        def report(epoch, top1):
            if epoch == until:
                raise Killed

        training = training_of(engine, SMALL, recipe, digits["train"], 0)
        return train_network(
            training, params, recipe, digits["train"], {"val": digits["val"]},
            report_epochs=(1,), noise=0.08, saved=saved, report=report,
        )  # fmt: skip

    expected = train()
    saved = SavedState(tmp_path / "a" / "net[0]")
    for until in (1, 2):
        with pytest.raises(Killed):
            train(saved, until)
    record = train(saved)
    times = ("seconds", "inference_seconds")
    assert {k: v for k, v in record.items() if k not in times} == {
        k: v for k, v in expected.items() if k not in times
    }
    assert list(record["val_top1"]) == ["1", "3"]
    assert len(record["loss"]) == 3
    assert record["loss"][-1] < record["loss"][0]
    # What is damaged or of another network is said, and nothing is trained from it.
    saved.path.write_bytes(saved.path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is damaged"):
        train(saved)
    other = SMALL.replace(C=16)
    training = training_of(engine, other, recipe, digits["train"], 0)
    saved.save(training.init(random_parameters(module_of(other, digits["train"].task), 16, 0)), {})
    with pytest.raises(ValueError, match="of another network"):
        train(saved)


def test_models_of_the_zoo_have_no_cells_to_drop(digits):
    with pytest.raises(ValueError, match="drop path"):
        training_of(Engine(), "resnet18", final(1), digits["train"], 0)


def test_convergence():
    assert trained_networks.convergence([0.5, 0.9, 0.95, 0.99], 8) == 3 / 8
    assert trained_networks.convergence([0.5, 0.9], 2) == NEVER


def test_noise_is_added_to_values_from_0_to_1(digits):
    images = digits["val"]
    batch = (images.pixels[:8] / np.float32(255) - np.float32(images.mean)) / np.float32(images.std)
    changed = noisy(batch, images, 0.08, [0]) * np.float32(images.std) + np.float32(images.mean)
    original = images.pixels[:8] / 255
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6
    inside = (original > 0.3) & (original < 0.7)
    assert (changed - original)[inside].std() == pytest.approx(0.08, rel=0.1)
    np.testing.assert_allclose(noisy(batch, images, 0.0, [0]), batch, atol=1e-5)


def test_cutout_zeroes_a_square_of_each_image():
    images = np.ones((200, 32, 32, 3), np.float32)
    cut = cut_out(images, 16, np.random.default_rng(0))
    assert (images == 1).all()
    zeros = (cut == 0).all(-1)
    areas = zeros.sum((1, 2))
    assert areas.max() == 256
    assert areas.min() >= 64  # a centre in a corner leaves a quarter
    for mask in zeros[:20]:
        rows, columns = np.nonzero(mask)
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


# --- The experiments ------------------------------------------------------------------------------


def test_trained_networks(tmp_path, capsys):
    """The quick preset by its command; what is there is not computed again."""
    out = tmp_path / "out"
    nets = write_networks(tmp_path / "nets.json", 3)
    arguments = ["trained-networks", "--quick", "--nets", str(nets), "--out", str(out)]
    paper.main([*arguments, "--stop", "1"])
    first = (out / "records.jsonl").read_text()
    paper.main(arguments)
    assert (out / "records.jsonl").read_text().startswith(first)
    records = read_records(out)
    assert list(records) == ["net 0", "net 1", "net 2"]
    for record in records.values():
        assert list(record["test_top1"]) == ["1", "2", "4"]
        assert {"val_top1_noise", "inference_seconds", "convergence", "final_val_top1"} <= {*record}
        assert record["parameters"] > 1000
    assert np.mean([r["final_test_top1"] for r in records.values()]) > 0.2
    assert "| 3 | 4 |" in (out / "table.md").read_text()
    assert (out / "training.png").stat().st_size > 5000
    assert not list((out / "states").iterdir())
    with pytest.raises(ValueError, match="other|another folder"):
        paper.main([*arguments, "--epochs", "5"])


def test_units_of_a_cluster_are_the_whole(tmp_path):
    assert units(3, 10, 3) == [(3, 6), (6, 9), (9, 10)]
    out = tmp_path / "out"
    nets = write_networks(tmp_path / "nets.json", 2)
    config = trained_networks.Config(
        dataset="digits", nets=nets, out=out, report_epochs=(),
        recipe=Recipe(epochs=1, batch_size=512),
        cluster=ClusterConfig("local", unit_size=1, jobs=2),
    )  # fmt: skip
    trained_networks.run(config)
    assert {path.name for path in out.glob("records*")} == {"records-0-1.jsonl",
                                                            "records-1-2.jsonl"}  # fmt: skip
    here = trained_networks.run(dataclasses.replace(
        config, cluster=ClusterConfig(), out=tmp_path / "here"))  # fmt: skip
    there = read_records(out)
    for record in here:
        assert there[record["name"]]["loss"] == pytest.approx(record["loss"], rel=1e-4)
    (tmp_path / "bad" / "states").mkdir(parents=True)
    (tmp_path / "bad" / "states" / "net 0.npz").write_bytes(b"cut off")
    with pytest.raises(ChildProcessError, match="1 of 2 jobs have failed.*npz is damaged"):
        trained_networks.run(dataclasses.replace(config, out=tmp_path / "bad"))


def test_networks_that_are_trained_by_one_name(tmp_path):
    """Records are of one network and one hypernetwork; parameters are kept whenever asked for."""
    nets, ghn = write_networks(tmp_path / "nets.json", 1), GHN(max_shape=(16, 16, 7, 7))
    save_ghn(tmp_path / "ghn", ghn, ghn.init_variables(0))
    config = trained_networks.Config(
        dataset="digits", nets=nets, out=tmp_path / "out", ckpt=tmp_path / "ghn", width=8,
        report_epochs=(), recipe=Recipe(epochs=1, batch_size=512),
    )  # fmt: skip
    (record,) = trained_networks.run(config)
    file = parameters_file(config.out, "net 0")
    assert not file.exists()
    (again,) = trained_networks.run(dataclasses.replace(config, keep_parameters=True))
    assert file.exists() and again["loss"] == pytest.approx(record["loss"], rel=1e-4)
    written = (config.out / "records.jsonl").read_text()
    trained_networks.run(dataclasses.replace(config, keep_parameters=True))
    assert (config.out / "records.jsonl").read_text() == written
    nets.write_text(json.dumps({"net 0": SMALL.replace(n_cells=3).to_dict()}))
    with pytest.raises(ValueError, match="record of another network that is called net 0; give"):
        trained_networks.run(config)
    write_networks(nets, 1)
    shutil.rmtree(tmp_path / "ghn")
    save_ghn(tmp_path / "ghn", ghn, ghn.init_variables(1))
    with pytest.raises(ValueError, match="begun with other parameters of 'ghn'"):
        trained_networks.run(config)
    five = GHN(num_classes=5, max_shape=(16, 16, 7, 7))
    save_ghn(tmp_path / "five", five, five.init_variables(0))
    with pytest.raises(ValueError, match="digits has 10 classes, but five predicts"):
        trained_networks.run(
            dataclasses.replace(config, ckpt=tmp_path / "five", out=tmp_path / "other")
        )


def test_recipes_that_a_network_cannot_have_are_refused_before_others_are_trained(
    tmp_path, monkeypatch
):
    for module in (trained_networks, few_shot, convergence):
        monkeypatch.setattr(module, "train_network", lambda *_, **__: pytest.fail("it trains"))
    recipe = Recipe(epochs=1, batch_size=64, drop_path=0.2)
    for run, config in (
        (trained_networks.run, trained_networks.Config),
        (few_shot.run, functools.partial(few_shot.Config, shots=100, held_out=10)),
    ):
        with pytest.raises(ValueError, match="resnet18 is no network of the design space"):
            run(config(dataset="digits", networks=("DARTS", "resnet18"), recipe=recipe,
                       out=tmp_path))  # fmt: skip
    with pytest.raises(ValueError, match="resnet50 is no network of the design space"):
        convergence.run(convergence.Config(dataset="digits", recipe=recipe, out=tmp_path))


def test_a_network_that_has_diverged_is_not_trained_on(tmp_path, digits):
    """Where the process ended between its last epoch and its record."""
    recipe, saved = Recipe(epochs=3, batch_size=512), SavedState(tmp_path / "net")
    training = training_of(Engine(), SMALL, recipe, digits["train"], 0)
    params = random_parameters(module_of(SMALL, digits["train"].task), 16, 0)
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    options = {"report_epochs": (), "saved": saved}
    record = train_network(training, params, recipe, digits["train"], {}, **options)
    assert record["diverged"] == 1
    again = train_network(training, params, recipe, digits["train"], {}, **options)
    assert again["diverged"] == 1 and len(again["loss"]) == 1


def test_predicted_networks_and_their_units(tmp_path, digits):
    for seed, name in enumerate(("one", "other")):
        ghn = GHN(max_shape=(16, 16, 7, 7))
        save_ghn(tmp_path / name, ghn, ghn.init_variables(seed))
    out = tmp_path / "out"
    config = dataclasses.replace(
        predicted_networks.quick(), ghn=(tmp_path / "one",), splits=("test",), stop=2, out=out
    )
    paper.main(["predicted-networks", "--quick", "--ghn", str(tmp_path / "one"), "--splits",
                "test", "--stop", "2", "--out", str(out)])  # fmt: skip
    first = predicted_networks.run(config)  # what was written
    ghn, variables = load_ghn(tmp_path / "one")
    expected = evaluate_ghn(
        ghn, variables, of_split("test", 0, 2, image_size=16, width=8), digits["test"]
    )
    assert [r["top1"] for r in first] == [r["top1"] for r in expected]
    # Another hypernetwork and another network are added; nothing is computed again.
    before = (out / "records.jsonl").read_text()
    more = dataclasses.replace(config, ghn=(tmp_path / "one", tmp_path / "other"), stop=3)
    records = predicted_networks.run(more)
    assert (out / "records.jsonl").read_text().startswith(before)
    assert [r["name"] for r in records] == [
        f"{name}: test[{i}]" for name in ("one", "other") for i in range(3)
    ]
    assert "| other | test | 3 |" in (out / "table.md").read_text()
    shared = tmp_path / "shared"
    cluster = ClusterConfig("local", unit_size=2, jobs=2)
    there = predicted_networks.run(dataclasses.replace(more, cluster=cluster, out=shared))
    assert {path.name for path in shared.glob("records*")} == {
        "records-0-2.jsonl", "records-2-3.jsonl"
    }  # fmt: skip
    assert [(r["name"], r["top1"]) for r in there] == [(r["name"], r["top1"]) for r in records]
    for wrong, message in (
        ({"splits": ("tset",)}, "--splits is 'tset'; allowed: val, test"),
        ({"start": 600, "stop": None}, "--start is 600 and --stop None, but there are 500"),
        ({"batch_size": 32}, "another folder"),
    ):
        with pytest.raises(ValueError, match=message):
            predicted_networks.run(dataclasses.replace(config, **wrong))


def test_few_shot(tmp_path, digits):
    ghn = GHN(max_shape=(16, 16, 7, 7))
    save_ghn(tmp_path / "small", ghn, ghn.init_variables(0))
    sgd = tmp_path / "sgd"
    paper.main([
        "trained-networks", "--quick", "--networks", "ViT", "--epochs", "1", "--keep-parameters",
        "--out", str(sgd),
    ])  # fmt: skip
    paper.main([
        "few-shot", "--quick", "--ghn", str(tmp_path / "small"), "--out", str(tmp_path / "out"),
        "--networks", "ViT", "--epochs", "2", "--batch-size", "32", "--noise", "3e-5",
        "--orthogonal-from", "1", "--trained", str(sgd),
    ])  # fmt: skip
    config = dataclasses.replace(few_shot.quick(), networks=("ViT",), out=tmp_path / "bad")
    records = read_records(tmp_path / "out")
    assert set(records) == {f"ViT from {where}, {what}" for where in ("he", "small", "sgd")
                            for what in ("tuned", "seed 0", "seed 1")}  # fmt: skip
    assert len(records["ViT from he, tuned"]["held_out_top1"]) == 2
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("±") == 3
    for wrong, message in (({"shots": 1000}, "1000 shots are asked for"),
                           ({"held_out": 20}, "--held-out is 20"), ({"seeds": 0}, "--seeds is 0"),
                           ({"learning_rates": ()}, "at least one learning rate"),
                           ({"networks": ("DARTS",), "trained": (sgd,)}, "--networks DARTS --keep"),
                           ({"width": 16, "trained": (sgd,)}, "with the same --width"),
                           ({"trained": (sgd, sgd)}, "two beginnings")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            few_shot.run(dataclasses.replace(config, **wrong))
        assert not (tmp_path / "bad" / "records.jsonl").exists()


def test_few_shot_from_trained_parameters():
    """Of other classes: the classifier begins at random, all else as it was trained."""
    (_, network), *_ = by_name(["ViT"], 8)
    old, new = (random_parameters(module_of(network, Task(num_classes=n, image_size=16)), 16, seed)
                for n, seed in ((7, 0), (10, 1)))  # fmt: skip
    begun = few_shot._with_classifier(old, new, 10, "the file")
    assert jax.tree.map(np.shape, begun) == jax.tree.map(np.shape, new)
    kept = jax.tree.map(lambda a, b: a.shape == b.shape and bool((a == b).all()), begun, old)
    last = "classifier_0"
    assert {name for name, same in kept.items() if not all(jax.tree.leaves(same))} == {last}
    assert (begun[last]["kernel"] == new[last]["kernel"]).all()
    wider = jax.tree.map(lambda x: np.repeat(x, 2, -1), old["stem0"])
    with pytest.raises(ValueError, match="the file: stem0.* has the shape .* is needed; train the"):
        few_shot._with_classifier({**old, "stem0": wider}, new, 10, "the file")
    with pytest.raises(ValueError, match="the file has other parameters"):
        few_shot._with_classifier({"stem0": old["stem0"]}, new, 10, "the file")


# --- Search ---------------------------------------------------------------------------------------


def test_search_finds_the_best_within_limits():
    """Of an objective that is known: against all networks, scored one by one."""
    ghn = GHN(max_shape=(16, 16, 11, 11))
    variables, task = ghn.init_variables(0), Task()

    def objective(embeddings):
        return embeddings @ np.linspace(-1, 1, embeddings.shape[1])

    limit = 3e6
    found = search.search(
        ghn, variables, objective, num=12, keep=3, seed=7,
        constraint=search.within(task, max_parameters=limit),
    )  # fmt: skip
    scores = {}
    for i in range(12):
        arch = sample_architecture("search", 7, i)
        if count_parameters(arch) <= limit:
            embedding = np.asarray(ghn.embed(variables, arch)).mean(0)
            scores[i] = objective(embedding[None])[0]
    best = sorted(scores, key=lambda i: -scores[i])[:3]
    assert 3 < len(scores) < 12
    assert [f.index for f in found] == best
    for f in found:
        assert f.score == pytest.approx(scores[f.index], abs=1e-4)
        assert f.parameters == count_parameters(f.arch) <= limit
        assert f.flops == count_flops(f.arch)
    with pytest.raises(ValueError, match="num is 0"):
        search.search(ghn, variables, objective, num=0)


def test_the_search_by_its_command(tmp_path, monkeypatch):
    """It goes on where it was, and its best can be trained."""
    monkeypatch.setattr(search, "CHUNK", 8)
    trained = Records.open(tmp_path / "trained", {})
    for i, (name, arch) in enumerate(of_split("val", 0, 12, width=16)):
        trained.add({"name": name, "architecture": arch.to_dict(), "final_val_top1": i / 12})
    out = tmp_path / "out"
    arguments = ["search", "--trained", str(trained.path.parent), "--out", str(out)]
    paper.main([*arguments, "--num", "8"])
    first = (out / "records.jsonl").read_text()
    paper.main([*arguments, "--num", "20", "--keep", "4"])
    assert (out / "records.jsonl").read_text().startswith(first)
    rows = [row for r in read_records(out).values() for row in r["rows"]]
    assert [row[0] for row in rows] == list(range(20))
    best = sorted(rows, key=lambda row: -row[1])[:4]
    assert [name for name, _ in of_file(out / "best.json")] == [f"search[{r[0]}]" for r in best]
    assert of_file(out / "best.json")[0][1] == sample_architecture("search", 0, best[0][0])
    assert f"search[{best[0][0]}]" in (out / "table.md").read_text()
    assert (out / "pareto.png").stat().st_size > 5000
    for wrong, message in ((["--trained"], "--trained is empty"),
                           (["--trained", str(out / "x")], "no folder"),
                           (["--property", "top2"], "no 'top2'; it has final_val_top1"),
                           (["--max-parameters", "10"], "another folder")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *wrong])


def test_accuracies_that_cannot_be_are_told():
    told = search.beyond(np.array([-1.0, 50.0, 100.0, 130.0]), 24)
    assert (
        told == "50.0% of the predictions are below 0 or above 100%: 24 trained networks are few."
    )
    assert search.beyond(np.array([0.0, 100.0]), 24) == ""


def test_pareto_front():
    rng = np.random.default_rng(0)
    cost, score = rng.integers(0, 20, (2, 60)).astype(float)
    front = set(pareto_front(cost, score).tolist())
    for i in range(60):
        better = [j for j in range(60)
                  if cost[j] <= cost[i] and score[j] >= score[i]
                  and (cost[j], score[j]) != (cost[i], score[i])]  # fmt: skip
        same = [j for j in front if (cost[j], score[j]) == (cost[i], score[i])]
        assert bool(same) == (not better)


# --- Properties -----------------------------------------------------------------------------------


def test_properties_by_the_command(tmp_path, capsys):
    trained = Records.open(tmp_path / "trained", {})
    for i, (name, arch) in enumerate(of_split("val", 0, 22, width=16)):
        trained.add({
            "name": name, "architecture": arch.to_dict(), "final_val_top1": i / 40,
            "val_top1_noise": (i % 7) / 10, "inference_seconds": 1 + i % 5, "convergence": 2.0,
        })  # fmt: skip
    trained.add({"name": "resnet18", "architecture": "resnet18"})  # has no embedding here
    out = tmp_path / "out"
    arguments = ["properties", "--fit", str(tmp_path / "trained"), "--test", "--neupred-runs", "0",
                 "--out", str(out)]  # fmt: skip
    paper.main(arguments)
    records = list(read_records(out).values())
    # All converge as late: nothing is ranked.
    assert [r["property"] for r in records] == ["clean accuracy", "noisy accuracy",
                                                "inference time"]  # fmt: skip
    assert all(len(r["taus"]) == 5 for r in records)
    assert "11 networks to fit to, 11 to rank" in capsys.readouterr().out
    for name in ("table.md", "properties.png", "correlations.png"):
        assert (out / name).stat().st_size > 100
    with pytest.raises(ValueError, match="nowhere is no folder"):
        paper.main(["properties", "--fit", "nowhere"])
    few = Records.open(tmp_path / "few", {})
    for record in list(trained.values())[:18]:
        few.add(record)
    with pytest.raises(ValueError, match="9 networks to fit to; allowed: 10 or more"):
        paper.main(
            ["properties", "--fit", str(tmp_path / "few"), "--test", "--out", str(out / "x")]
        )
    assert not (out / "x").exists()


def test_quick_properties_have_networks_enough():
    assert trained_networks.quick().stop // 2 >= 2 * regression.FOLDS


def test_nasbench201_by_its_command(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 5, (40, 6))
    cells = [nasbench201.format_cell([nasbench201.OPERATIONS[k] for k in row]) for row in kinds]
    accuracy = rng.uniform(10, 90, (40, 2)).astype(np.float32)
    path = tmp_path / "table.npz"
    np.savez(path, cell=np.array(cells, "S"), columns=np.array(["cifar10-val", "cifar10-test"]),
             accuracy=accuracy)  # fmt: skip
    arguments = ["nasbench201", "--quick", "--table", str(path), "--out", str(tmp_path / "out")]
    paper.main([*arguments, "--cells", "24", "--sizes", "10"])
    records = read_records(tmp_path / "out").values()
    methods = list(dict.fromkeys(record["method"] for record in records))
    assert methods == ["untrained GHN-2", "parameters", "FLOPs", "random", "best"]
    # Another draw is added to those that there are.
    before = (tmp_path / "out" / "records.jsonl").read_text()
    paper.main([*arguments, "--cells", "24", "--sizes", "10", "--draws", "3"])
    after = (tmp_path / "out" / "records.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") * 3 / 2
    # Where nothing is missing, nothing is embedded or counted either.
    for name in ("embed_cells", "count_flops"):
        monkeypatch.setattr(f"ghn_jax.evaluation.experiments.nasbench201.{name}", None)
    paper.main([*arguments, "--cells", "24", "--sizes", "10", "--draws", "3"])
    assert (tmp_path / "out" / "records.jsonl").read_text() == after
    assert (tmp_path / "out" / "nasbench201.png").stat().st_size > 5000
    for wrong, message in (
        (["--cells", "5"], "--cells is 5; allowed: 51"),
        (["--dataset", "svhn"], "no column 'svhn-val'; it has cifar10-val"),
    ):
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, *wrong])
    with pytest.raises(ValueError, match="--table is missing"):
        paper.main(["nasbench201"])


# --- What is refused ------------------------------------------------------------------------------


def test_shots_are_the_first_of_each_class_in_file_order(digits):
    images = digits["train"]
    shots = few_shot.take_shots(images, 0, 5)
    assert np.bincount(shots.labels).tolist() == [5] * 10
    first = [np.nonzero(images.labels == c)[0][:5] for c in range(10)]
    expected = images.pixels[np.sort(np.concatenate(first))]
    np.testing.assert_array_equal(shots.pixels, expected)
    later = few_shot.take_shots(images, 5, 9)
    assert not {x.tobytes() for x in later.pixels} & {x.tobytes() for x in shots.pixels}


def test_an_unknown_experiment_is_refused():
    with pytest.raises(
        ValueError, match="no experiment 'table99'; allowed: all, predicted-networks"
    ):
        paper.main(["table99"])


@pytest.mark.parametrize("name", [*paper.EXPERIMENTS])
def test_every_experiment_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        paper.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"ghn-paper {name}" in shown
    assert "--out PATH" in shown
