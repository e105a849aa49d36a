"""The seed's REST dialect: `/api/v1/generate`, `/api/v1/chat`, `/api/v1/embeddings`.

Bodies and answers are Ollama's, with two differences: without `stream` the answer is one
JSON object, and errors are `{"error": {code, message, retryable, request_id}}`.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import Invalid, OllamaDistributedError
from ollama_distributed.gateway.dialects.contract import Call, HotRoute, RequestContext
from ollama_distributed.gateway.dialects.fields import decode
from ollama_distributed.gateway.dialects.ollama import chat_call, embed_call, generate_call
from ollama_distributed.gateway.dialects.ollama_answer import ErrorLine
from ollama_distributed.gateway.dialects.ollama_wire import ChatBody, EmbedBody, GenerateBody
from ollama_distributed.gateway.errors import render_seed, seed_error_body

_GENERATE = msgspec.json.Decoder(GenerateBody)
_CHAT = msgspec.json.Decoder(ChatBody)
_EMBED = msgspec.json.Decoder(EmbedBody)


def parse_generate(body: bytes, context: RequestContext) -> Call:
    row = decode(body, _GENERATE)
    _need_model(row.model)
    return generate_call(row, context, streams=False, error_line=_error_line(context))


def parse_chat(body: bytes, context: RequestContext) -> Call:
    row = decode(body, _CHAT)
    _need_model(row.model)
    return chat_call(row, context, streams=False, error_line=_error_line(context))


def parse_embeddings(body: bytes, context: RequestContext) -> Call:
    row = decode(body, _EMBED)
    _need_model(row.model)
    return embed_call(row, context)


def _need_model(model: str | None) -> None:
    if not model:
        raise Invalid("model is required", param="model")


def _error_line(context: RequestContext) -> ErrorLine:
    def line(error: OllamaDistributedError) -> bytes:
        return seed_error_body(error, context.request_id)

    return line


ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/api/v1/generate", parse_generate, render_seed, large_body=True),
    HotRoute("POST", "/api/v1/chat", parse_chat, render_seed, large_body=True),
    HotRoute("POST", "/api/v1/embeddings", parse_embeddings, render_seed),
)
