"""Evaluating predicted parameters, and the program that does it."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import unit_by_unit

from ghn_jax import zoo
from ghn_jax.cli import evaluate
from ghn_jax.data.images import Images, eval_batches, load_images
from ghn_jax.deepnets1m.architecture import DARTS, VIT, Architecture
from ghn_jax.deepnets1m.evaluation_sets import evaluation_set
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.engine.engine import Engine
from ghn_jax.evaluation import accuracy as evaluation
from ghn_jax.evaluation.accuracy import (
    evaluate_ghn,
    evaluate_network,
    random_parameters,
    summary,
)
from ghn_jax.evaluation.networks import named_architectures
from ghn_jax.hypernet.checkpoint import save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training.config import preset

SMALL = GHN(max_shape=(16, 16, 11, 11))


@pytest.fixture(scope="module")
def engine():
    found = Engine()
    yield found
    found.programs.close()


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits", "test", image_size=16)


def with_logits(digits, logits):
    """A network that gives these logits for the images, one after another."""

    known = np.concatenate([x for x, _ in eval_batches(digits, 64)])

    class Given(nn.Module):
        @nn.compact
        def __call__(self, images):
            distance = jnp.abs(images[:, None] - known[None]).sum((2, 3, 4))
            return jnp.asarray(logits)[distance.argmin(1)]

    return Given()


def test_accuracy_is_the_fraction_of_right_answers(digits):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((len(digits), 10)).astype(np.float32)
    labels = np.concatenate([y for _, y in eval_batches(digits, 64)])
    order = np.argsort(-logits, axis=1)
    top1 = (order[:, 0] == labels).mean()
    top5 = (order[:, :5] == labels[:, None]).any(1).mean()
    (result,) = evaluate_network(with_logits(digits, logits), {}, images=digits)
    assert result.images == len(digits)
    assert result.top1 == pytest.approx(top1)
    assert result.top5 == pytest.approx(top5)
    assert 0 < top1 < top5 < 1


def test_equal_and_infinite_logits_are_never_right(digits):
    for value in (0.0, np.nan, np.inf):
        logits = np.full((len(digits), 10), value, np.float32)
        (result,) = evaluate_network(with_logits(digits, logits), {}, images=digits)
        assert result.top1 == 0


def test_batch_norm_uses_the_statistics_of_each_batch(digits, engine):
    arch = Architecture(DARTS, 3, C=8)
    network = build_network(arch, 10, 16)
    params = random_parameters(network, 16, seed=0)
    right = 0
    batches = list(eval_batches(digits, 64))
    for images, labels in batches:
        full = np.concatenate([images, batches[0][0]])[:64]  # the last one is not full
        with unit_by_unit():
            logits = network.apply({"params": params}, full)[: len(labels)]
        right += (logits.argmax(1) == labels).sum()
    assert len(labels) not in (32, 64)
    (result,) = evaluate_network(network, params, images=digits, engine=engine)
    assert result.top1 == pytest.approx(float(right) / len(digits), abs=1e-3)


@pytest.mark.parametrize("count", [16, 62, 80, 96])
def test_every_image_counts_once_in_a_full_batch(count):
    pixels = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 3))
    batches = [(pixels[i : i + 64], np.arange(i, min(i + 64, count))) for i in range(0, count, 64)]

    class Few:
        def __len__(self):
            return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "eval_batches", lambda *_: batches)
        full = list(evaluation.full_batches(Few(), 64))
    assert [n for _, _, n in full] == [len(y) for _, y in batches]
    for images, labels, _ in full:
        assert len(images) == len(labels) == min(count, 64)
        np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
    last = full[-1][1].tolist()
    if count in (80, 96):  # repeated: the statistics of 16 or 32 images
        assert last == list(range(64, count)) * (64 // (count - 64))


def test_random_parameters_are_a_function_of_the_seed():
    network = build_network(Architecture(DARTS, 3, C=8), 10, 16)
    a, b, c = (jax.tree.leaves(random_parameters(network, 16, seed=s)) for s in (0, 0, 1))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert any((x != y).any() for x, y in zip(a, c, strict=True))


def test_random_parameters_are_distributed_as_the_modules_own():
    for arch in (Architecture(DARTS, 4, C=16), Architecture(VIT, 3, C=32)):
        network = build_network(arch, 10, 16)
        ours = random_parameters(network, 16, seed=0)
        with unit_by_unit():
            theirs = network.init(jax.random.key(0), jnp.zeros((2, 16, 16, 3)))["params"]
        for (path, a), b in zip(
            jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True
        ):
            name = jax.tree_util.keystr(path)
            assert a.shape == b.shape, name
            if a.size >= 256 or not np.std(b):
                assert np.std(a) == pytest.approx(float(np.std(b)), rel=0.2), name
                assert np.mean(a) == pytest.approx(float(np.mean(b)), abs=0.3 * float(np.std(b))), (
                    name
                )


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_s_16"])
def test_random_parameters_of_a_model_of_the_zoo(name):
    """Kernels are He's; layer scales, tokens and attention begin as the model's own."""
    network = zoo.MODELS[name](10, 32)
    ours, again, other = (random_parameters(network, 32, seed) for seed in (0, 0, 1))
    images = jnp.zeros((2, 32, 32, 3))
    own = jax.jit(network.init)(jax.random.key(0), images)["params"]
    for (path, a), b, c, d in zip(
        jax.tree.leaves_with_path(ours), *map(jax.tree.leaves, (own, again, other)), strict=True
    ):
        assert (np.asarray(a) == np.asarray(c)).all() and a.shape == b.shape
        if path[-1].key == "kernel" and a.ndim in (2, 4):
            assert np.std(a) == pytest.approx(np.sqrt(2 / np.prod(a.shape[:-1])), rel=0.1)
            assert (a != d).any()
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6)
    if name == "convnext_tiny":
        assert ours["features_1_0"]["layer_scale"][0] == np.float32(1e-6)


def test_a_record_for_each_architecture(digits, engine):
    variables = SMALL.init_variables(0)
    nets = [(name, arch) for name, arch in named_architectures(8, n_cells=3).items()][:2]
    seen = []
    options = {"compare_random": True, "engine": engine, "report": seen.append}
    records = evaluate_ghn(SMALL, variables, nets, digits, **options)
    programs = len(engine.programs)
    assert seen == records
    assert [r["name"] for r in records] == ["DARTS", "PDARTS"]
    for record, (_, arch) in zip(records, nets, strict=True):
        assert Architecture.from_dict(record["architecture"]) == arch
        assert record["images"] == len(digits)
        assert 0 <= record["top1"] <= record["top5"] <= 1
        assert 0 <= record["top1_random"] <= 1
        params = SMALL.predict(variables, arch, image_size=16)
        assert record["parameters"] == sum(x.size for x in jax.tree.leaves(params))
        network = build_network(arch, 10, 16)
        (again,) = evaluate_network(network, params, images=digits, engine=engine)
        assert again.top1 == record["top1"]
    assert len(engine.programs) == programs
    json.dumps(records)


def test_summary():
    records = [{"top1": x} for x in (0.1, 0.2, 0.6)]
    mean, error, best = summary(records)
    assert (mean, best) == (pytest.approx(0.3), 0.6)
    assert error == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1) / 3**0.5)
    assert summary(records[:1])[1] == 0


# --- The program ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "ghn"
    save_ghn(path, SMALL, SMALL.init_variables(0))
    return path


def test_the_program_writes_a_record_for_each_network(saved, tmp_path, capsys):
    out = tmp_path / "results.json"
    evaluate.main(
        ["--ckpt", str(saved), "--dataset", "digits", "--split", "named", "--num", "1",
         "--width", "8", "--out", str(out), "--cache-dir", str(tmp_path / "cache")]
    )  # fmt: skip
    (record,) = json.loads(out.read_text())
    assert record["name"] == "DARTS"
    printed = capsys.readouterr().out
    assert f"1 networks of named on digits (test): top-1 {record['top1']:.2%} ±" in printed


def test_images_are_those_that_a_hypernetwork_was_trained_on(saved, tmp_path, capsys):
    """Where it says so, and nothing else is asked for."""

    def images(ghn, **options):
        config = evaluate.as_trained(evaluate.EvalConfig(str(ghn), **options))
        return config.dataset, config.image_size

    assert images(saved) == ("cifar10", None)
    assert images(saved, dataset="digits") == ("digits", None)
    training = preset("demo").replace(image_size=20).describe()
    save_ghn(tmp_path / "trained", SMALL, SMALL.init_variables(0), about={"training": training})
    assert images(tmp_path / "trained") == ("digits", 20)
    assert images(tmp_path / "trained", dataset="digits", image_size=24) == ("digits", 24)
    assert capsys.readouterr().out == ""
    assert images(tmp_path / "trained", dataset="cifar10") == ("cifar10", None)
    assert "was trained on digits, and is evaluated on cifar10" in capsys.readouterr().out


def test_the_program_goes_on_where_it_was(saved, tmp_path, monkeypatch):
    """Each record is written as it comes; the same command again makes what is missing."""
    out = tmp_path / "results.json"
    arguments = ["--ckpt", str(saved), "--dataset", "digits", "--num", "3", "--width", "8",
                 "--out", str(out), "--cache-dir", str(tmp_path / "cache")]  # fmt: skip
    made, dies = [], ["test 1"]

    def network(ghn, variables, arch, image_size):
        return arch, {}

    def accuracy(arch, *params, **options):
        name = f"test {len(made)}"
        if name in dies:
            dies.remove(name)
            raise KeyboardInterrupt
        made.append(name)
        return [evaluation.Accuracy(len(made) / 10, 0.5, 100, 1.0)] * len(params)

    monkeypatch.setattr(evaluation, "predict_network", network)
    monkeypatch.setattr(evaluation, "evaluate_network", accuracy)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    (first,) = json.loads(out.read_text())
    evaluate.main(arguments)
    records = json.loads(out.read_text())
    assert records[0] == first
    assert [r["top1"] for r in records] == [0.1, 0.2, 0.3]
    assert made == ["test 0", "test 1", "test 2"]
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"has records with batch_size 64 \(now 32\); give the"):
        evaluate.main([*arguments, "--batch-size", "32"])
    out.write_text(out.read_text().replace('"top1": 0.2', '"top1": 0.9'))
    with pytest.raises(ValueError, match="record 1, is not as it was written: its digest differs"):
        evaluate.main(arguments)
    out.write_text('{"a thesis": 1}')
    with pytest.raises(ValueError, match="exists, and is no file of this program's records; give"):
        evaluate.main(arguments)
    assert out.read_text() == '{"a thesis": 1}'
    out.write_bytes(before)
    evaluate.main(arguments)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "easy"], "--split is 'easy'; allowed: .*test.*named"),
        (["--num", "0"], "--num is 0; allowed: 1 or more"),
        (["--out", "/nowhere/results.json"], "its folder does not exist"),
        (["--ckpt", "/nowhere"], "does not exist; give a folder or a checkpoint"),
        (["--dataset", "mnist"], "mnist.*cifar10"),
    ],
)
def test_what_cannot_work_ends_at_once_in_a_sentence(arguments, message, saved, tmp_path):
    options = ["--ckpt", str(saved), "--dataset", "digits", "--cache-dir", str(tmp_path / "cache")]
    with pytest.raises((ValueError, OSError), match=message) as error:
        evaluate.main([*options, *arguments])
    assert "\n" not in str(error.value)


def test_a_hypernetwork_for_other_classes_is_refused(tmp_path):
    ghn = GHN(7, max_shape=(8, 8, 11, 11))
    save_ghn(tmp_path / "ghn", ghn, ghn.init_variables(0))
    with pytest.raises(ValueError, match="digits has 10 classes, but .* classifiers for 7; give"):
        evaluate.main(["--ckpt", str(tmp_path / "ghn"), "--dataset", "digits",
                       "--cache-dir", str(tmp_path / "cache")])  # fmt: skip


@pytest.mark.parametrize(
    "arch", [evaluation_set("bnfree")[3], evaluation_set("wide")[2], named_architectures(8)["ViT"]]
)
def test_random_parameters_are_those_of_the_module(arch):
    """Their shapes come from the network's units; here from its Flax module, traced."""
    network = build_network(arch.replace(C=8), 10, 16)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), np.float32)
    expected = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    found = random_parameters(network, 16, seed=0)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
