"""DeepNets-1M (paper § 3, Appendix A): official files, and what its splits look like."""

from ghn_jax.deepnets1m.reader import DeepNets1M, FileGraph

__all__ = ["DeepNets1M", "FileGraph"]
