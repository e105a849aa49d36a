"""Who used what, as JSON or as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.access.usage import DAY_S, check_by, check_day
from ollama_distributed.base.errors import Forbidden, Invalid
from ollama_distributed.base.identity import Identity, Role
from ollama_distributed.base.usage import By, UsageAnswer
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.routes.table import ColdRoute, json_response
from ollama_distributed.gateway.usage_port import UsageDesk

DEFAULT_DAYS = 30
MOST_DAYS = 400
CSV = "text/csv"
OWN_ONLY: frozenset[Role] = frozenset({"user", "plugin"})
"""Roles that see what they used themselves."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Text that a spreadsheet would run."""


def usage_routes(desk: UsageDesk, wall: Callable[[], float]) -> list[ColdRoute]:
    async def show(cold: ColdRequest, request: Request) -> Response:
        query = request.query_params
        by = check_by(query.get("by", "day"))
        today = wall() // DAY_S * DAY_S
        start = check_day(query["from"], "from") if query.get("from") else today - (DEFAULT_DAYS - 1) * DAY_S
        end = (check_day(query["to"], "to") if query.get("to") else today) + DAY_S
        if not start < end <= start + MOST_DAYS * DAY_S:
            raise Invalid(f"from is before to, and at most {MOST_DAYS} days", param="from")
        assert cold.identity is not None
        key, team = _whose(cold.identity, query.get("key", ""), query.get("team", ""))
        answer = await desk.usage(by, start, end, key=key, team=team)
        form = query.get("format", "csv" if CSV in cold.head.headers.get("accept", "") else "json")
        if form not in ("csv", "json"):
            raise Invalid("format is json or csv", param="format")
        if form == "csv":
            return Response(csv_text(answer, by), media_type=f"{CSV}; charset=utf-8")
        return json_response(answer)

    return [
        ColdRoute(
            method="GET",
            path="/api/v1/usage",
            verb="read",
            run=show,
            tag="Usage",
            summary="Tokens, requests, seconds, energy and money by key, team, model, node, day or hour; "
            "days from and to are UTC; format=csv",
            answer=UsageAnswer,
            other_media=(CSV,),
            words=("from", "to", "by", "key", "team", "format"),
        )
    ]


def _whose(identity: Identity, key: str, team: str) -> tuple[str, str]:
    """
    Raises:
        Forbidden: somebody else's.
    """
    if identity.role not in OWN_ONLY:
        return key, team
    own = identity.key_id or (f"user:{identity.user}" if identity.user else identity.role)
    if key not in ("", own) or team:
        raise Forbidden(f"the role {identity.role!r} sees what it used itself")
    return own, ""


def csv_text(answer: UsageAnswer, by: tuple[By, ...]) -> str:
    """RFC 4180: a head, then a line for each row; the total too where there are no groups."""
    counts = [name for name in answer.total.__struct_fields__ if getattr(answer.total, name) is not None]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*by, *counts])
    for row in answer.rows if by else (answer.total,):
        writer.writerow([*(_plain(getattr(row, one)) for one in by), *(getattr(row, one) for one in counts)])
    return out.getvalue()


def _plain(name: str | None) -> str:
    text = name or ""
    return "'" + text if text.startswith(_FORMULA) else text
