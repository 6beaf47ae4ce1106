"""Which of the arrays that a model returns is its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax


def choose_output(returned, wanted: str | int | None):
    """The array that is a model's output.

    Args:
      returned: by the model: an array, or arrays in tuples, dicts and dataclasses.
      wanted: its path, such as 'logits', 0 or '1/features'; None: the only array, the one called
        'logits', or the only one that is not in another container, as in (logits, {...}); numbers,
        such as a loss, are passed over.

    Raises:
      ValueError: there is no such array, or it has to be named.
    """
    arrays = dict(_arrays(returned, ""))
    if not arrays:
        raise ValueError(
            f"the model returns {_named(returned)}, in which no array is found; allowed: an array, "
            "or arrays in tuples, lists, dicts, dataclasses and classes that JAX knows. Return "
            "such, or tell JAX of the class (jax.tree_util.register_pytree_node_class)"
        )
    listed = ", ".join(f"{path!r} {tuple(x.shape)}" for path, x in arrays.items())
    if wanted is not None:
        if str(wanted) not in arrays:
            raise ValueError(f"the model returns no output {wanted!r}; allowed: {listed}")
        return arrays[str(wanted)]
    paths = [path for path, x in arrays.items() if x.shape] or list(arrays)
    for likely in (
        paths,
        [path for path in paths if path.rpartition("/")[2] == "logits"],
        [path for path in paths if "/" not in path],
    ):
        if len(likely) == 1:
            (path,) = likely
            return arrays[path]
    raise ValueError(
        f"the model returns {len(arrays)} arrays ({listed}); allowed: one, the logits. Name it, as "
        "in output='logits' or output=0, or turn the others off with a keyword of the model's call "
        "(train=False)"
    )


def _named(value) -> str:
    """None, or the class of a value and of what its parts are."""
    if value is None:
        return "None"
    inside = {type(leaf).__name__ for leaf in jax.tree.leaves(value)} - {type(value).__name__}
    what = f"a value of the class {type(value).__name__}"
    return f"{what} (with {', '.join(sorted(inside))})" if inside else what


def _arrays(value, path: str) -> Iterator[tuple[str, Any]]:
    """(path, array) of all arrays."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        yield path, value
        return
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif hasattr(value, "_fields"):
        parts = list(value._asdict().items())
    elif dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        parts = list(enumerate(value))
    else:  # trees that JAX knows, and what holds no array
        leaves = jax.tree_util.tree_flatten_with_path(value)[0]
        parts = [
            (jax.tree_util.keystr(at, simple=True, separator="/"), leaf)
            for at, leaf in leaves
            if at
        ]
    for name, part in parts:
        yield from _arrays(part, f"{path}/{name}" if path else str(name))
