"""Identifiers. Random ones come from `secrets`; pure rooms get them as arguments."""

from __future__ import annotations

import secrets
from typing import Literal, NewType, TypeAlias

RequestId = NewType("RequestId", str)
NodeId = NewType("NodeId", str)
KeyId = NewType("KeyId", str)

NodeRole: TypeAlias = Literal["node", "server"]
"""`server`: may vote, admits others, holds the cluster's keys."""

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def random_id(length: int = 12) -> str:
    """Lower-case base36, `length` characters (5.17 bits each)."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
