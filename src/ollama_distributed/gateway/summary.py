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
    node: str = ""
    """Name of the other node that answered; empty: this one."""
    moves: int = 0
    """Times that the answer went on at another node."""
    role: str = ""
    key_id: str = ""
    user: str = ""
    """Who signed in; empty: a key, or nobody."""
    team: str = ""
    usage: Usage | None = None


Observer = Callable[[Summary], None]
"""Called once per request; must not raise."""


def together(one: Usage, two: Usage) -> Usage:
    """Tokens of several answers to one prompt; the times are the longest."""
    return Usage(
        prompt_tokens=max(one.prompt_tokens, two.prompt_tokens),
        cached_tokens=max(one.cached_tokens, two.cached_tokens),
        completion_tokens=one.completion_tokens + two.completion_tokens,
        reasoning_tokens=one.reasoning_tokens + two.reasoning_tokens,
        total_s=max(one.total_s, two.total_s),
        load_s=max(one.load_s, two.load_s),
        wait_s=max(one.wait_s, two.wait_s),
        prompt_s=max(one.prompt_s, two.prompt_s),
        completion_s=max(one.completion_s, two.completion_s),
    )


def added(one: Usage, two: Usage) -> Usage:
    """Of answers to several prompts."""
    return Usage(**{field: getattr(one, field) + getattr(two, field) for field in Usage.__struct_fields__})
