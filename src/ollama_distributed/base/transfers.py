"""What a node counts of models on their way."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class TransferFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Since its start."""

    received_bytes: int = 0
    """Of models, from registries."""
    sent_bytes: int = 0
    """To them."""
    received_per_s: float = 0.0
    """Mean of about a minute, or since the last look."""
    sent_per_s: float = 0.0
    running: Mapping[str, int] = {}
    """By kind: `pull`, `push`, `copy`."""
    ended: Mapping[tuple[str, str], int] = {}
    """By kind and outcome: `done`, `failed`, `cancelled`."""
