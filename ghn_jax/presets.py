"""Training configurations: the paper's hyperparameters (§ 5.1) and a small demonstration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import optax

from ghn_jax.ghn import GHN, ghn1, mlp_baseline
from ghn_jax.sampling import RULES, Rules


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What `train/train_ghn.py` does; every field is a command-line option."""

    preset: str = "ghn2"  # ghn2, ghn1, mlp (the paper's models), or demo (16x16 images, minutes)
    dataset: str = "cifar10"  # digits, cifar10 or imagenet2012
    data_dir: str | None = None  # folder of TFDS datasets; default: TFDS_DATA_DIR
    nets: Path | None = None  # official DeepNets-1M HDF5 to take architectures from
    out: Path = Path("runs/ghn2")  # folder for checkpoints and metrics.jsonl
    resume: bool = False  # go on from the last checkpoint in `out`
    steps: int | None = None  # stop after this many updates; default: all epochs
    epochs: int = 300  # passes over the training images
    batch_size: int = 64  # images in an update
    meta_batch: int = 8  # architectures in an update (b_m, § 4.3)
    learning_rate: float = 1e-3  # of Adam
    weight_decay: float = 1e-5  # L2, added to the gradient
    clip: float = 5.0  # largest global norm of the gradient
    decay_epochs: tuple[int, ...] = (200, 250)  # epochs at which the learning rate falls
    decay: float = 0.1  # factor by which it falls
    label_smoothing: float = 0.0  # 0.1 for ImageNet in the paper
    widths: tuple[int, ...] = RULES["train"].widths  # initial channels to choose from
    fc_dims: tuple[int, ...] = RULES["train"].fc_dims  # hidden classifier widths to choose from
    n_cells: tuple[int, int] = RULES["train"].n_cells  # least and most cells
    nodes: tuple[int, int] = RULES["train"].nodes  # least and most nodes in a cell
    norm: str = "mixed"  # mixed: batch norm in most networks, as in the paper; or always, never
    max_nodes: int = 2200  # meta-batches with more graph nodes for every 8 are passed over
    graph_nodes: int = 288  # nodes that padded graphs have room for, for each architecture
    tile_channels: int = 64  # channels of the largest kernel that the decoder makes (C of B.1)
    virtual_edges: int = 50  # longest virtual edge (s^(max), Eq. 4); 1 for none
    virtual_includes_real: bool = False  # as the authors' code, to exchange weights with it
    seed: int = 0  # of parameters, images, architectures and dropout
    save_every: int = 200  # updates between checkpoints
    workers: int = 2  # architectures that run at once on a CPU, where it is one device
    mesh: str | None = None  # arch=ROWS,data=COLUMNS of devices; default: all on arch
    coordinator: str | None = None  # HOST:PORT of process 0, or auto (Slurm, MPI, GKE, Cloud TPU)
    process_id: int | None = None  # this process, from 0, with a coordinator given by hand
    num_processes: int | None = None  # how many there are
    cache_dir: Path = Path("~/.cache/ghn_jax")  # compiled programs are kept here between runs
    dtype: Literal["float32", "bfloat16"] = "float32"  # of networks' activations

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
            image_size=224 if image_size > 96 else 32,
        )

    def ghn(self, num_classes: int, image_size: int) -> GHN:
        """The preset's hypernetwork."""
        # S of B.1: the largest kernel, or the grid of attention's patches.
        kernel = 16 if image_size > 96 else max(7, image_size // 3 + 1)
        options = {"max_shape": (self.tile_channels, self.tile_channels, kernel, kernel)}
        if self.preset == "ghn1":
            return ghn1(num_classes, **options)
        make = mlp_baseline if self.preset == "mlp" else GHN
        return make(
            num_classes,
            virtual_edges=self.virtual_edges,
            virtual_includes_real=self.virtual_includes_real,
            **options,
        )

    def optimizer(self, steps_per_epoch: int) -> optax.GradientTransformation:
        """Adam with L2 weight decay after clipping, and the step-wise schedule (§ 5.1)."""
        schedule = optax.piecewise_constant_schedule(
            self.learning_rate,
            {epoch * steps_per_epoch: self.decay for epoch in self.decay_epochs},
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.add_decayed_weights(self.weight_decay),
            optax.adam(schedule),
        )


PRESETS: dict[str, TrainConfig] = {
    "ghn2": TrainConfig(),
    "ghn1": TrainConfig(preset="ghn1", meta_batch=1, virtual_edges=1, out=Path("runs/ghn1")),
    "mlp": TrainConfig(preset="mlp", meta_batch=1, out=Path("runs/mlp")),
    "demo": TrainConfig(
        preset="demo",
        dataset="digits",
        out=Path("runs/demo"),
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
    ),
}


def preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
      ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]
