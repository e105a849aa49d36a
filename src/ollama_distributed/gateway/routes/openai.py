"""The model list of OpenAI and of Anthropic, who share its paths; the bodies are the dialects'."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.dialects.anthropic_models import (
    VERSION_HEADER,
    anthropic_model,
    anthropic_models,
)
from ollama_distributed.gateway.dialects.openai_models import Model, ModelList, render_model, render_models
from ollama_distributed.gateway.routes.models import namespace, newest_first
from ollama_distributed.gateway.routes.table import ColdRoute, Node

TAG = "OpenAI"
_JSON = "application/json"


def openai_routes(node: Node) -> list[ColdRoute]:
    async def models(cold: ColdRequest, _request: Request) -> Response:
        specs = [spec for spec in newest_first(node.catalog.list()) if cold.sees(spec.display)]
        if VERSION_HEADER in cold.head.headers:
            rows = [anthropic_model(spec.display, spec.modified_at) for spec in specs]
            return Response(msgspec.json.encode(anthropic_models(rows)), media_type=_JSON)
        body = render_models((spec.display, spec.modified_at, namespace(spec)) for spec in specs)
        return Response(body, media_type=_JSON)

    async def model(cold: ColdRequest, request: Request) -> Response:
        asked: str = request.path_params["model"]
        spec = await node.catalog.resolve(asked)
        if VERSION_HEADER in cold.head.headers:
            row = anthropic_model(spec.display, spec.modified_at)
            return Response(msgspec.json.encode(row), media_type=_JSON)
        return Response(render_model(asked, spec.modified_at, namespace(spec)), media_type=_JSON)

    return [
        ColdRoute(
            method="GET",
            path="/v1/models",
            verb="read",
            run=models,
            tag=TAG,
            summary="All models",
            answer=ModelList,
        ),
        ColdRoute(
            method="GET",
            path="/v1/models/{model:path}",
            verb="read",
            run=model,
            tag=TAG,
            summary="One model",
            answer=Model,
        ),
    ]
