"""The OpenAI Responses dialect: POST /v1/responses, stateless, and POST /v1/responses/input_tokens."""

from __future__ import annotations

from typing import Literal

import msgspec

from ollama_distributed.gateway.dialects.contract import CountTokens, Generate, HotRoute, RequestContext
from ollama_distributed.gateway.dialects.fields import decode
from ollama_distributed.gateway.dialects.openai_errors import render_error
from ollama_distributed.gateway.dialects.responses_answer import ResponseBody, ResponseStream
from ollama_distributed.gateway.dialects.responses_request import ResponsesIn, inference_request
from ollama_distributed.gateway.dialects.sse import json_value

_DECODER = msgspec.json.Decoder(ResponsesIn)


def parse_responses(body: bytes, context: RequestContext) -> Generate:
    row = decode(body, _DECODER)
    request = inference_request(row, context)
    if row.stream:
        return Generate((request,), ResponseStream(row, request.sampling, context), stream=True)
    return Generate((request,), ResponseBody(row, request.sampling, context), stream=False)


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


def parse_input_tokens(body: bytes, context: RequestContext) -> CountTokens:
    request = inference_request(decode(body, _DECODER), context)
    return CountTokens(request, lambda tokens: json_value(InputTokens(input_tokens=tokens)))


ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/v1/responses", parse_responses, render_error, large_body=True),
    HotRoute("POST", "/v1/responses/input_tokens", parse_input_tokens, render_error, large_body=True),
)
