"""What a run leaves to look at: its log, learning curves, and bad updates that can be repeated."""

import json
import logging
import re
import shutil
import sys
import time
import types
import warnings
from contextlib import closing

import jax
import numpy as np
import pytest

from ghn_jax.cli import train
from ghn_jax.data.images import load_images
from ghn_jax.deepnets1m.architecture import Architecture, Genotype
from ghn_jax.deepnets1m.sampling import sample_architecture
from ghn_jax.engine.compilation import CompilationCounter, keep_programs
from ghn_jax.evaluation.validation import load_validation
from ghn_jax.hypernet.checkpoint import Checkpoints, save_ghn
from ghn_jax.hypernet.ghn import GHN
from ghn_jax.training import loop, replay
from ghn_jax.training.config import preset
from ghn_jax.training.log import Log, Validated
from ghn_jax.training.train_log import train_log
from ghn_jax.training.update import Metrics

EDGES = (("conv_1x1", 0), ("skip_connect", 1))
NORMED = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), n_cells=3, C=8, fc_layers=1)
# The parameters that the hypernetwork below predicts are far too large. Batch norm takes that out;
# without it, one layer after another makes the values larger, beyond all numbers.
BARE = NORMED.replace(norm=None)
GHN_ = GHN(max_shape=(16, 16, 7, 7))


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits):
    """Two runs of three updates, of which the second is not finite; one of them is watched."""
    folder = tmp_path_factory.mktemp("runs")
    variables = jax.tree.map(np.array, GHN_.init_variables(0))
    variables["params"]["decoder"]["conv_1"]["kernel"] *= 1e8
    save_ghn(folder / "large", GHN_, variables)
    nets = [NORMED, NORMED, NORMED, BARE, NORMED, NORMED]
    (folder / "nets.json").write_text(
        json.dumps({f"net {i}": arch.to_dict() for i, arch in enumerate(nets)})
    )
    keep_programs(folder / "cache")
    for name, options in (("plain", {}), ("watched", {"validate_every": 2, "validate_nets": 1})):
        options = config(folder, name, **options)
        loop.train(options, digits, load_validation(options))
    return folder


@pytest.fixture
def kept(runs):
    """The programs of the two runs."""
    keep_programs(runs / "cache")


def config(folder, name, **options):
    return preset("demo").replace(
        out=folder / name, cache_dir=folder / "cache", tile_channels=16, batch_size=8, meta_batch=2,
        steps=3, save_every=1, n_cells=(1, 1), nodes=(1, 1),
        **{"init": folder / "large", "nets": folder / "nets.json", **options},
    )  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def parameters(folder, upto=None):
    like = jax.eval_shape(lambda: GHN_.init_variables(0))["params"]
    return Checkpoints(folder).load(upto=upto, params=like)[2]["params"]


# --- Bad updates ----------------------------------------------------------------------------------


def test_a_bad_update_is_repeated_and_what_made_it_so_is_named(runs, kept, capsys):
    before = files(runs / "plain")
    assert [r["loss"] is None for r in records(runs / "plain")] == [False, True, False]
    train.main(["--out", str(runs / "plain"), "--replay", "2", "--cache-dir", str(runs / "cache")])
    text = capsys.readouterr().out
    assert "update 2: loss nan, norm of the gradient nan; on record: loss nan, norm nan" in text
    assert "those that it had, made again from the checkpoint of update 1" in text
    good, bad = (line for line in text.splitlines() if line.startswith("update 2, "))
    assert re.fullmatch(r"update 2, 0 +[\d.e+]+ +[\d.e+]+ +-", good)
    assert re.match(r"update 2, 1 +nan +nan +output of ", bad)
    assert files(runs / "plain") == before


def test_the_parameters_are_those_that_the_update_had(runs, kept, digits):
    """From the checkpoint before it, or from the start with all updates in between made again."""
    first = parameters(runs / "plain", upto=1)
    assert Checkpoints(runs / "plain").steps() == [1, 3]
    shutil.copytree(runs / "plain", runs / "late")
    shutil.rmtree(runs / "late" / "checkpoints" / "1")
    run, nets = loop.new_run(config(runs, "late"), digits), (NORMED, BARE)
    with closing(run.step):
        # Beyond what is between two checkpoints, nothing is made again.
        found, words = replay._before(run, digits, nets, 2)
        assert words.startswith("those after update 3, the first checkpoint that is kept")
        jax.tree.map(np.testing.assert_array_equal, found.state.params, parameters(runs / "late"))
        other, words = replay._before(run, digits, (BARE, BARE), 4)
        assert words == (
            "those of the checkpoint of update 3, after which the run went on with other "
            "architectures"
        )
        run = run._replace(config=run.config.replace(save_every=2))
        found, words = replay._before(run, digits, nets, 2)
        assert words == "those that it had, made again from the start of the run"
        jax.tree.map(np.testing.assert_array_equal, found.state.params, first)


def test_updates_that_cannot_be_repeated(runs, digits, tmp_path):
    with pytest.raises(ValueError, match=r"--replay is 3; updates on record in .*: 2$"):
        replay.replay(config(runs, "plain", replay=3), digits)
    with pytest.raises(ValueError, match=r"--replay is 1; .*: none$"):
        replay.replay(config(tmp_path, "nothing", replay=1), digits)
    with pytest.raises(ValueError, match=r"started with --seed 0 \(now 1\)"):
        replay.replay(config(runs, "plain", replay=2, seed=1), digits)
    with pytest.raises(ValueError, match="--replay is 0; allowed: 1 or more"):
        loop.check(config(runs, "plain", replay=0))


# --- Learning curves ------------------------------------------------------------------------------


def test_a_learning_curve_changes_nothing(runs):
    plain, watched = records(runs / "plain"), records(runs / "watched")
    assert ["val_top1" in r for r in watched] == [False, True, False]
    assert not any("val_top1" in r for r in plain)
    for one, other in zip(plain, watched, strict=True):
        for key in ("step", "loss", "top1", "grad_norm", "nodes", "architectures"):
            assert one[key] == other[key], key
    jax.tree.map(
        np.testing.assert_array_equal, parameters(runs / "plain"), parameters(runs / "watched")
    )


def test_measuring_is_of_no_updates_time(runs, kept, tmp_path, digits):
    (tmp_path / "nets.json").write_text(
        json.dumps({f"net {i}": NORMED.to_dict() for i in range(2)})
    )
    options = config(tmp_path, "run", init=None, validate_every=2).replace(steps=4, save_every=100)

    def slow(ghn, params, engine):
        time.sleep(5)
        return Validated(0.5, 5.0)

    loop.train(options, digits, slow)
    seconds = [record["seconds"] for record in records(tmp_path / "run")]
    assert len(seconds) == 4
    assert all(0 < t < 5 for t in seconds[1:])


def test_accuracies_are_of_the_parameters_at_that_time(runs, kept, digits):
    """Those before update 2, as it was passed over."""
    validation = load_validation(config(runs, "watched", validate_nets=1))
    assert validation.images.split == "val"
    run = loop.new_run(config(runs, "watched"), digits)
    with closing(run.step):
        point = validation(GHN_, parameters(runs / "watched", upto=1), run.step.engine)
    found = records(runs / "watched")[1]
    assert found["val_top1"] == point.top1
    assert 0 <= point.top1 < 1
    assert found["val_seconds"] > 0


def test_validated_networks_are_of_the_rules_and_not_of_the_training_stream():
    options = preset("demo").replace(validate_nets=5, seed=3)
    found = [arch for _, arch in load_validation(options).architectures]
    rules = options.space.rules(16)
    stream = [sample_architecture("train", 3, i, rules=rules) for i in range(50)]
    assert len(set(found)) == 5
    assert not set(found) & set(stream)
    assert all(a.C == 8 and a.n_cells in (3, 4) and a.norm for a in found)
    assert found == [arch for _, arch in load_validation(options).architectures]


def test_curves_for_tensorboard(tmp_path):
    """Of a run that goes on from update 2: TensorBoard hides what was made after it before."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    options = config(tmp_path, "run", tensorboard=True)
    options.run.out.mkdir()
    batch = types.SimpleNamespace(architectures=(NORMED,), nodes=20)
    for done, total in ((0, 4), (2, 5)):
        log = Log(options, done, total, done, CompilationCounter())
        with closing(log):
            for step in range(done + 1, total + 1):
                metrics = Metrics(np.float32(10 * total + step), 0.25, 2.0, step != 5, 0)
                log.update(step, metrics, batch, 0.0, Validated(0.5, 0.1) if step == 4 else None)
    points, hidden = {}, []
    for path in sorted((tmp_path / "run" / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.session_log.status == event_pb2.SessionLog.START:
                hidden.append(event.step)
            for value in event.summary.value:
                points.setdefault(value.tag, {}).setdefault(event.step, []).append(
                    value.simple_value
                )
    assert hidden == [1, 3]
    assert {step: sorted(found) for step, found in points["loss"].items()} == {
        1: [41], 2: [42], 3: [43, 53], 4: [44, 54],
    }  # fmt: skip
    assert points["val_top1"] == {4: [0.5, 0.5]}
    assert list(points["top1"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("option", ["validate_every", "validate_nets"])
def test_numbers_of_curves(option, tmp_path):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} is 0; allowed: 1 or more"):
        loop.check(config(tmp_path, "run", **{option: 0}))


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(
        sys,
        "argv",
        ["ghn-train", "--preset", "demo", "--out", str(tmp_path / "run"), "--tensorboard"],
    )
    with pytest.raises(SystemExit, match=r"needs tensorboardX; .*ghn_jax\[tensorboard\]"):
        train.run()
    assert not (tmp_path / "run").exists()


def test_images_for_the_curve_are_asked_for_before_any_work(digits, tmp_path):
    out = str(tmp_path / "run")
    arguments = ["--preset", "demo", "--out", out, "--validate-every", "1", "--dataset"]
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        train.main([*arguments, "npz:/nowhere.npz"])
    with pytest.raises(ValueError, match="--validate-every is 1, but .* load_validation"):
        loop.train(config(tmp_path, "run", validate_every=1, init=None, nets=None), digits)
    assert not (tmp_path / "run").exists()


# --- train.log ------------------------------------------------------------------------------------


def events(folder):
    lines = (folder / "train.log").read_text().splitlines()
    parts = [re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ([A-Z]+) (.+)", line)
             for line in lines]  # fmt: skip
    assert all(parts)
    return [(part[2], part[3]) for part in parts]


def test_the_log_tells_what_happened(runs):
    start, versions, devices, bad, end = events(runs / "watched")
    kind, _, options = start[1].partition(" options ")
    assert (start[0], kind) == ("INFO", "started,")
    assert (
        json.loads(options) == config(runs, "watched", validate_every=2, validate_nets=1).describe()
    )
    assert f"jax {jax.__version__}" in versions[1]
    assert devices[1] == f"devices: 2 of {jax.devices()[0].device_kind}; processes: 1"
    assert bad[0] == "WARNING"
    assert bad[1].startswith("update 2 passed over, as its numbers are not finite")
    assert end[1].startswith("3 updates; ")


def test_warnings_errors_and_what_libraries_say_are_logged(tmp_path, capsys):
    out = config(tmp_path, "run")
    out.run.out.mkdir()
    show = warnings.showwarning
    with pytest.raises(OSError, match="full"), train_log(out):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("two\nlines", stacklevel=1)
        logging.getLogger("ghn_jax.engine.compilation").warning("without %s", "an option")
        raise OSError("the disk is full")
    assert [*events(out.run.out)[3:]] == [
        ("WARNING", "UserWarning: two lines"),
        ("WARNING", "without an option"),
        ("ERROR", "ended by OSError: the disk is full"),
    ]
    assert warnings.showwarning is show
    with train_log(out):
        pass
    assert [text.split(",")[0] for _, text in events(out.run.out)].count("started") == 2
