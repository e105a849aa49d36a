"""Why a request goes where it goes: `/api/v1/route/*`.

Shown are the choices of the node that is asked, since each gateway makes its own. Who is no
administrator sees those of the own team.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.errors import Invalid, ModelNotFound, NotFound
from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.base.routing import ExplainAsk, RouteDecision, RouteDecisions
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.dialects.contract import Generate, RequestContext
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.route_port import Routes
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

TAG = "Routing"
MOST_SHOWN = 1024
SHOWN = 50
_ASK = msgspec.json.Decoder(ExplainAsk)
_PARSERS = {route.path: route.parse for route in HOT_ROUTES}


def route_routes(routes: Routes) -> list[ColdRoute]:
    handlers = _Handlers(routes)
    return [
        ColdRoute(
            method="POST",
            path="/api/v1/route/explain",
            verb="read",
            run=handlers.explain,
            tag=TAG,
            summary="Which node would answer a request, or answered a recent one, and why not the others",
            body=ExplainAsk,
            answer=RouteDecision,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/route/decisions",
            verb="read",
            run=handlers.decisions,
            tag=TAG,
            summary="The choices that this node made last, newest first",
            words=("limit",),
            answer=RouteDecisions,
        ),
    ]


class _Handlers:
    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    async def explain(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _ASK)
        if not ask.request_id:
            decided = self._routes.explain(_request(ask, cold))
            if not (decided.candidates or decided.left_out):
                raise ModelNotFound(f"model {ask.model[:200]!r} not found")
            return json_response(decided)
        found = self._routes.decisions.find(ask.request_id, _team(cold))
        if found is None:
            raise NotFound(
                f"this node did not choose for a request {ask.request_id[:64]!r} lately; ask the node "
                "that the client talked to"
            )
        return json_response(found)

    async def decisions(self, cold: ColdRequest, request: Request) -> Response:
        text = request.query_params.get("limit", str(SHOWN))
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text)):
            raise Invalid("limit is a number from 1", param="limit")
        return json_response(self._routes.decisions.latest(min(int(text), MOST_SHOWN), _team(cold)))


def _team(cold: ColdRequest) -> str | None:
    """Whose choices may be seen; None: all."""
    assert cold.identity is not None, "only routes with a verb ask"
    return None if cold.may("admin", "decisions") else cold.identity.team


def _request(ask: ExplainAsk, cold: ColdRequest) -> InferenceRequest:
    """As the dialects read it, so that the same prompt has the same beginning."""
    assert cold.identity is not None
    if not ask.model:
        raise Invalid("name a model, or a request_id", param="model")
    if (ask.prompt is None) == (ask.messages is None):
        raise Invalid("give either messages or a prompt")
    body: dict[str, Any]
    if ask.messages is not None:
        path = "/v1/chat/completions"
        body = {"model": ask.model, "messages": ask.messages, "tools": ask.tools}
    else:
        path = "/api/generate"
        body = {"model": ask.model, "prompt": ask.prompt, "raw": ask.raw, "system": ask.system}
    body = {name: value for name, value in body.items() if value is not None}
    context = RequestContext(request_id=cold.request_id, identity=cold.identity, now=0.0, path=path)
    call = _PARSERS[path](msgspec.json.encode(body), context)
    assert isinstance(call, Generate), "these routes generate"
    return call.requests[0]
