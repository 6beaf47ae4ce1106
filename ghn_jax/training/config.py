"""Training configurations: the paper's hyperparameters (§ 5.1) and a small demonstration.

A configuration is five groups of options. Every option has a name of its own, whatever its group,
and is an option of the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import optax
import optax.contrib

from ghn_jax.deepnets1m.sampling import RULES, Rules
from ghn_jax.deepnets1m.task import Task
from ghn_jax.engine.compilation import default_program_folder
from ghn_jax.hypernet import ghn, presets

WARMUP_FROM = 1e-5  # learning rate at the start of a warm-up
# Size of Muon's updates of matrices, as a part of the learning rate: about that of Adam's.
_MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Images."""

    dataset: str = "cifar10"  # digits, cifar10, imagenet2012, tfds:NAME, folder:, npz: or idx:PATH
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    image_size: int | None = None  # pixels that images are resized to; default: the dataset's own
    batch_size: int = 64  # images in an update
    epochs: int = 300  # passes over the training images
    steps: int | None = None  # stop after this many updates; default: all epochs


@dataclasses.dataclass(frozen=True)
class SpaceConfig:
    """Architectures (§ 3, Appendix A)."""

    # file to take architectures from: DeepNets-1M's HDF5, or JSON, name -> one
    nets: Path | None = None
    training_architectures: int | None = None  # how many there are (Fig. 3); default: no end
    meta_batch: int = 8  # architectures in an update (b_m, § 4.3)
    widths: tuple[int, ...] = RULES["train"].widths  # initial channels to choose from
    fc_dims: tuple[int, ...] = RULES["train"].fc_dims  # hidden classifier widths to choose from
    n_cells: tuple[int, int] = RULES["train"].n_cells  # least and most cells
    nodes: tuple[int, int] = RULES["train"].nodes  # least and most nodes in a cell
    norm: str = "mixed"  # mixed: batch norm in most networks, as in the paper; or always, never
    max_nodes: int = 2200  # meta-batches with more graph nodes for every 8 are passed over
    graph_nodes: int = 288  # nodes that padded graphs have room for, for each architecture

    def rules(self, image_size: int) -> Rules:
        """The generation rules of the training architectures."""
        low, high = self.nodes
        return dataclasses.replace(
            RULES["train"],
            widths=self.widths,
            fc_dims=self.fc_dims,
            n_cells=self.n_cells,
            nodes=self.nodes,
            deep_nodes=max(low, min(high, RULES["train"].deep_nodes)),
            norm=self.norm,
            image_size=224 if Task(image_size=image_size).large else 32,
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The hypernetwork (§ 4, B): where it begins, and the attributes of `hypernet.ghn.GHN`."""

    # hypernetwork to go on from: folder, file or name; with its options. Another --seed than it had
    # gives other architectures than it was trained on
    init: Path | None = None
    identity: float = 0.0  # at the start, on the diagonals of kernels: layers hand channels on
    encoder: str = "gatedgnn"  # or graphormer (GHN-3), or mlp: no messages between nodes
    decoder: str = "conv"  # or lowrank, lowrank_1d (LoGAH), or mlp: that of vanilla GHNs
    features: int = 32  # numbers of a node's state (d)
    tile_channels: int = 64  # channels of the largest kernel that the decoder makes (C of B.1)
    tile_inputs: int | None = None  # its input channels; default: as many
    tile_size: int | None = None  # its height and width; default: what images of this size need
    virtual_edges: int = 50  # longest virtual edge (s^(max), Eq. 4); 1 for none
    virtual_includes_real: bool = False  # as the authors' code, to exchange weights with it
    normalise: bool = True  # predicted parameters (§ 4.1)
    fan: str = "in"  # what normalisation divides by, or out
    layer_norm: bool = True  # of node states
    shape_encoding: bool = True  # of parameters, in node states
    stack: int = 1  # encoders one after another
    rounds: int = 1  # sweeps in each direction (T of Eq. 3)
    forward_only: bool = False  # no sweeps backwards (π of Eq. 3)
    layers: int = 3  # of a Graphormer
    heads: int = 8  # of its attention
    remat: bool = False  # compute its layers again in the backward pass: less memory
    rank: int = 32  # of low-rank decoders
    factor_size: int | None = None  # most rows of their factors; default: as tiles need


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """Adam, its learning rate falling in steps (§ 5.1), GHN-3's AdamW with a cosine, or Muon."""

    optimiser: Literal["adam", "adamw", "muon"] = "adam"  # muon: of matrices; of the rest, AdamW
    learning_rate: float = 1e-3  # at its highest; Adam 1e-3, Muon 2e-3
    weight_decay: float = 1e-5  # L2, added to the gradient; with adamw and muon, to the update
    clip: float = 5.0  # largest global norm of the gradient
    schedule: Literal["steps", "cosine"] = "steps"  # cosine: to 0 at the last update
    warmup_epochs: float = 0.0  # in which the learning rate rises from 1e-5
    decay_epochs: tuple[int, ...] = (200, 250)  # epochs at which the learning rate falls (steps)
    decay: float = 0.1  # factor by which it falls
    label_smoothing: float = 0.0  # 0.1 for ImageNet in the paper
    average: float = 0.0  # decay of the parameters' moving average, which is what is saved
    norm_penalty: float = 0.0  # weight of the sum of predicted tensors' norms in the loss

    def make(self, steps_per_epoch: int, total: int) -> optax.GradientTransformation:
        """The optimiser, after clipping.

        Args:
          steps_per_epoch: updates in an epoch.
          total: updates in all.
        """
        clip, rate = optax.clip_by_global_norm(self.clip), self.rate(steps_per_epoch, total)
        if self.optimiser == "adamw":
            return optax.chain(clip, optax.adamw(rate, weight_decay=self.weight_decay))
        if self.optimiser == "muon":
            decay = self.weight_decay
            muon = optax.contrib.muon(
                rate, consistent_rms=_MUON_RMS, weight_decay=decay, adam_weight_decay=decay
            )
            return optax.chain(clip, muon)
        return optax.chain(clip, optax.add_decayed_weights(self.weight_decay), optax.adam(rate))

    def rate(self, steps_per_epoch: int, total: int) -> optax.Schedule:
        """Number of an update, from 0 -> its learning rate.

        Raises:
          ValueError: the warm-up is as long as the run, or goes on after the first step down.
        """
        rise = round(self.warmup_epochs * steps_per_epoch)
        falls = [epoch * steps_per_epoch for epoch in self.decay_epochs]
        end = total if self.schedule == "cosine" else min([total, *falls])
        if rise and rise >= end:
            raise ValueError(
                f"--warmup-epochs is {self.warmup_epochs}, {rise} updates, but the "
                f"{'run ends' if end == total else 'learning rate falls'} after {end}; allowed: "
                f"below {end / steps_per_epoch:.3g}"
            )
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(self.learning_rate, total - rise)
        else:
            after = optax.piecewise_constant_schedule(
                self.learning_rate, {fall - rise: self.decay for fall in falls}
            )
        if not rise:
            return after
        first = min(WARMUP_FROM, self.learning_rate)
        rising = optax.linear_schedule(first, self.learning_rate, rise)
        return optax.join_schedules([rising, after], [rise])


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where and how training runs."""

    out: Path = Path("runs/ghn2")  # folder for checkpoints, metrics.jsonl and train.log
    # go on from the last checkpoint in `out`; `--resume auto`: if there is one
    resume: bool = False
    override: bool = False  # go on with other options than the run was started with
    replay: int | None = None  # instead of training, repeat this update of bad_updates.jsonl
    seed: int = 0  # of parameters, images, architectures and dropout
    save_every: int = 200  # updates between checkpoints, at most
    save_minutes: float = 5.0  # minutes between checkpoints, at most
    validate_every: int | None = None  # updates between points of the learning curve; default: none
    validate_nets: int = 4  # networks, never trained on, whose accuracies a point is the mean of
    tensorboard: bool = False  # write the curves for TensorBoard as well, in `out`/tensorboard
    workers: int | None = None  # architectures at once; default: 2, on a GPU or TPU 4
    mesh: str | None = None  # arch=ROWS,data=COLUMNS of devices; default: all on arch
    coordinator: str | None = None  # HOST:PORT of process 0, or auto (Slurm, MPI, GKE, Cloud TPU)
    process_id: int | None = None  # this process, from 0, with a coordinator given by hand
    num_processes: int | None = None  # how many there are
    # Compiled programs are kept here between runs.
    cache_dir: Path = dataclasses.field(default_factory=default_program_folder)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of networks' activations


_PATHS = ("nets", "init", "out", "cache_dir")  # options that are of type Path
PLACES = (*_PATHS, "data_dir")  # options that say where something is on this machine


def _typed(value: Any, option: str) -> Any:
    """What JSON has made a string or a list of."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if option in _PATHS and value is not None else value


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All options of `ghn-train`."""

    preset: str = "ghn2"  # ghn2, ghn1, mlp: the paper's models; demo: minutes; or see above
    ablation: str | None = None  # a row of Tables 5 and 8 that changes the preset, see ablations.py
    data: DataConfig = DataConfig()
    space: SpaceConfig = SpaceConfig()
    model: ModelConfig = ModelConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    run: RunConfig = RunConfig()

    def replace(self, **options: Any) -> TrainConfig:
        """A copy with other values of some options, whatever their groups.

        Raises:
          TypeError: there is no such option.
        """
        groups: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            group = getattr(self, field.name)
            if dataclasses.is_dataclass(group) and not isinstance(group, type):
                names = {f.name for f in dataclasses.fields(group)} & set(options)
                changes = {name: options.pop(name) for name in names}
                groups[field.name] = dataclasses.replace(group, **changes)
        return dataclasses.replace(self, **groups, **options)

    def options(self) -> dict[str, Any]:
        """All options by name, whatever their groups."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found |= vars(value) if dataclasses.is_dataclass(value) else {field.name: value}
        return found

    def describe(self) -> dict[str, Any]:
        """All options by name, JSON-ready, without which of the processes this one is."""
        described = json.loads(json.dumps(self.options(), default=str))
        for name in ("coordinator", "process_id", "num_processes"):
            del described[name]
        return described

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> TrainConfig:
        """The configuration that `describe` has described; an option that came later is neutral.

        Raises:
          ValueError: it describes options that there are not.
        """
        preset(described["preset"])  # else ValueError
        base = cls(described["preset"])
        flat: dict[str, Any] = {}
        for name, value in described.items():  # at first, options were in their groups
            flat |= value if isinstance(value, dict) else {name: value}
        known = base.options()
        if unknown := sorted(set(flat) - set(known)):
            raise ValueError(f"there is no option {unknown[0]!r} in this version")
        return base.replace(**{name: _typed(value, name) for name, value in flat.items()})

    def ghn(self, task: Task) -> ghn.GHN:
        """The hypernetwork, for networks of a task.

        Raises:
          ValueError: a choice that there is not.
        """
        # S of B.1: the largest kernel, or the grid of attention's patches.
        kernel = 16 if task.large else max(7, task.image_size // 3 + 1)
        model = dataclasses.asdict(self.model)
        del model["init"], model["identity"]
        channels, inputs = model.pop("tile_channels"), model.pop("tile_inputs")
        kernel = model.pop("tile_size") or kernel
        max_shape = (channels, inputs or channels, kernel, kernel)
        if self.model.encoder == "graphormer":  # as its authors: no row for padding
            model |= {"dummy_op": False, "bfloat16": self.run.dtype == "bfloat16"}
        made = ghn.GHN(task.num_classes, max_shape, **model)
        ghn.check_choices(made)
        return made


# What learns the most from few updates; see docs/hypernetworks.md.
FAST: dict[str, Any] = {"optimiser": "muon", "learning_rate": 2e-3, "identity": 2.0}


def ghn2() -> TrainConfig:
    """GHN-2 on CIFAR-10, the paper's main model.

    Command: `ghn-train --preset ghn2 --data-dir DIR --out runs/ghn2`. 300 epochs, 211,000 updates
    of 8 architectures and 64 images. The authors: 0.9 hours an epoch on four V100 GPUs; top-1 of
    `test` networks 66.9%. Not yet run in full here.
    """
    return TrainConfig()


def ghn1() -> TrainConfig:
    """GHN-1, the baseline without virtual edges and normalisation, one architecture an update.

    Command: `ghn-train --preset ghn1 --data-dir DIR --out runs/ghn1`. The authors: 51.4% on `test`.
    Not yet run in full here.
    """
    return TrainConfig("ghn1").replace(
        meta_batch=1, virtual_edges=1, normalise=False, layer_norm=False, out=Path("runs/ghn1")
    )


def mlp() -> TrainConfig:
    """The MLP baseline, without message passing.

    Command: `ghn-train --preset mlp --data-dir DIR --out runs/mlp`. The authors: 42.2% on `test`.
    Not yet run in full here.
    """
    return TrainConfig("mlp").replace(meta_batch=1, encoder="mlp", out=Path("runs/mlp"))


def ghn2_cifar10_small() -> TrainConfig:
    """A GHN-2 for networks of CIFAR-10 with 16 to 64 initial channels and 4 to 8 cells.

    Otherwise the paper's generation rules, with hidden classifier layers of 64 or 128 units. Four
    architectures an update, and a decoder that makes kernels of 32x32 channels, repeated for wider
    ones.

    Command: `ghn-train --preset ghn2-cifar10-small --data-dir DIR`. The one that comes with the
    package was trained by these options in pieces, some of them on smaller images: see its card.
    """
    return TrainConfig("ghn2-cifar10-small").replace(
        out=Path("runs/ghn2-cifar10-small"),
        widths=(16, 32, 48, 64),
        fc_dims=(64, 128),
        n_cells=(4, 8),
        meta_batch=4,
        tile_channels=32,
        batch_size=32,
        steps=10_000,
        epochs=8,
        schedule="cosine",
        average=0.998,
        max_nodes=1000,
        graph_nodes=160,
        **FAST,
    )


def later(name: str) -> TrainConfig:
    """GHN-3 (arXiv:2303.04143) or LoGAH (2405.16287) of a published size, with its recipe.

    AdamW, a warm-up of 5 epochs and a cosine, a penalty on the norms of predicted tensors; LoGAH
    takes one architecture an update. For CIFAR-10; of GHN-3's recipe for ImageNet, `--epochs 75
    --batch-size 128 --label-smoothing 0.1` are missing.

    Command: `ghn-train --preset ghn3-t --data-dir DIR`. Not yet run in full here.
    """
    made = presets.preset(name, num_classes=10)
    config = TrainConfig(name).replace(
        encoder=made.encoder, decoder=made.decoder, features=made.features, layers=made.layers,
        heads=made.heads, tile_channels=made.max_shape[0], rank=made.rank,
        factor_size=made.factor_size, optimiser="adamw", learning_rate=4e-4, weight_decay=1e-2,
        schedule="cosine", warmup_epochs=5, norm_penalty=3e-5, out=Path("runs") / name,
    )  # fmt: skip
    if made.decoder == "conv":
        return config
    return config.replace(meta_batch=1, learning_rate=3e-4)


def digits() -> TrainConfig:
    """A GHN-2 for small networks on handwritten digits of 16x16 pixels, by the paper's recipe.

    Command: `ghn-train --preset digits`. Experiments at small size take it.
    """
    return TrainConfig("digits").replace(
        dataset="digits",
        out=Path("runs/digits"),
        steps=4500,
        epochs=125,
        decay_epochs=(105,),
        batch_size=32,
        meta_batch=2,
        widths=(8,),
        fc_dims=(32,),
        n_cells=(3, 4),
        nodes=(1, 2),
        norm="always",
        graph_nodes=128,
        tile_channels=16,
        save_every=500,
    )


def demo() -> TrainConfig:
    """The same, by what learns the most from few updates: Muon, and a start near the identity.

    Command: `make demo`. Minutes on two CPU cores; the benchmark page says how many, and what
    accuracy unseen networks have.
    """
    base = dataclasses.replace(digits(), preset="demo")
    return base.replace(out=Path("runs/demo"), steps=2000, epochs=56, decay_epochs=(47,), **FAST)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "ghn2": ghn2,
    "ghn1": ghn1,
    "mlp": mlp,
    "ghn2-cifar10-small": ghn2_cifar10_small,
    "digits": digits,
    "demo": demo,
    **{name: functools.partial(later, name) for name in presets.PRESETS},
}


def preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
      ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()
