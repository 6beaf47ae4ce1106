"""Graph hypernetworks: GHN-2, GHN-1 and the MLP baseline (paper § 2.2, § 4, B)."""

from ghn_jax.hypernet.checkpoint import load_ghn, save_ghn
from ghn_jax.hypernet.ghn import GHN, ghn1, mlp_baseline
from ghn_jax.hypernet.ghn_file import write_ghn_file
from ghn_jax.hypernet.padding import pad_graphs

__all__ = ["GHN", "ghn1", "load_ghn", "mlp_baseline", "pad_graphs", "save_ghn", "write_ghn_file"]
