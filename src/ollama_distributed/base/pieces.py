"""What a node counts of the pieces that it exchanges with others."""

from __future__ import annotations

import msgspec


class PieceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Since its start."""

    sent_bytes: int = 0
    """Of models, to other nodes."""
    received_bytes: int = 0
    """Pieces that had the right hash."""
    again: int = 0
    """Pieces that broke off, were wrong or came too slowly, and were asked for again."""
    sent_per_s: float = 0.0
    """Bytes: mean of about a minute, or since the last look."""
    received_per_s: float = 0.0
    lies: int = 0
    """Times that a node was found to send wrong bytes, or a wrong table, and dropped for that blob."""
