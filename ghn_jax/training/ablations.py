"""The ablations of GHN-2, row by row (paper Tables 5 and 8; §§ 5.1, B.2.3, C.2.1).

`ghn-train --ablation NAME` trains one on CIFAR-10 as the paper did; with `--preset digits`, a small
one. Rows of Table 8's lower part are trained with one architecture an update; their names begin
with bm1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ghn_jax.training.config import TrainConfig

LONGER = 8  # times as many updates
NO_TILING = 8, 16  # times the channels of a tile: 512 out and 1024 in, for 64


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A row.

    Attributes:
      row: as the paper calls it.
      parameters: of the hypernetwork, as Table 8 prints them.
      changes: options of `TrainConfig`, by name.
      longer: train so many times longer.
      tiles: make tiles of so many times the channels, (out, in).
    """

    row: str
    parameters: str
    changes: Mapping[str, Any]
    longer: int = 1
    tiles: tuple[int, int] | None = None


def _one(row: str, parameters: str = "1.6M", longer: int = 1, tiles=None, **changes) -> Ablation:
    """A row of one architecture an update."""
    return Ablation(row, parameters, {"meta_batch": 1, **changes}, longer, tiles)


ABLATIONS: dict[str, Ablation] = {
    "ghn2": Ablation("GHN-2", "1.6M", {}),
    # Fewer architectures to train on (Fig. 3).
    "1000-archs": Ablation("1000 archs", "1.6M", {"training_architectures": 1000}),
    "100-archs": Ablation("100 archs", "1.6M", {"training_architectures": 100}),
    # Without what GHN-2 adds to GHN-1 (§ 4).
    "no-normalisation": Ablation("No normalization", "1.6M", {"normalise": False}),
    "no-virtual-edges": Ablation("No virtual edges", "1.6M", {"virtual_edges": 1}),
    "no-layer-norm": Ablation("No LayerNorm", "1.6M", {"layer_norm": False}),
    "no-gatedgnn": Ablation("No GatedGNN (MLP)", "1.6M", {"encoder": "mlp"}),
    # The learning rate falls eight times later, too (Fig. 9, right).
    "bm1-longer": _one("Train 8x longer", longer=LONGER),
    "bm1": _one("No Meta-batch (bm = 1)"),
    "bm1-no-shape-encoding": _one("No Shape Encoding", shape_encoding=False),
    "bm1-no-virtual-edges": _one("No virtual edges (VE)", virtual_edges=1),
    # A second GatedGNN, with parameters of its own, on the states of the first.
    "bm1-stacked-no-virtual-edges": _one("+Stacked GHN, no VE", virtual_edges=1, stack=2),
    "bm1-stacked": _one("+Stacked GHN", stack=2),
    "bm1-forward-only": _one("π = only fw (Eq. 3)", forward_only=True),
    "bm1-five-rounds": _one("T = 5 (Eq. 3)", rounds=5),
    "bm1-fan-out": _one("Fan-out", fan="out"),
    "bm1-mlp-decoder": _one("MLP decoder", "32M", decoder="mlp"),
    # Its 135 million parameters follow from tiles of 512 x 1024 channels, those of the vanilla
    # decoder too; wider parameters are still tiled.
    "bm1-no-tiling": _one("No tiling", "135M", tiles=NO_TILING),
    "bm1-no-tiling-mlp-decoder": _one("No tiling, MLP decoder", "4.1B", tiles=NO_TILING,
                                      decoder="mlp"),
    "ghn1": _one("GHN-1", virtual_edges=1, normalise=False, layer_norm=False),
    "ghn1-layer-norm": _one("GHN-1 + LayerNorm", virtual_edges=1, normalise=False),
}  # fmt: skip


def changes(name: str, config: TrainConfig) -> dict[str, Any]:
    """The options that an ablation changes, by name, with their values.

    Args:
      name: of the ablation.
      config: what it changes.

    Raises:
      ValueError: there is no such ablation.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation is {name!r}; allowed: {', '.join(ABLATIONS)}")
    ablation = ABLATIONS[name]
    changed = dict(ablation.changes)
    if ablation.tiles is not None:
        channels = config.model.tile_channels
        out, in_ = (times * channels for times in ablation.tiles)
        changed |= {"tile_channels": out, "tile_inputs": in_}
    if ablation.longer > 1:
        data, times = config.data, ablation.longer
        changed["epochs"] = times * data.epochs
        changed["decay_epochs"] = tuple(times * e for e in config.optimiser.decay_epochs)
        if data.steps is not None:
            changed["steps"] = times * data.steps
    return changed


def ablate(name: str, config: TrainConfig) -> TrainConfig:
    """A configuration with an ablation's changes; see `changes`."""
    return config.replace(**changes(name, config), ablation=name)


def check_ablation(config: TrainConfig, preset: TrainConfig) -> None:
    """Raises ValueError where an option contradicts the ablation of a configuration.

    Args:
      config: as the command line gave it.
      preset: before the ablation.
    """
    if config.ablation is None:
        return
    options = config.options()
    for option, value in changes(config.ablation, preset).items():
        # How long a run is may be chosen.
        if option not in ("epochs", "steps", "decay_epochs") and options[option] != value:
            flag = option.replace("_", "-")
            raise ValueError(
                f"--ablation {config.ablation} is {flag} = {value}, but --{flag} says "
                f"{options[option]}; leave one of them out"
            )
