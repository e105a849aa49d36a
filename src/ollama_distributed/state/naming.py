"""What a person reads who named a node that is not there. Pure."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable

_MOST_NAMED = 5
"""Names that the message tells."""
_MOST_COMPARED = 48
"""Names among which the nearest is looked for, of more those around it in the alphabet: 2 ms."""
_MOST_CHARS = 80
"""Of the name that was asked for."""


def unknown_node(asked: str, names: Iterable[str]) -> str:
    known, asked = sorted(set(names)), asked[:_MOST_CHARS]
    first = max(0, min(bisect.bisect(known, asked) - _MOST_COMPARED // 2, len(known) - _MOST_COMPARED))
    near = difflib.get_close_matches(asked, known[first : first + _MOST_COMPARED], _MOST_NAMED)
    if near:
        return f"there is no node {asked!r}; did you mean {' or '.join(near)}?"
    shown = ", ".join(known[:_MOST_NAMED]) + (", …" if len(known) > _MOST_NAMED else "")
    return f"there is no node {asked!r}; there are: {shown}"
