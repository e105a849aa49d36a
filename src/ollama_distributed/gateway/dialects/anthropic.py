"""The Anthropic dialect: POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import msgspec

from ollama_distributed.gateway.dialects.anthropic_answer import MessageBody, MessageStream
from ollama_distributed.gateway.dialects.anthropic_errors import render_error
from ollama_distributed.gateway.dialects.anthropic_request import MessagesIn, inference_request
from ollama_distributed.gateway.dialects.contract import CountTokens, Generate, HotRoute, RequestContext
from ollama_distributed.gateway.dialects.fields import decode

_DECODER = msgspec.json.Decoder(MessagesIn)


def parse_messages(body: bytes, context: RequestContext) -> Generate:
    row = decode(body, _DECODER)
    request = inference_request(row, context)
    stop_sequences = tuple(row.stop_sequences or ())
    if row.stream:
        return Generate((request,), MessageStream(context, request.model, stop_sequences), stream=True)
    return Generate((request,), MessageBody(context, request.model, stop_sequences), stream=False)


def parse_count_tokens(body: bytes, context: RequestContext) -> CountTokens:
    request = inference_request(decode(body, _DECODER), context, counting=True)
    return CountTokens(request, lambda tokens: b'{"input_tokens":%d}' % tokens)


ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/v1/messages", parse_messages, render_error, large_body=True),
    HotRoute("POST", "/v1/messages/count_tokens", parse_count_tokens, render_error, large_body=True),
)
