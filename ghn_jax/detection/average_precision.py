"""Average precision of detections, by pycocotools: the judge of COCO's and of the paper's numbers.

It is the reference implementation; its definition has many details, and rewriting them would not
make numbers more comparable.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(
    objects: Sequence[np.ndarray], boxes: Sequence[np.ndarray], scores: Sequence[np.ndarray]
) -> tuple[float, float]:
    """AP of one class at an IoU of 0.5, and its mean over IoUs from 0.5 to 0.95.

    Args:
      objects: of each image (N, 4) true boxes.
      boxes: of each image (M, 4) detections; of more than 100 the best ones count.
      scores: of each image (M,).
    """
    images = [{"id": i} for i in range(1, len(objects) + 1)]
    truth = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3],
         "iscrowd": 0}
        for n, (i, box) in enumerate(
            ((i, box) for i, some in enumerate(objects, 1) for box in _corner_and_size(some)), 1
        )
    ]  # fmt: skip
    found = [
        {"image_id": i, "category_id": 1, "bbox": box, "score": float(score)}
        for i, (some, of_some) in enumerate(zip(boxes, scores, strict=True), 1)
        for box, score in zip(_corner_and_size(some), of_some, strict=True)
    ]
    if not found:  # pycocotools reads the first one to see what they are
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its steps
        coco = COCO()
        coco.dataset = {
            "images": images, "annotations": truth, "categories": [{"id": 1}], "info": {}
        }  # fmt: skip
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[1]), float(evaluation.stats[0])


def _corner_and_size(boxes: np.ndarray) -> list[list[float]]:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
