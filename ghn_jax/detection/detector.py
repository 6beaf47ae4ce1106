"""Faster R-CNN (Ren et al. 2015) on one feature map: the module, its updates, its detections.

detector = Detector(make_backbone("resnet50"))
training = DetectorTraining(detector, optax.sgd(0.005, momentum=0.9))
state = training.init(batch)
for batch in batches:
    state, losses = training.step(state, batch)
found = training.detect(state, batch)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ghn_jax.detection.anchors import anchors_of_grid
from ghn_jax.detection.roi_align import roi_align
from ghn_jax.detection.roi_head import (
    Detections,
    ROIHead,
    choose_regions,
    detections,
    roi_losses,
)
from ghn_jax.detection.rpn import RPNHead, propose, rpn_losses


class Batch(NamedTuple):
    """Images and what is in them.

    Attributes:
      images: (B, H, W, 3) normalised, zero where padded at the right and at the bottom.
      sizes: (B, 2) height and width without padding, in pixels.
      boxes: (B, G, 4) objects.
      labels: (B, G) their classes, from 1; 0 for padding.
    """

    images: np.ndarray | jax.Array
    sizes: np.ndarray | jax.Array
    boxes: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


class Losses(NamedTuple):
    """Of a batch: of the proposals, and of the head. Their sum is minimised."""

    objectness: jax.Array
    proposal_boxes: jax.Array
    classes: jax.Array
    boxes: jax.Array


class Detector(nn.Module):
    """Faster R-CNN; the defaults are torchvision's.

    Attributes:
      backbone: a module from images to a feature map (B, h, w, C); its call takes `train`.
      classes: background included.
      anchor_sizes: square roots of anchors' areas, in pixels.
      anchor_ratios: of anchors' heights to widths.
      train_proposals, test_proposals: of an image, before and after suppression.
      regions: of an image, that the head is trained on.
      hidden: features of the head's layers.
    """

    backbone: nn.Module
    classes: int = 2
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    train_proposals: int = 2000
    test_proposals: int = 1000
    regions: int = 512
    hidden: int = 1024

    def setup(self):
        """Its parts under torchvision's names."""
        self.rpn = RPNHead(len(self.anchor_sizes) * len(self.anchor_ratios))
        self.roi_heads = ROIHead(self.classes, self.hidden)

    def _look(self, batch: Batch, count: int, train: bool):
        """Features, anchors, the RPN's logits and codes, and proposals."""
        features = self.backbone(batch.images, train=train)
        anchors = jnp.asarray(
            anchors_of_grid(
                features.shape[1:3], batch.images.shape[1:3], self.anchor_sizes, self.anchor_ratios
            )
        )
        logits, codes = self.rpn(features)
        # No gradient goes through where proposals are.
        fixed = jax.lax.stop_gradient((logits, codes))
        proposals = jax.vmap(lambda *x: propose(*x[:2], anchors, x[2], count))(*fixed, batch.sizes)
        return features, anchors, logits, codes, proposals

    def _judge(self, features: jax.Array, boxes: jax.Array, height: int):
        """The head's logits and codes for boxes (B, N, 4) of images of some height."""
        scale = 2.0 ** round(math.log2(features.shape[1] / height))
        return self.roi_heads(jax.vmap(lambda x, some: roi_align(x, some, scale))(features, boxes))

    def losses(self, batch: Batch, key: jax.Array) -> Losses:
        """Of a batch, with batch norm on its statistics; `key` draws anchors and regions."""
        features, anchors, logits, codes, (proposals, valid) = self._look(
            batch, self.train_proposals, train=True
        )
        first, second = jax.random.split(key)
        rpn = rpn_losses(first, logits, codes, anchors, batch.boxes, batch.labels)
        keys = jax.random.split(second, len(proposals))
        choose = jax.vmap(lambda *x: choose_regions(*x, self.regions))
        regions = choose(keys, proposals, valid, batch.boxes, batch.labels)
        judged = self._judge(features, regions.boxes, batch.images.shape[1])
        return Losses(*rpn, *roi_losses(*judged, regions))

    def __call__(self, batch: Batch) -> Detections:
        """What is in images; batch norm on running averages."""
        features, _, _, _, (proposals, valid) = self._look(batch, self.test_proposals, train=False)
        judged = self._judge(features, proposals, batch.images.shape[1])
        return detections(*judged, proposals, valid, batch.sizes)


class DetectorState(NamedTuple):
    """What training changes.

    Attributes:
      variables: of the detector, running averages included.
      opt_state: of the optimizer.
      step: number of updates so far.
    """

    variables: Mapping[str, Any]
    opt_state: Any
    step: int


class DetectorTraining:
    """Updates of a detector; one program for all batches of a shape.

    Args:
      detector: the module.
      optimizer: an optax transformation.
      seed: of initial parameters, and of the anchors and regions that are drawn.
    """

    def __init__(self, detector: Detector, optimizer: optax.GradientTransformation, seed: int = 0):
        self.detector, self._optimizer, self.seed = detector, optimizer, seed

        def loss(params, others, batch, key):
            losses, others = detector.apply(
                {"params": params, **others}, batch, key,
                method=detector.losses, mutable=list(others),
            )  # fmt: skip
            return sum(losses), (losses, others)

        def update(variables, opt_state, batch, step):
            others = {name: tree for name, tree in variables.items() if name != "params"}
            key = jax.random.fold_in(jax.random.key(seed), step)
            gradient, (losses, others) = jax.grad(loss, has_aux=True)(
                variables["params"], others, batch, key
            )
            changes, opt_state = optimizer.update(gradient, opt_state, variables["params"])
            params = optax.apply_updates(variables["params"], changes)
            return {"params": params, **others}, opt_state, losses

        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._detect = jax.jit(detector.apply)

    def init(self, batch: Batch, backbone: Mapping[str, Any] | None = None) -> DetectorState:
        """The state before the first update.

        Args:
          batch: of the shapes to come.
          backbone: parameters of the backbone, and of layers behind it, which are left out; the
            backbone's own initial ones if not given.

        Raises:
          ValueError: parameters of another network.
        """

        def fresh(key):
            variables = dict(self.detector.init(key, batch))
            params = dict(variables.pop("params"))
            if backbone is not None:  # what is not used takes no time, not even to compile
                del params["backbone"]
            return {**variables, "params": params}

        variables = jax.jit(fresh)(jax.random.key(self.seed))
        if backbone is not None:
            variables["params"]["backbone"] = self._fitting(batch, backbone)
        return DetectorState(variables, self._optimizer.init(variables["params"]), 0)

    def _fitting(self, batch: Batch, given: Mapping[str, Any]) -> dict:
        """Parameters of the backbone, among those given."""
        own = jax.eval_shape(self.detector.init, jax.random.key(0), batch)["params"]["backbone"]
        given = {name: tree for name, tree in given.items() if name in own}
        if jax.tree.map(np.shape, own) != jax.tree.map(np.shape, given):
            raise ValueError("the parameters do not fit the backbone: its network is another one, "
                             "or is for images of another size")  # fmt: skip
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), given)

    def step(self, state: DetectorState, batch: Batch) -> tuple[DetectorState, Losses]:
        """One update; the old state is used up. Returns the losses before it as well."""
        variables, opt_state, losses = self._update(
            state.variables, state.opt_state, batch, state.step
        )
        return DetectorState(variables, opt_state, state.step + 1), losses

    def detect(self, state: DetectorState, batch: Batch) -> Detections:
        """What is in the images of a batch, (B, 100, ...)."""
        return self._detect(state.variables, batch)
