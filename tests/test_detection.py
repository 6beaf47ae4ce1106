"""Faster R-CNN on our networks: backbones, photographs, and the whole on drawn scenes (§ 5.3)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from ghn_jax.cli import paper
from ghn_jax.deepnets1m.architecture import VIT, Architecture, Genotype
from ghn_jax.deepnets1m.network import build_network
from ghn_jax.deepnets1m.wiring import wire
from ghn_jax.detection import boxes as box
from ghn_jax.detection.backbone import make_backbone
from ghn_jax.detection.detector import Detector, DetectorTraining
from ghn_jax.detection.penn_fudan import Frame, flip, read_penn_fudan, split
from ghn_jax.detection.scenes import write_scenes
from ghn_jax.evaluation.accuracy import random_parameters
from ghn_jax.evaluation.experiments import detection as experiment
from ghn_jax.evaluation.experiments.records import read_records
from ghn_jax.hypernet.checkpoint import save_ghn
from ghn_jax.hypernet.ghn import GHN

EDGES = (("conv_3x3", 0), ("max_pool_3x3", 1))
SMALL = Architecture(Genotype(EDGES, (2,), EDGES, (2,)), 3, C=8)


# --- Backbones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [SMALL, SMALL.replace(norm=None),
                                  Architecture(VIT, 1, C=8, C_mult=1, preproc=False)],
                         ids=["bn", "bnfree", "vit"])  # fmt: skip
def test_backbone_is_the_network_before_its_classifier(arch):
    images = np.random.default_rng(8).standard_normal((2, 32, 32, 3)).astype(np.float32)
    channels = wire(arch).head.dims[0]
    network, backbone = build_network(arch, channels, 32), make_backbone(arch, 32)
    params = random_parameters(network, 32, seed=0)
    # What such a classifier gives are the features' means.
    params["classifier_0"] = {"kernel": jnp.eye(channels), "bias": jnp.zeros(channels)}
    means = jax.jit(network.apply)({"params": params}, images)
    own = {name: tree for name, tree in params.items() if name != "classifier_0"}
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes["params"])
    initial = {
        name: jnp.stack([jnp.zeros(x.shape[1]), jnp.ones(x.shape[1])])
        for name, x in shapes.get("batch_stats", {}).items()
    }
    run = jax.jit(backbone.apply, static_argnames=("train", "mutable"))
    features, state = run(
        {"params": own, "batch_stats": initial}, images, train=True, mutable=("batch_stats",)
    )
    np.testing.assert_allclose(features.mean((1, 2)), means, atol=2e-4)
    if arch is SMALL:
        x = jax.lax.conv_general_dilated(
            images, own["stem_0"]["kernel"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).reshape(-1, 24)  # fmt: skip
        want = np.stack([0.1 * x.mean(0), 0.9 + 0.1 * x.var(0, ddof=1)])
        np.testing.assert_allclose(state["batch_stats"]["stem.1.weight"], want, atol=1e-4)
        # With the batch's own statistics as averages, both modes agree.
        averages = jax.tree.map(lambda a, b: a + 10 * (b - a), initial, state["batch_stats"])
        tested = run({"params": own, "batch_stats": averages}, images)
        np.testing.assert_allclose(tested, features, rtol=0.05, atol=0.02)
    wide = np.zeros((1, 40, 64, 3), np.float32)  # of another shape than the network is for
    variables = {"params": own, "batch_stats": initial}
    assert jax.eval_shape(lambda x: backbone.apply(variables, x), wide).ndim == 4


def test_backbones_of_the_zoo():
    backbone = make_backbone("resnet50")
    features = jax.eval_shape(
        lambda: backbone.init_with_output(jax.random.key(0), jnp.zeros((1, 64, 96, 3)))
    )
    assert features[0].shape == (1, 2, 3, 2048) and "fc" not in features[1]["params"]
    with pytest.raises(ValueError, match="vit_b_16 is no backbone of a detector; allowed: netw.*,"):
        make_backbone("vit_b_16")


# --- Photographs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 12, height=96)


def test_scenes_are_read(scenes):
    photographs = read_penn_fudan(scenes.parent)
    assert [p.name for p in photographs] == [f"Scene{i:05}" for i in range(12)]
    first, again = photographs[0], read_penn_fudan(scenes)[0]
    assert np.array_equal(first.pixels, again.pixels) and first.pixels.shape[0] == 96
    mask = np.asarray(Image.open(scenes / "PedMasks" / "Scene00000_mask.png"))
    for number, found in enumerate(first.boxes.astype(int), 1):
        x1, y1, x2, y2 = found
        assert (mask == number).sum() == (mask[y1 : y2 + 1, x1 : x2 + 1] == number).sum() > 0
        assert (mask[y1] == number).any() and (mask[:, x2] == number).any()
    train, test = split(photographs, 4, seed=1)
    assert len(train) == 8 and {p.name for p in train + test} == {p.name for p in photographs}
    assert [p.name for p in split(photographs, 4, seed=2)[1]] != [p.name for p in test]
    with pytest.raises(ValueError, match="12 test images are asked for; allowed: 1 to 11"):
        split(photographs, 12, seed=0)


def test_batches_are_flipped_resized_and_padded(scenes):
    photographs = read_penn_fudan(scenes)
    frame = Frame.around(photographs, 120, 130)
    batch = frame.batch([photographs[0], flip(photographs[0])])
    assert batch.images.shape[1:3] == (frame.height, frame.width) and frame.height % 32 == 0
    height, width = batch.sizes[0].astype(int)
    assert max(height, width) <= 130 and (min(height, width) == 120 or max(height, width) >= 129)
    np.testing.assert_allclose(
        batch.images[0, :height, :width], batch.images[1, :height, :width][:, ::-1], atol=1e-4
    )
    assert not batch.images[:, height:].any() and not batch.images[:, :, width:].any()
    n = len(photographs[0].boxes)
    assert (batch.labels[0] > 0).sum() == n
    np.testing.assert_allclose(batch.boxes[1, :n, 0], width - batch.boxes[0, :n, 2], rtol=1e-5)
    np.testing.assert_allclose(batch.boxes[1, :n, 1], batch.boxes[0, :n, 1])
    np.testing.assert_allclose(
        frame.unscale(batch.boxes[0, :n], photographs[0]), photographs[0].boxes, rtol=1e-5
    )


def test_folders_that_are_not_penn_fudans(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no folder PNGImages.*jshi/ped_html"):
        read_penn_fudan(tmp_path)
    images, masks = (tmp_path / name for name in ("PNGImages", "PedMasks"))
    images.mkdir()
    with pytest.raises(FileNotFoundError, match="has no folder PedMasks"):
        read_penn_fudan(tmp_path)
    masks.mkdir()
    with pytest.raises(FileNotFoundError, match="has no PNG files"):
        read_penn_fudan(tmp_path)
    Image.new("RGB", (8, 6)).save(images / "a.png")
    with pytest.raises(FileNotFoundError, match="a.png has no mask"):
        read_penn_fudan(tmp_path)
    mask, thin = np.zeros((2, 6, 8), np.uint8)
    thin[1:4, 2] = 1
    for wrong, message in (
        (mask, "shows no pedestrian"),
        (thin, "number 1, that is one pixel wide"),
        (mask[:3], r"shape \(3, 8\), but a.png \(6, 8\)"),
    ):
        Image.fromarray(wrong).save(masks / "a_mask.png")
        with pytest.raises(ValueError, match=message):
            read_penn_fudan(tmp_path)
    (masks / "a_mask.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_penn_fudan(tmp_path)


def test_average_precision():
    """Three objects; the best detection is right, the second wrong, the third right."""
    pytest.importorskip("pycocotools")
    from ghn_jax.detection.average_precision import average_precision

    objects = [np.float32([[0, 0, 40, 40], [50, 50, 90, 90]]), np.float32([[10, 10, 60, 60]])]
    boxes = [np.float32([[0, 0, 40, 30], [45, 0, 90, 40]]), np.float32([[10, 10, 60, 60]])]
    scores = [np.float32([0.9, 0.8]), np.float32([0.7])]
    ap50, ap = average_precision(objects, boxes, scores)
    # Precision 1 up to a recall of 1/3 (34 of 101 points), 2/3 up to 2/3 (33 points), then 0.
    assert ap50 == pytest.approx((34 + 33 * 2 / 3) / 101)
    # An overlap of 0.75 is enough for six of the ten thresholds; else one of three is right.
    assert ap == pytest.approx((6 * ap50 + 4 * 34 / 3 / 101) / 10)
    assert average_precision(objects, [np.zeros((0, 4))] * 2, [np.zeros(0)] * 2) == (0.0, 0.0)


# --- The whole ------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Three strided convolutions."""

    @nn.compact
    def __call__(self, x, *, train=False):
        for i, channels in enumerate((8, 16, 16)):
            x = nn.Conv(channels, (5, 5), 2 if i else 4, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        return x


def _found(training, state, batch):
    """The mean over objects of the best IoU with one of the three most likely detections."""
    found = jax.device_get(training.detect(state, batch))
    best = []
    for boxes, objects, labels in zip(found.boxes, batch.boxes, batch.labels, strict=True):
        best += np.asarray(box.iou(objects[labels > 0], boxes[:3])).max(1).tolist()
    return np.mean(best)


def test_a_detector_learns(scenes):
    photographs = read_penn_fudan(scenes)
    frame = Frame.around(photographs, 64, 96)
    detector = Detector(
        Tiny(), anchor_sizes=(16, 32), train_proposals=60, test_proposals=30, regions=24, hidden=32
    )
    training = DetectorTraining(detector, optax.sgd(0.05, momentum=0.9), seed=0)
    batch = frame.batch(photographs[:4])
    state = training.init(batch)
    before, seen = _found(training, state, batch), []
    for step in range(60):
        state, some = training.step(state, frame.batch(photographs[step % 2 * 2 :][:4]))
        seen.append(float(sum(some)))
    assert training._update._cache_size() == 1
    assert np.isfinite(seen).all() and np.mean(seen[-6:]) < 0.6 * np.mean(seen[:6])
    after = _found(training, state, batch)
    assert after > before + 0.25, (before, after)
    # The head's losses do not move proposals: they are given to it.
    params = {"params": state.variables["params"]}
    others = {k: v for k, v in state.variables.items() if k != "params"}

    def head(variables):
        some, _ = detector.apply(
            {**variables, **others}, batch, jax.random.key(0), method=detector.losses,
            mutable=list(others),
        )  # fmt: skip
        return some.classes + some.boxes

    gradient = jax.jit(jax.grad(head))(params)["params"]
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient["rpn"]))
    assert any(np.asarray(g).any() for g in jax.tree.leaves(gradient["backbone"]))
    # The same seed draws the same anchors and regions.
    again = training.init(batch)
    assert float(sum(training.step(again, frame.batch(photographs[:4]))[1])) == seen[0]
    with pytest.raises(ValueError, match="the parameters do not fit the backbone"):
        training.init(batch, {"conv0": {"kernel": np.zeros(3)}})


def test_rate():
    config = experiment.Config()
    change = experiment.optimizer(dataclasses.replace(config, weight_decay=0.5), 60)
    params, rates = {"w": jnp.array(2.0)}, []
    state = change.init(params)
    for step in (0, 1, 30, 59, 60, 179, 180, 360, 540):
        counted = jax.tree.map(
            lambda x, step=step: jnp.array(step, x.dtype) if x.dtype == jnp.int32 else x, state
        )
        changes, _ = change.update({"w": jnp.array(0.0)}, counted, params)
        rates.append(float(-changes["w"]))  # of the weight decay alone: 0.5 * 2
    warm = [0.001 * (1 - s / 59) + s / 59 for s in (0, 1, 30, 59)]
    want = 0.005 * np.array([*warm, 1, 1, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(rates, want, rtol=1e-4)


def test_by_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocotools")
    ghn = GHN(max_shape=(8, 8, 7, 7))
    save_ghn(tmp_path / "one", ghn, ghn.init_variables(0))
    monkeypatch.setattr(experiment, "networks", lambda config: [("small", SMALL)])
    out = tmp_path / "out"
    arguments = ["detection", "--quick", "--ghn", str(tmp_path / "one"), "--out", str(out),
                 "--scenes", "7", "--test-images", "3", "--shorter", "64", "--longer", "96",
                 "--network-image-size", "32", "--anchor-sizes", "32", "--proposals", "20",
                 "--regions", "8", "--hidden", "8", "--epochs", "1"]  # fmt: skip
    paper.main(arguments)
    records = read_records(out)
    assert list(records) == ["small from He, seed 0", "small from one, seed 0"]
    assert all(0 <= r["ap50"] <= 1 and len(r["loss"]) == 1 for r in records.values())
    for where in ("He", "one"):
        assert (out / f"small from {where}.png").stat().st_size > 10_000
    assert "| GHN-2, the paper | - |" in capsys.readouterr().out
    paper.main(arguments)  # nothing is computed again
    assert read_records(out) == records
    for wrong, message in (
        (["--data", str(tmp_path)], "give either --data, the folder PennFudanPed"),
        (["--epochs", "0"], "--epochs is 0; use a number above 0"),
        (["--scenes", "5"], "--batch-size is 4, but there are 2 training"),
        (["--trained", str(tmp_path)], "there is no .*DARTS.safetensors; make it with"),
    ):
        with pytest.raises(ValueError, match=message):
            paper.main([*arguments, "--out", str(tmp_path / "other"), *wrong])


def test_paper_networks():
    found = dict(experiment.networks(experiment.Config()))
    assert found["resnet50"] == "resnet50" and found["DARTS"].n_cells == 14
    shapes = {
        name: jax.eval_shape(
            lambda network=network: make_backbone(network).init_with_output(
                jax.random.key(0), jnp.zeros((1, 320, 544, 3))
            )[0]
        ).shape
        for name, network in found.items()
    }
    assert shapes == {"resnet50": (1, 10, 17, 2048), "ViT": (1, 20, 34, 128),
                      "DARTS": (1, 10, 17, 768)}  # fmt: skip
    with pytest.raises(ValueError, match="there is no network 'VIT'"):
        experiment.networks(experiment.Config(networks=("VIT",)))
