"""A condition that somebody should see to: what the channel `alerts` tells, and nodes tell each other.

Fields are added with defaults only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

Level: TypeAlias = Literal["error", "warning", "info"]
"""error: something is lost or refused now; warning: it works, with less than there should be; info: news."""

MOST = 8
"""That one node tells of itself."""
MOST_TEXT = 400
"""Characters of a message: eight of them travel with a heartbeat."""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """It holds for as long as it is told."""

    level: Level
    message: str
    """What is the matter and what to do, one sentence."""
    code: str
    """What kind of condition; stable."""
    node: str = ""
    """The id of the node it is about; empty: the cluster."""
    name: str = ""
    """Of that node."""
    model: str = ""
    """It is about."""
    subject: str = ""
    """What else it is about: a key of the state, another node."""
    since: float = 0.0
    """When it began, or else was seen first, seconds since the Unix epoch; 0: not known."""

    @property
    def id(self) -> str:
        """No two that hold at a time have the same. Names no model."""
        about = self.model or self.subject
        digest = hashlib.sha256(about.encode()).hexdigest()[:8] if about else ""
        return "/".join(filter(None, (self.code, self.node, digest)))

    def nameless(self) -> Alert:
        """For who may not know of the model."""
        where = self.name or "a node"
        text = f"a model that is not for you is in trouble at {where}; see who may use it"
        return msgspec.structs.replace(self, model="", message=text)

    def over(self) -> Alert:
        """What is told when it holds no more: without what to do, which follows the first semicolon."""
        what = self.message.partition(";")[0]
        return msgspec.structs.replace(self, level="info", message=clipped(f"over: {what}"))


_write = msgspec.msgpack.Encoder().encode
_read = msgspec.msgpack.Decoder(tuple[Alert, ...])


def clipped(text: str, most: int = MOST_TEXT) -> str:
    """On one line, and not too long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


def encode(alerts: Sequence[Alert]) -> bytes:
    """The first `MOST`, for a heartbeat; empty: there are none."""
    return _write(tuple(alerts[:MOST])) if alerts else b""


def decode(data: bytes) -> tuple[Alert, ...]:
    """Of another node. None where it is of a kind that is not known here."""
    try:
        return _read.decode(data)[:MOST] if data else ()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ()
