"""Faster R-CNN's operations: each against its definition in NumPy, and torchvision's (§ 5.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghn_jax.detection import boxes as box
from ghn_jax.detection import losses, penn_fudan, roi_head, rpn
from ghn_jax.detection.anchors import anchors_at_origin, anchors_of_grid
from ghn_jax.detection.nms import suppress, suppress_by_class
from ghn_jax.detection.roi_align import roi_align
from ghn_jax.detection.sampling import match, sample


@pytest.fixture(scope="module")
def torchvision():
    """torchvision, where its operations run: it may be built for another PyTorch."""
    pytest.importorskip("torch")
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return torchvision


def random_boxes(rng, count, size=100.0, least=1.0):
    corner = rng.uniform(0, size * 0.7, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(least, size / 2, (count, 2))], 1).astype(
        np.float32
    )


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


# --- Boxes and anchors ----------------------------------------------------------------------------


def test_iou():
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 7), random_boxes(rng, 9)
    want = [[iou_of(a, b) for b in second] for a in first]
    np.testing.assert_allclose(box.iou(first, second), want, atol=1e-5)
    assert np.array_equal(box.iou(np.zeros((2, 4)), np.zeros((2, 4))), np.zeros((2, 2)))


def test_codes_of_boxes():
    rng = np.random.default_rng(1)
    boxes, references = random_boxes(rng, 20), random_boxes(rng, 20)
    weights = (10.0, 10.0, 5.0, 5.0)
    codes = np.asarray(box.encode(boxes, references, weights))
    for code, b, r in zip(codes, boxes, references, strict=True):
        (w, h), (rw, rh) = b[2:] - b[:2], r[2:] - r[:2]
        x, y, rx, ry = b[0] + w / 2, b[1] + h / 2, r[0] + rw / 2, r[1] + rh / 2
        want = [10 * (x - rx) / rw, 10 * (y - ry) / rh, 5 * np.log(w / rw), 5 * np.log(h / rh)]
        np.testing.assert_allclose(code, want, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(box.decode(codes, references, weights), boxes, atol=1e-2)
    # Codes of sizes are limited from above, and only from above.
    large, small = box.decode(np.float32([[0, 0, 9, 9], [0, 0, -9, 9]]), np.float32([0, 0, 16, 16]))
    np.testing.assert_allclose(large, [-492, -492, 508, 508], atol=1e-2)
    np.testing.assert_allclose(small[2] - small[0], 16 * np.exp(-9), atol=1e-4)


def test_boxes_in_an_image():
    clipped = box.clip(np.float32([[-5, -6, 30, 40]]), np.float32([20, 25]))
    assert clipped.tolist() == [[0, 0, 25, 20]]
    assert box.at_least(np.float32([[0, 0, 2, 3], [0, 0, 1, 3]]), 2).tolist() == [True, False]


def test_anchors():
    # torchvision's of sizes 32 and 64: ratio by ratio, rounded to even.
    want = [[-23, -11, 23, 11], [-45, -23, 45, 23], [-16, -16, 16, 16], [-32, -32, 32, 32],
            [-11, -23, 11, 23], [-23, -45, 23, 45]]  # fmt: skip
    assert anchors_at_origin((32, 64), (0.5, 1.0, 2.0)).tolist() == want
    found = anchors_of_grid((2, 3), (33, 96), (32,), (1.0,))
    assert found[:, :2].tolist() == [[x - 16, y - 16] for y in (0, 16) for x in (0, 32, 64)]


# --- Suppression ----------------------------------------------------------------------------------


def suppressed(boxes, scores, valid, threshold):
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if valid[i] and all(iou_of(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_suppression(threshold):
    rng = np.random.default_rng(2)
    run = jax.jit(lambda *x: suppress(*x, threshold=threshold, count=70))
    for _ in range(5):
        boxes, scores = random_boxes(rng, 60), rng.random(60).astype(np.float32)
        valid = rng.random(60) < 0.9
        indices, kept = run(boxes, scores, valid)
        want = suppressed(boxes, scores, valid, threshold)
        assert len(indices) == 70
        assert np.asarray(indices)[np.asarray(kept)].tolist() == want
        assert kept[: len(want)].all()


def test_suppression_of_a_chain_and_by_class():
    """Each overlaps the next: every second one stays."""
    left = np.arange(40, dtype=np.float32) * 4
    boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], 1)
    scores, valid = np.linspace(1, 0, 40, dtype=np.float32), np.ones(40, bool)
    run = jax.jit(lambda *x: suppress_by_class(*x, threshold=0.4, count=30))
    indices, kept = run(boxes, scores, np.zeros(40, int), valid)
    assert indices[kept].tolist() == list(range(0, 40, 2))
    indices, kept = run(boxes, scores, np.arange(40) % 2, valid)
    assert indices[kept].tolist() == list(range(30))


# --- ROI align ------------------------------------------------------------------------------------


def roi_aligned(features, boxes, scale, bins, samples):
    """One reading after another."""
    height, width, channels = features.shape
    found = np.zeros((len(boxes), bins, bins, channels))
    for n, (x1, y1, x2, y2) in enumerate(boxes * scale):
        w, h = max(x2 - x1, 1) / bins, max(y2 - y1, 1) / bins
        for row, column, i, j in np.ndindex(bins, bins, samples, samples):
            y, x = y1 + (row + (i + 0.5) / samples) * h, x1 + (column + (j + 0.5) / samples) * w
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            for cy, cx in np.ndindex(2, 2):
                share = abs(1 - cy - (y - top)) * abs(1 - cx - (x - left))
                cell = features[min(top + cy, height - 1), min(left + cx, width - 1)]
                found[n, row, column] += share * cell / samples**2
    return found


def test_roi_align():
    rng = np.random.default_rng(3)
    features = rng.standard_normal((6, 9, 3)).astype(np.float32)
    # Also outside of the image, and smaller than a cell.
    odd = np.float32([[-40, -30, 20, 20], [100, 60, 200, 150], [10, 10, 12, 11], [0, 0, 144, 96]])
    boxes = np.concatenate([random_boxes(rng, 10), odd])
    for bins, samples in ((7, 2), (3, 1)):
        align = jax.jit(
            lambda x, some, n=bins, m=samples: roi_align(x, some, 1 / 16, bins=n, samples=m)
        )
        found = align(features, boxes)
        want = roi_aligned(features, boxes, 1 / 16, bins, samples)
        np.testing.assert_allclose(found, want, atol=1e-5)


# --- Matching and sampling ------------------------------------------------------------------------


def matched(objects, labels, boxes, foreground, background, best_too):
    overlap = np.array([[iou_of(o, b) for b in boxes] for o in objects[labels > 0]])
    index, value = overlap.argmax(0), overlap.max(0)
    own = labels[labels > 0][index]
    found = np.where(value < background, 0, np.where(value < foreground, -1, own))
    if best_too:
        for row in overlap:
            best = np.isclose(row, row.max(), atol=1e-7)
            found[best] = own[best]
    return index, found


@pytest.mark.parametrize(("foreground", "background", "best_too"),
                         [(0.7, 0.3, True), (0.5, 0.5, False)])  # fmt: skip
def test_matching(foreground, background, best_too):
    rng = np.random.default_rng(4)
    run = jax.jit(
        lambda *x: match(*x, foreground=foreground, background=background, best_too=best_too)
    )
    seen = set()
    for _ in range(4):
        objects, boxes = random_boxes(rng, 5), random_boxes(rng, 80)
        labels = np.array([1, 2, 1, 0, 0])
        index, found = run(objects, labels, boxes)
        want_index, want = matched(objects, labels, boxes, foreground, background, best_too)
        assert found.tolist() == want.tolist()
        assert index[found > 0].tolist() == want_index[want > 0].tolist()
        seen |= {*want.tolist()}
    assert seen >= ({-1, 0, 1, 2} if best_too else {0, 1})
    # An image without objects is background.
    _, found = run(np.zeros((5, 4), np.float32), np.zeros(5, int), boxes)
    assert not found.any()


def test_samples():
    labels = jnp.array([1] * 5 + [2] * 25 + [0] * 100 + [-1] * 70)
    keys = jax.random.split(jax.random.key(0), 30)
    draws = jax.vmap(lambda key: sample(key, labels, count=40, share=0.25))
    draws = list(zip(*jax.device_get(jax.jit(draws)(keys)), strict=True))
    for indices, drawn in draws:
        assert drawn.all() and len(set(indices.tolist())) == 40
        of = np.asarray(labels)[indices]
        assert (of[:10] > 0).all() and (of[10:] == 0).all()
    # All are drawn at times, and each as often as others.
    counts = np.bincount(np.concatenate([indices for indices, _ in draws]), minlength=200)
    assert counts[:30].sum() == 300 and counts[:30].max() < 20 and counts[:30].min() > 1
    # Where objects are few, background fills up; where both are, less is drawn.
    indices, drawn = sample(jax.random.key(0), labels[:40], count=30, share=1.0)
    assert drawn.sum() == 30 and (labels[indices] > 0).sum() == 30
    indices, drawn = sample(jax.random.key(0), labels[20:40], count=30, share=0.25)
    assert len(indices) == 30 and drawn.sum() == 17
    assert (labels[20:40][indices[drawn]] > 0).sum() == 7


# --- Losses ---------------------------------------------------------------------------------------


def test_losses():
    rng = np.random.default_rng(5)
    codes, targets = rng.standard_normal((2, 30, 4)).astype(np.float32)
    objects, drawn = rng.random(30) < 0.3, np.arange(30) < 20
    objects &= drawn
    want = 0.0
    for d in np.abs(codes - targets)[objects].ravel():
        want += 4.5 * d**2 if d < 1 / 9 else d - 1 / 18
    found, gradient = jax.value_and_grad(losses.box_loss)(
        codes, np.where(objects[:, None], targets, np.inf), objects, drawn
    )
    assert found == pytest.approx(want / 20, rel=1e-5)
    assert np.isfinite(gradient).all() and not gradient[~objects].any()
    logits = rng.standard_normal(30).astype(np.float32)
    chance = 1 / (1 + np.exp(-logits))
    each = -np.log(np.where(objects, chance, 1 - chance))
    assert losses.objectness_loss(logits, objects, drawn) == pytest.approx(each[:20].mean(), 1e-5)
    logits, labels = rng.standard_normal((30, 3)).astype(np.float32), rng.integers(0, 3, 30)
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(30), labels]
    labels[20:] = -1
    assert losses.class_loss(logits, labels, drawn) == pytest.approx(each[:20].mean(), 1e-5)


def test_losses_of_proposals():
    """Of so few anchors that all are drawn: objects from 0.7 on, background below 0.3."""
    rng = np.random.default_rng(6)
    objects = np.stack([random_boxes(rng, 2, least=20), random_boxes(rng, 2, least=20)])
    marks = np.array([[1, 1], [1, 0]])  # the last is padding
    moved = objects.reshape(-1, 4)[rng.integers(4, size=150)]
    anchors = moved + rng.normal(0, 6, moved.shape).astype(np.float32)
    anchors[:, 2:] = np.maximum(anchors[:, 2:], anchors[:, :2] + 1)
    logits = rng.standard_normal((2, 150)).astype(np.float32)
    codes = rng.standard_normal((2, 150, 4)).astype(np.float32)
    kinds, terms, distance = [], [], 0.0
    for image in range(2):
        real = objects[image][marks[image] > 0]
        overlap = np.array([[iou_of(o, a) for a in anchors] for o in real])
        best = overlap == overlap.max(1, keepdims=True)
        positive = (overlap.max(0) >= 0.7) | best.any(0)
        negative = (overlap.max(0) < 0.3) & ~positive
        kinds += [positive.sum(), negative.sum(), 150 - (positive | negative).sum()]
        chance = 1 / (1 + np.exp(-logits[image]))
        terms += [*-np.log(chance[positive]), *-np.log(1 - chance[negative])]
        targets = np.asarray(box.encode(real[overlap.argmax(0)], anchors))
        for d in np.abs(codes[image] - targets)[positive].ravel():
            distance += 4.5 * d**2 if d < 1 / 9 else d - 1 / 18
    assert min(kinds) > 5 and max(kinds[0], kinds[3]) < 128
    found = jax.jit(rpn.rpn_losses)(jax.random.key(0), logits, codes, anchors, objects, marks)
    assert found[0] == pytest.approx(np.mean(terms), rel=1e-4)
    assert found[1] == pytest.approx(distance / len(terms), rel=1e-4)


def test_proposals():
    rng = np.random.default_rng(6)
    anchors = anchors_of_grid((5, 5), (80, 80), (16, 32), (1.0, 2.0))
    logits = rng.standard_normal(100).astype(np.float32)
    codes = 0.3 * rng.standard_normal((100, 4)).astype(np.float32)
    size = np.float32([70, 60])
    propose = jax.jit(rpn.propose, static_argnums=4)
    found, valid = propose(logits, codes, anchors, size, 40)
    order = np.argsort(-logits)[:40]
    boxes = np.asarray(box.clip(box.decode(codes, anchors), size))[order]
    large = (boxes[:, 2:] - boxes[:, :2]).min(1) >= 1e-3
    want = boxes[suppressed(boxes, logits[order], large, 0.7)]
    assert len(want) < 40
    np.testing.assert_allclose(found[valid], want, atol=1e-5)
    found, valid = propose(logits, codes, anchors, size, 300)
    assert found.shape == (300, 4) and 40 < valid.sum() < 100


def test_detections():
    """By class, without what is unlikely or padding, in the image; the best come first."""
    proposals = np.float32([[[0, 0, 20, 20], [1, 0, 21, 20], [40, 40, 90, 60], [0, 0, 9, 9]]])
    logits = np.log(
        np.float32([[[0.1, 0.7, 0.2], [0.1, 0.8, 0.1], [0.9, 0.04, 0.06], [0.1, 0.1, 0.8]]])
    )
    found = jax.jit(roi_head.detections)(
        logits, np.zeros((1, 4, 3, 4), np.float32), proposals, np.array([[True] * 3 + [False]]),
        np.float32([[50, 60]]),
    )  # fmt: skip
    there = np.asarray(found.labels[0]) > 0
    assert found.boxes.shape == (1, 100, 4) and there.sum() == 3
    np.testing.assert_allclose(found.scores[0, :3], [0.8, 0.2, 0.06], atol=1e-6)
    assert found.labels[0, :3].tolist() == [1, 2, 2]
    assert found.boxes[0, 2].tolist() == [40, 40, 60, 50]
    assert not found.scores[0, 3:].any()


def test_regions():
    """True boxes are among them, and codes say how to get to the objects."""
    objects = np.float32([[10, 10, 30, 50], [0, 0, 0, 0]])
    proposals = np.float32([[12, 10, 30, 50], [60, 60, 80, 90], [0, 0, 0, 0], [11, 11, 30, 50]])
    regions = jax.jit(roi_head.choose_regions, static_argnums=5)(
        jax.random.key(0), proposals, np.array([True, True, False, False]), objects,
        np.array([1, 0]), 12,
    )  # fmt: skip
    assert regions.drawn.sum() == 3 and (regions.labels[regions.drawn] == 1).sum() == 2
    inside = regions.drawn & (regions.labels == 1)
    assert (regions.boxes[inside] == objects[0]).all(1).any()
    back = box.decode(regions.codes[inside], regions.boxes[inside], (10, 10, 5, 5))
    np.testing.assert_allclose(back, objects[[0, 0]], atol=1e-4)


def test_against_torchvision(torchvision):
    import torch

    ops, of = torchvision.ops, torch.from_numpy
    detection = torchvision.models.detection
    coder = detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    rng = np.random.default_rng(7)
    boxes, references = random_boxes(rng, 50), random_boxes(rng, 50)
    np.testing.assert_allclose(
        box.iou(boxes, references), ops.box_iou(of(boxes), of(references)), atol=1e-5
    )
    codes = coder.encode_single(of(boxes), of(references)).numpy()
    np.testing.assert_allclose(box.encode(boxes, references, (10, 10, 5, 5)), codes, atol=1e-3)
    codes = 8 * rng.standard_normal((50, 4)).astype(np.float32)
    want = coder.decode_single(of(codes), of(references))
    np.testing.assert_allclose(
        box.decode(codes, references, (10, 10, 5, 5)), want, rtol=1e-3, atol=1e-2
    )
    scores = rng.random(50).astype(np.float32)
    indices, kept = suppress(boxes, scores, np.ones(50, bool), threshold=0.4, count=50)
    assert indices[kept].tolist() == ops.nms(of(boxes), of(scores), 0.4).tolist()
    features = rng.standard_normal((6, 9, 3)).astype(np.float32)
    rois = np.concatenate([boxes - 10, references + 60])
    want = ops.roi_align(
        of(features.transpose(2, 0, 1)[None].copy()), [of(rois)], 7, 1 / 16, 2
    ).numpy()
    np.testing.assert_allclose(roi_align(features, rois, 1 / 16).transpose(0, 3, 1, 2), want,
                               atol=1e-5)  # fmt: skip
    for high, low, best in ((0.7, 0.3, True), (0.5, 0.5, False)):
        matcher = detection._utils.Matcher(high, low, best)
        want = matcher(ops.box_iou(of(boxes[:4]), of(references))).numpy()
        index, found = match(
            boxes[:4], np.ones(4, int), references, foreground=high, background=low, best_too=best
        )
        assert found.tolist() == np.where(want >= 0, 1, np.where(want == -1, 0, -1)).tolist()
        assert index[want >= 0].tolist() == want[want >= 0].tolist()
    sizes, ratios = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
    generator = detection.anchor_utils.AnchorGenerator((sizes,), (ratios,))
    images = detection.image_list.ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])
    (want,) = generator(images, [torch.zeros(1, 8, 3, 5)])
    assert np.array_equal(anchors_of_grid((3, 5), (96, 160), sizes, ratios), want.numpy())
    pixels = rng.random((33, 47, 3), np.float32)
    transform = detection.transform.GeneralizedRCNNTransform(60, 80, [0.0] * 3, [1.0] * 3)
    target = {"boxes": torch.tensor([[1.0, 2.0, 30.0, 20.0]])}
    found, (target,) = transform([of(pixels.transpose(2, 0, 1).copy())], [target])
    size = penn_fudan.scaled((33, 47), 60, 80)
    assert found.image_sizes == [size]
    ours = penn_fudan.resize(pixels, size)
    want = found.tensors[0].numpy().transpose(1, 2, 0)[: size[0], : size[1]]
    np.testing.assert_allclose(ours, want, atol=1e-5)
    ratio = penn_fudan._ratios((33, 47), size)
    np.testing.assert_allclose(target["boxes"][0], np.array([1, 2, 30, 20]) * ratio, rtol=1e-6)
