"""What a channel tells of: rows, each with an id."""

from __future__ import annotations

import msgspec


class Row(msgspec.Struct, frozen=True):
    id: str
    data: bytes
    """JSON."""
    about: str = ""
    """By which one may ask for it alone, beside its id."""
    owner: tuple[str, str, str] | None = None
    """Team, person, and `key_of` who asked; None: it is everybody's who may subscribe."""
    over: bool = False
    """It is there for the last time."""
    nameless: bytes = b""
    """The same without names of models, for whom some do not exist; empty: it names none."""
