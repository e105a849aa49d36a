"""The calls about the audit log as data. Pure; as `cluster_calls.py`."""

from __future__ import annotations

from urllib.parse import urlencode

from ollama_distributed.base import audit as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call

_decode_page = decoder_of(wire.AuditPage)
_decode_verify = decoder_of(wire.VerifyAnswer)


def page(
    *,
    limit: int = 100,
    before: str = "",
    since: float = 0.0,
    actor: str = "",
    action: str = "",
    object: str = "",  # noqa: A002  # the field's name on the wire
    result: str = "",
    node: str = "",
    request_id: str = "",
) -> Call[wire.AuditPage]:
    """What was changed, tried and refused on all nodes, the newest first.

    Args:
        before: `next` of the page before.
        since: seconds since the Unix epoch.
        action: a part of it, as with `object`; the others as a whole.
    """
    asked = {
        "limit": str(limit),
        "before": before,
        "since": f"{since:.6f}" if since else "",
        "actor": actor,
        "action": action,
        "object": object,
        "result": result,
        "node": node,
        "request_id": request_id,
    }
    query = urlencode({name: value for name, value in asked.items() if value})
    return Call(method="GET", path=f"/api/v1/audit?{query}", decode=_decode_page, repeat="always")


def verify() -> Call[wire.VerifyAnswer]:
    """Have every node read its chain and its copies from the first record to the last."""
    return Call(method="GET", path="/api/v1/audit/verify", decode=_decode_verify, repeat="always")
