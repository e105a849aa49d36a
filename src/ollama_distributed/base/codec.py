"""JSON in and out. Replicated or stored data is encoded in a deterministic order."""

from __future__ import annotations

from typing import Any

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises over bytes of strangers: a string that is not UTF-8 is none of its own errors."""

_stored = msgspec.json.Encoder(order="deterministic")


def encode_pretty(data: Any) -> bytes:
    """For files that people open: indented, keys in a fixed order, ends with a newline."""
    return msgspec.json.format(_stored.encode(data), indent=2) + b"\n"
