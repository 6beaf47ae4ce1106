"""Published hypernetworks of later work by name: GHN-3 (arXiv:2303.04143) and LoGAH (2405.16287).

ghn = preset("ghn3-t")
"""

from __future__ import annotations

from typing import Any

from ghn_jax.hypernet.ghn import GHN

# GHN-3's tiles have as many channels as a node's state has numbers.
_GHN3 = {
    "ghn3-t": {"features": 64, "layers": 3, "heads": 8},
    "ghn3-s": {"features": 128, "layers": 5, "heads": 16},
    "ghn3-l": {"features": 256, "layers": 12, "heads": 16},
    "ghn3-xl": {"features": 384, "layers": 24, "heads": 16},
}
_LOGAH = {
    "logah-tiny": {"features": 64, "layers": 3, "heads": 8, "rank": 32},
    "logah-small": {"features": 128, "layers": 5, "heads": 16, "rank": 90},
}
PRESETS = (*_GHN3, *_LOGAH)
LOGAH_CHANNELS, LOGAH_FACTOR_SIZE = 2048, 2048 * 16


def preset(name: str, num_classes: int = 1000, **options: Any) -> GHN:
    """A published hypernetwork, untrained.

    Args:
      name: one of `PRESETS`.
      num_classes: of the image dataset. As the authors do, tiles have 16x16 positions for ImageNet
        (from 1000 classes on) and LoGAH, 11x11 otherwise; `max_shape` among the options says
        otherwise.
      **options: other fields of `GHN`.

    Raises:
      ValueError: there is no preset of that name.
    """
    if name in _GHN3:
        channels, kernel = _GHN3[name]["features"], 16 if num_classes >= 1000 else 11
        fields: dict[str, Any] = {**_GHN3[name], "max_shape": (channels, channels, kernel, kernel)}
    elif name in _LOGAH:
        shape = (LOGAH_CHANNELS, LOGAH_CHANNELS, 16, 16)
        fields = {**_LOGAH[name], "max_shape": shape, "decoder": "lowrank"}
        fields["factor_size"] = LOGAH_FACTOR_SIZE
    else:
        raise ValueError(f"no hypernetwork is called {name!r}; allowed: {', '.join(PRESETS)}")
    fields = {"encoder": "graphormer", "dummy_op": False, **fields, **options}
    return GHN(num_classes, **fields)
