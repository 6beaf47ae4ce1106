"""Values in the words of an error."""

from __future__ import annotations


def what_is(value) -> str:
    """A wrong argument: its type, with an article."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"
