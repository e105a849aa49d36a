"""The OpenAI Responses dialect: POST /v1/responses, stateless."""

from __future__ import annotations

import msgspec

from ollama_distributed.gateway.dialects.contract import Generate, HotRoute, RequestContext
from ollama_distributed.gateway.dialects.fields import decode
from ollama_distributed.gateway.dialects.openai_errors import render_error
from ollama_distributed.gateway.dialects.responses_answer import ResponseBody, ResponseStream
from ollama_distributed.gateway.dialects.responses_request import ResponsesIn, inference_request

_DECODER = msgspec.json.Decoder(ResponsesIn)


def parse_responses(body: bytes, context: RequestContext) -> Generate:
    row = decode(body, _DECODER)
    request = inference_request(row, context)
    if row.stream:
        return Generate((request,), ResponseStream(row, request.sampling, context), stream=True)
    return Generate((request,), ResponseBody(row, request.sampling, context), stream=False)


ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/v1/responses", parse_responses, render_error, large_body=True),
)
