r"""Detection of pedestrians, from predicted parameters (paper § 5.3, Table 6, right).

    ghn-paper detection --data DIR/PennFudanPed --ghn runs/ghn2-imagenet --out runs/detection
    ghn-paper detection --quick

Each network becomes the backbone of a Faster R-CNN, which is trained on 120 photographs of
Penn-Fudan and tested on the other 50. It starts from random (He) parameters, from those that a
hypernetwork predicts, and, with `--trained`, from those that `ghn-paper trained-networks
--keep-parameters` wrote. --quick draws its photographs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ghn_jax.data.prefetch import prefetch
from ghn_jax.deepnets1m.architecture import DARTS, PDARTS, VIT, Architecture
from ghn_jax.detection.backbone import make_backbone
from ghn_jax.detection.detector import Batch, Detector, DetectorState, DetectorTraining
from ghn_jax.detection.penn_fudan import WHERE, Frame, Photograph, flip, read_penn_fudan, split
from ghn_jax.detection.scenes import write_scenes
from ghn_jax.evaluation.accuracy import predict_network, random_parameters
from ghn_jax.evaluation.experiments.kept_parameters import (
    existing_file,
    parameters_file,
    read_parameters,
)
from ghn_jax.evaluation.experiments.records import Records, describe, write_beside
from ghn_jax.evaluation.networks import Named, by_name
from ghn_jax.hypernet.checkpoint import load_ghns
from ghn_jax.hypernet.ghn import GHN

HE, SGD = "He", "SGD"
# Initialisation -> AP at IoU 0.5 of networks, mean and standard deviation, in the paper.
PAPER = {
    "He": {"resnet50": (0.197, 0.042), "ViT": (0.144, 0.010), "DARTS": (0.486, 0.035)},
    "GHN-1": {"resnet50": (0.433, 0.013), "ViT": (0.0, 0.0), "DARTS": (0.468, 0.024)},
    "GHN-2": {"resnet50": (0.560, 0.019), "ViT": (0.436, 0.032), "DARTS": (0.785, 0.032)},
    "ImageNet": {"resnet50": (0.876, 0.011), "ViT": (0.468, 0.023), "DARTS": (0.881, 0.023)},
}
_SMALLER = 2.5  # how much smaller photographs are for networks with attention
_SHOWN = 8  # photographs in a figure


@dataclasses.dataclass(frozen=True)
class Config:
    """Which detectors are trained, from what, and how."""

    data: Path | None = None  # the folder PennFudanPed
    scenes: int | None = None  # this many drawn scenes in place of it
    test_images: int = 50  # the others are trained on
    networks: tuple[str, ...] = ("resnet50", "ViT", "DARTS")  # DARTS, PDARTS, ViT, ResNets
    width: int | None = None  # initial channels of those of the design space; default: the paper's
    cells: int | None = None  # of those of the design space; default: the paper's
    ghn: tuple[Path, ...] = ()  # folders, files or names; default: an untrained one
    trained: Path | None = None  # folder of `trained-networks --keep-parameters`, of these networks
    network_image_size: int = 224  # of the images that the networks and `ghn` are for, in pixels
    shorter: int = 800  # shorter side of photographs, in pixels; networks with attention: / 2.5...
    longer: int = 1333  # ...and how long the longer one may become
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)  # square roots of areas, in pixels
    proposals: int = 2000  # of an image; half as many to test
    regions: int = 512  # of an image, that the head is trained on
    hidden: int = 1024  # features of the head's layers
    learning_rate: float = 0.005  # of SGD with momentum 0.9; it grows to it in the first epoch
    decay_epochs: int = 3  # after each so many epochs it is a tenth
    weight_decay: float = 5e-4  # L2, on all parameters
    batch_size: int = 2  # images in an update
    epochs: int = 10  # passes over the training images
    seeds: int = 3  # runs, each with a split of its own
    out: Path = Path("runs/detection")  # folder for records, table and figures


def quick() -> Config:
    """A small network on drawn scenes: some ten minutes on two cores."""
    return Config(
        scenes=240, test_images=40, networks=("DARTS",), width=16, cells=2, shorter=160, longer=200,
        anchor_sizes=(32, 64, 128), proposals=400, regions=64, hidden=256, learning_rate=0.02,
        decay_epochs=30, epochs=40, batch_size=4, seeds=1, out=Path("runs/quick/detection"),
    )  # fmt: skip


# --- Options --------------------------------------------------------------------------------------


def networks(config: Config) -> list[Named]:
    """Those that become backbones.

    Raises:
      ValueError: a name is not known, or of a network that cannot be one.
    """
    named = {
        "DARTS": Architecture(DARTS, n_cells=config.cells or 14, C=config.width or 48, stem_type=1),
        "PDARTS": Architecture(
            PDARTS, n_cells=config.cells or 14, C=config.width or 48, stem_type=1
        ),
        "ViT": Architecture(
            VIT, n_cells=config.cells or 12, C=config.width or 128, C_mult=1, preproc=False
        ),
    }
    found = [(name, named.get(name, network)) for name, network in by_name(config.networks)]
    for _, network in found:
        make_backbone(network, config.network_image_size)
    return found


def check(config: Config) -> None:
    """Raises ValueError for options that cannot work, before any long work."""
    positive = ("shorter", "longer", "proposals", "regions", "hidden", "learning_rate", "epochs",
                "decay_epochs", "batch_size", "seeds")  # fmt: skip
    for name in positive:
        if not getattr(config, name) > 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(config, name)}; use a number above 0")
    if (config.data is None) == (config.scenes is None):
        raise ValueError("give either --data, the folder PennFudanPed, which is to be had from "
                         f"{WHERE}, or --scenes, a number of drawn ones")  # fmt: skip


def _photographs(config: Config) -> list[Photograph]:
    if config.data is not None:
        return read_penn_fudan(config.data)
    assert config.scenes is not None
    folder = write_scenes(config.out / "scenes", config.scenes, height=config.shorter)
    return read_penn_fudan(folder)[: config.scenes]


# (network, seed) -> the `params` tree of a backbone.
Start = Callable[[str, Architecture | str, int], Mapping]


def _starts(config: Config, ghns: Mapping[str, tuple[GHN, dict]]) -> dict[str, Start]:
    """Where parameters come from, by name.

    Args:
      config: of the experiment.
      ghns: hypernetworks by name.
    """
    size = config.network_image_size

    def random(name, network, seed: int) -> Mapping:
        return random_parameters(make_backbone(network, size), size, seed)

    def predicted(ghn, variables) -> Start:
        return lambda name, network, seed: predict_network(ghn, variables, network, size)[1]

    starts = {HE: random}
    starts |= {name: predicted(*loaded) for name, loaded in ghns.items()}
    if config.trained is not None:
        files = {name: existing_file(config.trained, name) for name in config.networks}
        starts[SGD] = lambda name, network, seed: read_parameters(files[name])
    return starts


# --- One detector ---------------------------------------------------------------------------------


def optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD as torchvision's example of fine-tuning has it: a linear warm-up, then steps down."""

    def rate(step):
        warm = jnp.minimum(step / max(steps_per_epoch - 1, 1), 1)
        steps_down = step // steps_per_epoch // config.decay_epochs
        return config.learning_rate * (1e-3 * (1 - warm) + warm) * 0.1**steps_down

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=0.9)
    )


def epoch_batches(
    photographs: Sequence[Photograph], frame: Frame, batch_size: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """All photographs in a random order, half of them flipped; a last, smaller batch is left out.

    Of 120 photographs and batches of two there is none.
    """
    order = rng.permutation(len(photographs))
    for first in range(0, len(order) - batch_size + 1, batch_size):
        some = [photographs[i] for i in order[first : first + batch_size]]
        yield frame.batch([flip(p) if rng.random() < 0.5 else p for p in some])


def detect(
    training: DetectorTraining,
    state: DetectorState,
    photographs: Sequence[Photograph],
    frame: Frame,
    batch_size: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Boxes (N, 4), in pixels of each photograph, and scores (N,)."""

    def batches():
        for first in range(0, len(photographs), batch_size):
            some = list(photographs[first : first + batch_size])
            yield frame.batch(some + some[-1:] * (batch_size - len(some)))

    found = []
    for batch in prefetch(batches()):
        result = jax.device_get(training.detect(state, batch))
        for boxes, scores, labels in zip(*result, strict=True):
            if len(found) < len(photographs):
                there = labels > 0
                photograph = photographs[len(found)]
                found.append((frame.unscale(boxes[there], photograph), scores[there]))
    return found


def train_detector(
    config: Config,
    network: Architecture | str,
    params: Mapping,
    photographs: Sequence[Photograph],
    seed: int,
    report: Callable[[int], object] = lambda step: None,
) -> tuple[dict, list[tuple[np.ndarray, np.ndarray]], list[Photograph]]:
    """Trains a detector and tests it.

    Args:
      config: the options.
      network: the backbone's.
      params: of the network; its classifier's are left out.
      photographs: all of them.
      seed: of the split, the detector's other parameters, and the order of photographs.
      report: called after each update.

    Returns:
      Its `loss` by epoch, `ap50_before`, `ap50` and `ap`, `seconds` of training; what is found in
      the test photographs; and these.
    """
    from ghn_jax.detection.average_precision import average_precision  # pycocotools: of an extra

    train, test = split(photographs, config.test_images, seed)
    smaller = _SMALLER if isinstance(network, Architecture) and network.has_attention else 1
    sides = int(config.shorter / smaller), int(config.longer / smaller)
    frame = Frame.around(photographs, *sides)
    detector = Detector(
        make_backbone(network, config.network_image_size), anchor_sizes=config.anchor_sizes,
        train_proposals=config.proposals, test_proposals=max(config.proposals // 2, 1),
        regions=config.regions, hidden=config.hidden,
    )  # fmt: skip
    steps = len(train) // config.batch_size
    training = DetectorTraining(detector, optimizer(config, steps), seed)
    state = training.init(frame.batch(train[: config.batch_size]), params)

    def test_now():
        found = detect(training, state, test, frame, config.batch_size)
        return found, average_precision([p.boxes for p in test], *zip(*found, strict=True))

    record: dict = {"ap50_before": test_now()[1][0], "loss": []}
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    for _ in range(config.epochs):
        losses = []
        for batch in prefetch(epoch_batches(train, frame, config.batch_size, rng)):
            state, some = training.step(state, batch)
            losses.append(sum(some))
            report(1)
        record["loss"].append(float(np.mean(jax.device_get(losses))))
        if not np.isfinite(record["loss"][-1]):  # it stays so
            record["diverged"] = True
            break
    record["seconds"] = round(time.perf_counter() - start, 2)
    found, (ap50, ap) = test_now()
    return {**record, "ap50": ap50, "ap": ap}, found, test


# --- The experiment -------------------------------------------------------------------------------


def run(config: Config) -> list[dict]:
    """Trains what has no record yet; writes the table and figures; returns all records.

    Raises:
      ValueError: options that cannot work, or a folder with records of other options.
      FileNotFoundError: there are no photographs where they should be.
    """
    check(config)
    nets, ghns = networks(config), load_ghns(config.ghn)
    starts = _starts(config, ghns)
    without = ("data", "networks", "ghn", "trained", "seeds", "out")
    trained = (
        {}
        if config.trained is None
        else {f"{SGD}: {n}": parameters_file(config.trained, n) for n in config.networks}
    )
    settings = describe("detection", config, without=without)
    records = Records.open(config.out, settings, ghns=ghns, trained=trained)
    photographs = _photographs(config)
    kept = len(split(photographs, config.test_images, 0)[0])
    if kept < config.batch_size:
        raise ValueError(f"--batch-size is {config.batch_size}, but there are {kept} training "
                         "images")  # fmt: skip
    todo = [
        (f"{name} from {where}, seed {seed}", name, network, where, seed)
        for name, network in nets
        for where in starts
        for seed in range(config.seeds)
    ]
    missing = [key for key, *_ in todo if key not in records]
    total = len(missing) * config.epochs * (kept // config.batch_size)
    with tqdm(total=total, unit="update", dynamic_ncols=True, disable=not missing) as bar:
        for key, name, network, where, seed in todo:
            if key in records:
                continue
            bar.set_postfix_str(key)
            params = starts[where](name, network, seed)
            record, found, test = train_detector(
                config, network, params, photographs, seed, bar.update
            )
            if not seed:
                _draw(found, test, config.out / f"{name} from {where}.png")
            records.add({"name": key, "network": name, "start": where, "seed": seed, **record})
    found = [records[key] for key, *_ in todo]
    write_beside(config.out / "table.md", table(found))
    print(table(found))
    return found


def _draw(found, test: Sequence[Photograph], path: Path) -> None:
    from ghn_jax.plot.detections import Seen, draw_detections  # matplotlib is of an extra

    seen = [
        Seen(p.pixels, p.boxes, boxes, scores)
        for p, (boxes, scores) in zip(test[:_SHOWN], found, strict=False)
    ]
    draw_detections(seen, path)


def table(records: Sequence[Mapping]) -> str:
    """AP at an IoU of 0.5, mean and standard deviation over seeds, as in Table 6: Markdown."""
    names = list(dict.fromkeys(r["network"] for r in records))
    lines = ["| from | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for start in dict.fromkeys(r["start"] for r in records):
        cells = []
        for name in names:
            aps = [r["ap50"] for r in records if (r["start"], r["network"]) == (start, name)]
            cells.append(f"{np.mean(aps):.3f} ± {np.std(aps):.3f}" if aps else "-")
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    for start, row in PAPER.items():
        cells = ["{:.3f} ± {:.3f}".format(*row[name]) if name in row else "-" for name in names]
        lines.append(f"| {start}, the paper | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
