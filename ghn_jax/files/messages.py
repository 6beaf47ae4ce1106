"""What errors say: those of libraries in a line, and values in words."""

from __future__ import annotations

_LONGEST = 200  # characters; some libraries quote what a file holds


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line of text: its first, or its kind."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) <= _LONGEST else first[:_LONGEST] + " ..."


def what_is(value) -> str:
    """A wrong argument: its type, with an article."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"
