"""The input that a model is called with: what is read of it, and errors where it does not fit."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import flax
import jax
import numpy as np

from ghn_jax.files.messages import what_is

_ALLOWED = (
    "allowed: one array with a batch axis, such as jnp.zeros((1, 32, 32, 3)), or a "
    "jax.ShapeDtypeStruct"
)
# Where errors come from that tell of shapes; a model's own are its own.
_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (jax, flax, np))
_PACKAGE = Path(__file__).parent.parent
_OURS = tuple(str(_PACKAGE / part) for part in ("tracing", "evaluation"))


def check_sample(sample) -> jax.ShapeDtypeStruct:
    """Shape and type of a sample: an array of any library, or what has a shape and a type.

    Raises:
      TypeError: it is not made of numbers.
      ValueError: it is no array, has no batch axis or is empty, or its sizes are no numbers.
    """
    shape, dtype = _shape_of(sample), getattr(sample, "dtype", None)
    if shape is None or dtype is None or len(shape) < 2:
        given = "no array" if shape is None or dtype is None else f"of shape {shape}"
        hint = f"; {_TAKES_OTHERS}" if isinstance(sample, dict) else ""
        raise ValueError(f"the sample input is {given}; {_ALLOWED}{hint}")
    if not all(isinstance(size, (int, np.integer)) and size >= 0 for size in shape):
        raise ValueError(
            f"the sample input is of shape {shape}; allowed: sizes that are positive numbers, such "
            "as 1 for a batch of any size"
        )
    if 0 in shape:
        raise ValueError(f"the sample input of shape {shape} is empty; give one image")
    kind = _number_type(dtype)
    if kind is None:
        raise TypeError(f"the sample input is of type {dtype}, not of numbers; {_ALLOWED}")
    return jax.ShapeDtypeStruct(tuple(map(int, shape)), jax.dtypes.canonicalize_dtype(kind))


def check_images(images) -> None:
    """Raises TypeError for an array that is not of numbers; models may take what is no array."""
    dtype = getattr(images, "dtype", None)
    if dtype is not None and _number_type(dtype) is None:
        raise TypeError(
            f"the images are of type {dtype}; allowed: an array of numbers (B, H, W, C)"
        )


def _shape_of(value) -> tuple | None:
    try:
        return tuple(getattr(value, "shape", None))  # type: ignore[arg-type]
    except TypeError:  # no array, or a class of arrays
        return None


def _number_type(dtype) -> np.dtype | None:
    """The type of numbers that an array's type is, also PyTorch's; None: of something else."""
    for name in (dtype, str(getattr(dtype, "name", dtype)).rpartition(".")[2]):  # torch.float32
        try:
            kind = jax.numpy.dtype(name)
        except (TypeError, ValueError, SyntaxError):  # NumPy parses texts
            continue
        numbers = any(jax.numpy.issubdtype(kind, of) for of in (np.number, np.bool_))
        return kind if numbers else None
    return None


_TAKES_OTHERS = (
    'where a model takes a dict, give a Linen model method=lambda m, x: m({"image": x}), and put '
    "an NNX model into a small module that calls it so"
)
_SHAPES = re.compile(r"shape|size|dim|axis|axes|broadcast|channel|feature|rank|reshape", re.I)
_OF_VARIABLES, _AND_VARIABLES = flax.errors.ScopeParamShapeError, ", and variables this model's"
_TREE = re.compile(
    r"string ind|must be a mapping|(Tracer|Array)\S* .*no attribute '?(items|keys|values|get)\b"
)


@contextlib.contextmanager
def input_fits(model, given, what: str) -> Iterator[None]:
    """Says so where a model cannot be called with an input.

    Args:
      model: a module.
      given: its input.
      what: it is, 'a sample'.

    Raises:
      TypeError: it is no array, as images are; or the model takes something else.
      ValueError: its shape does not fit.
    """
    try:
        yield
    except (TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        text, name = _first_line(error), type(model).__name__
        if _shape_of(given) is None and isinstance(error, (TypeError, AttributeError)):
            raise TypeError(
                f"{name} cannot be called with {what_is(given)} ({text}); allowed: one array of "
                "images (B, H, W, C)"
            ) from error
        if isinstance(error, (TypeError, AttributeError)) and _TREE.search(text):
            raise TypeError(
                f"{name} is called with one array, but takes something else{line_of(error)}: "
                f"{text}; {_TAKES_OTHERS}"
            ) from error
        if not _tells_of_shapes(error):
            raise
        raise _does_not_fit(name, given, what, error) from error
    except _OF_VARIABLES as error:
        raise _does_not_fit(type(model).__name__, given, what, error) from error


def _tells_of_shapes(error: Exception) -> bool:
    """Whether an error of a library is of sizes that do not fit, or of none that are left."""
    if isinstance(error, ZeroDivisionError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    by_library = bool(frames) and frames[-1].filename.startswith(_LIBRARIES)
    return by_library and bool(_SHAPES.search(str(error)))


def _does_not_fit(name: str, given, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name} cannot be called with {what} of shape {_shape_of(given)}{line_of(error)}: "
        f"{_first_line(error)}; images are (B, H, W, C), of the size and the channels that the "
        f"model was made for{_AND_VARIABLES if isinstance(error, _OF_VARIABLES) else ''}"
    )


def _first_line(error: Exception) -> str:
    """What an error says first, without a link and the stop at its end."""
    text = str(error).partition(" (https")[0].strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")


def line_of(error: Exception) -> str:
    """The line of the user's own code where an error came up."""
    libraries = (*_LIBRARIES, *_OURS)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(libraries)]
    return f" (line {own[-1].lineno} of {own[-1].filename}: {own[-1].line})" if own else ""
