"""Who did what under `/api/v1/audit`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.audit import AuditFilter, AuditPage, VerifyAnswer
from ollama_distributed.base.errors import Invalid
from ollama_distributed.gateway.auditing import Auditing
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

TAG = "Audit"
MOST = 1000
_WORDS = ("actor", "action", "object", "result", "node", "request_id", "before")


def audit_routes(audit: Auditing) -> list[ColdRoute]:
    async def page(_cold: ColdRequest, request: Request) -> Response:
        query = request.query_params
        wanted = AuditFilter(
            limit=round(_number(query.get("limit", "100"), "limit", 1, MOST)),
            since=_number(query.get("since", "0"), "since", 0, 1e12),
            **{name: query.get(name, "") for name in _WORDS},
        )
        return json_response(await audit.page(wanted))

    async def verify(_cold: ColdRequest, _request: Request) -> Response:
        return json_response(await audit.verify())

    return [
        ColdRoute(
            method="GET",
            path="/api/v1/audit",
            verb="read",
            run=page,
            tag=TAG,
            summary="What was changed, tried and refused on all nodes, the newest first",
            words=(*_WORDS, "since", "limit"),
            answer=AuditPage,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/audit/verify",
            verb="read",
            run=verify,
            tag=TAG,
            summary="Whether any record of any node was changed, cut off or put elsewhere",
            answer=VerifyAnswer,
        ),
    ]


def _number(text: str, name: str, least: float, most: float) -> float:
    try:
        value = msgspec.convert(text, float, strict=False)
    except msgspec.ValidationError:
        value = least - 1
    if not least <= value <= most:
        raise Invalid(f"{name} is a number from {least:g} to {most:g}", param=name)
    return value
