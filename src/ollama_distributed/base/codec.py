"""JSON in and out. Replicated or stored data is encoded in a deterministic order."""

from __future__ import annotations

from typing import Any

import msgspec

_stored = msgspec.json.Encoder(order="deterministic")


def encode_pretty(data: Any) -> bytes:
    """For files that people open: indented, keys in a fixed order, ends with a newline."""
    return msgspec.json.format(_stored.encode(data), indent=2) + b"\n"
