"""How a model is called: options that are none, and errors of calls that cannot be traced."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Container, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from ghn_jax.files.messages import what_is
from ghn_jax.tracing.sample import line_of


def check_seed(seed) -> None:
    """Raises TypeError or ValueError for what is no number to make random keys of."""
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}; allowed: a whole number of up to 63 bits")
    elif not isinstance(seed, np.integer) and not _is_whole(seed):
        raise TypeError(
            f"seed is {what_is(seed)}; allowed: a whole number, such as seed=0. Keys are given to "
            'a model\'s call as rngs={"dropout": key}'
        )


def _is_whole(seed) -> bool:
    """Whether something is an array of one whole number, traced ones included."""
    is_array = isinstance(seed, (np.ndarray, jax.Array))
    return is_array and seed.shape == () and jax.numpy.issubdtype(seed.dtype, np.integer)


def check_linen_options(call: Mapping[str, Any]) -> None:
    """Raises TypeError for options of `apply` that are of no kind that it takes."""
    method, mutable = call.get("method"), call.get("mutable")
    if not (method is None or isinstance(method, str) or callable(method)):
        raise TypeError(
            f"method is {what_is(method)}; allowed: the name of a method, or a function of the "
            "module and its input"
        )
    filters = (bool, type(None), Container, nn.DenyList)
    if not isinstance(mutable, filters):
        raise TypeError(
            f"mutable is {what_is(mutable)}; allowed: True, False, or names of collections, such "
            'as mutable=["batch_stats"]'
        )


def check_nnx_call(module: nnx.Module) -> None:
    """Raises TypeError for a module that cannot be called."""
    if not callable(module):
        name = type(module).__name__
        others = _methods(type(module), nnx.Module)
        raise TypeError(
            f"{name} has no __call__, by which NNX modules are read; add it, or put the module "
            f"into a small one whose __call__ calls {others or 'what makes the logits'}"
        )


def _methods(kind: type, base: type) -> str:
    """The methods of a class that its base has not."""
    names = [n for n in dir(kind) if n[0] != "_" and not hasattr(base, n) and n != "setup"]
    return ", ".join(n for n in names if callable(getattr(kind, n, None)))


@contextlib.contextmanager
def method_exists(model: nn.Module, method) -> Iterator[None]:
    """Says so where a Linen module has no such method; known only once it is set up.

    Raises:
      ValueError: it has none.
    """
    try:
        yield
    except AttributeError as error:
        wanted = method if isinstance(method, str) else "__call__"
        name = type(model).__name__
        if f'"{name}" object has no attribute "{wanted}"' not in str(error):
            raise
        allowed = _methods(type(model), nn.Module) or "a function of the module and its input"
        raise ValueError(f"{name} has no {wanted}; allowed: method=..., of {allowed}") from error


_READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
# Sizes and slices, numbers written out, members of sets, arrays for NumPy and PyTorch.
_WANTED = re.compile(r"\b(concrete|static|unhashable)\b|__format__|expected np\.ndarray")
_OF_ARRAYS = re.compile(r"not available on traced|no attribute '?__(dlpack|array|cuda_array)")


def _reads_values(error: Exception) -> bool:
    """Whether a value is read; not all that do so have an error of JAX's own."""
    text = str(error)
    if isinstance(error, AttributeError):
        return bool(re.search("[Tt]race[rd]", text) and _OF_ARRAYS.search(text))
    if isinstance(error, _READS) or re.search("Trace[rd]", text) and _WANTED.search(text):
        return True
    # NNX's lists take Python's numbers alone, and do not say what they were given.
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return text == "Invalid index type" and isinstance(frame.f_locals.get("index"), _TRACED)


_TRACED = (jax.core.Tracer, nnx.Variable)


@contextlib.contextmanager
def values_are_not_read(model) -> Iterator[None]:
    """Says what to change where a model cannot be traced: it reads values, or updates others'.

    Raises:
      ValueError: it does.
    """
    try:
        yield
    except flax.errors.TraceContextError as error:
        updated = re.search(r"Cannot \w+ (\w+)", str(error))
        raise ValueError(
            f"the call of {type(model).__name__} updates {updated[1] if updated else 'a variable'}"
            f"{line_of(error)}, which is no part of the model; make it one (self.norm = ..., "
            "self.rngs = ...), or give it to the call as an argument, by itself or in dicts, "
            "lists and tuples"
        ) from error
    except (TypeError, IndexError, AttributeError) as error:
        if not _reads_values(error):
            raise
        raise ValueError(
            f"{type(model).__name__} reads the value of an array while it is called"
            f"{line_of(error)}; jax.jit could not run it either. Compute such numbers with NumPy "
            "(np.linspace for jnp.linspace), or give them to the model when it is made"
        ) from error
