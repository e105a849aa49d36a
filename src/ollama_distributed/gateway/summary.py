"""What is known of a request when it is over: the one log line and the metrics are made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from ollama_distributed.base.inference import Usage

Outcome = Literal["ok", "error", "cancelled"]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Never a prompt, an answer or a key."""

    request_id: str
    method: str
    route: str
    """The route's pattern, never the raw path: a label of metrics."""
    status: int
    outcome: Outcome
    error_code: str = ""
    took_s: float
    first_byte_s: float | None = None
    bytes_out: int = 0
    model: str = ""
    role: str = ""
    key_id: str = ""
    team: str = ""
    usage: Usage | None = None


Observer = Callable[[Summary], None]
"""Called once per request; must not raise."""
