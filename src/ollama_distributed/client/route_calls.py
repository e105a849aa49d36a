"""The calls about the choice of nodes as data. Pure; as `cluster_calls.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ollama_distributed.base import routing as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call

_decode_decision = decoder_of(wire.RouteDecision)
_decode_decisions = decoder_of(wire.RouteDecisions)
_encode = msgspec.json.Encoder().encode


def explain(
    model: str = "",
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    system: str | None = None,
    raw: bool = False,
    request_id: str = "",
) -> Call[wire.RouteDecision]:
    """Which node would answer, what was expected of each, and who was left out and why; nothing is
    sent to any of them. With `request_id` alone: of a recent request, and where its time went.

    Raises `NotFound` for a request that this node did not choose for lately.
    """
    if request_id:
        body: dict[str, Any] = {"request_id": request_id}
    else:
        said = {"model": model, "prompt": prompt, "messages": messages, "system": system, "raw": raw or None}
        body = {name: value for name, value in said.items() if value is not None}
        if messages is None:
            body.setdefault("prompt", "")
    return Call(
        method="POST",
        path="/api/v1/route/explain",
        body=_encode(body),
        decode=_decode_decision,
        repeat="always",
    )


def decisions(limit: int = 50) -> Call[wire.RouteDecisions]:
    """The choices that the asked node made last, newest first, each with all that it was made of."""
    path = f"/api/v1/route/decisions?limit={limit}"
    return Call(method="GET", path=path, decode=_decode_decisions, repeat="always")
