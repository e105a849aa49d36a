"""What a person reads who named a node that is not there. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_NAMED = 5
"""Names that the message tells."""
_MOST_COMPARED = 1000
"""Names among which the nearest is looked for: some 10 ms."""


def unknown_node(asked: str, names: Iterable[str]) -> str:
    known = sorted(set(names))
    near = difflib.get_close_matches(asked, known[:_MOST_COMPARED], _MOST_NAMED)
    if near:
        return f"there is no node {asked[:80]!r}; did you mean {' or '.join(near)}?"
    shown = ", ".join(known[:_MOST_NAMED]) + (", …" if len(known) > _MOST_NAMED else "")
    return f"there is no node {asked[:80]!r}; there are: {shown}"
