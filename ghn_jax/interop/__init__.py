"""In and out of PyTorch: files, converters, and our numbers beside the authors'."""

from ghn_jax.interop.old_names import keep_old_names
from ghn_jax.interop.pretrained import available, from_pretrained
from ghn_jax.interop.torch_ghn import load_torch_ghn, save_torch_ghn
from ghn_jax.interop.torch_network import from_torch, to_torch

__all__ = [
    "available",
    "from_pretrained",
    "from_torch",
    "load_torch_ghn",
    "save_torch_ghn",
    "to_torch",
]

keep_old_names()
