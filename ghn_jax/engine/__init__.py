"""Runs any network of the design space, and takes its gradients, without compiling it."""

from ghn_jax.engine.engine import TENSORS, Engine, Prepared, Tensors, Trace, tree_of, weights_of

__all__ = ["TENSORS", "Engine", "Prepared", "Tensors", "Trace", "tree_of", "weights_of"]
