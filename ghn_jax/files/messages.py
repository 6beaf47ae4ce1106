"""Errors of libraries, in a sentence of ours."""

from __future__ import annotations

_LONGEST = 200  # characters; some libraries quote what a file holds


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line of text: its first, or its kind."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if len(first) <= _LONGEST else first[:_LONGEST] + " ..."
