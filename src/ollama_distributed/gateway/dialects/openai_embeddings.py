"""POST /v1/embeddings. Source: OpenAI API reference "Create embeddings"."""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import EmbedRequest, EmbedResult
from ollama_distributed.gateway.dialects.contract import Embed, RequestContext
from ollama_distributed.gateway.dialects.fields import decode, need_model, within
from ollama_distributed.gateway.dialects.openai_completions import text_or_tokens
from ollama_distributed.gateway.dialects.options import keep_alive_s, merged_options
from ollama_distributed.gateway.dialects.sse import json_value

MAX_INPUTS = 2048
"""OpenAI's bound on one request."""
MAX_DIMENSIONS = 65_536


class EmbeddingsIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    input: str | list[str | int | list[int]] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


_DECODER = msgspec.json.Decoder(EmbeddingsIn)


def parse_embeddings(body: bytes, context: RequestContext) -> Embed:
    row = decode(body, _DECODER)
    model = need_model(row.model)
    inputs = text_or_tokens("input", row.input)
    if len(inputs) > MAX_INPUTS:
        raise Invalid(f"input takes at most {MAX_INPUTS} entries, got {len(inputs)}", param="input")
    form = (row.encoding_format or "float").lower()
    if form not in ("float", "base64"):
        raise Invalid(
            f'encoding_format must be float or base64, got "{row.encoding_format}"', param="encoding_format"
        )
    request = EmbedRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=model,
        inputs=inputs,
        dimensions=within("dimensions", row.dimensions, 1, MAX_DIMENSIONS),
        keep_alive_s=keep_alive_s(row.keep_alive),
        options=merged_options(row.options)[1],
    )

    def encode(result: EmbedResult) -> bytes:
        return embeddings_body(model, result, as_base64=form == "base64")

    return Embed(request, encode)


def float32_base64(vector: tuple[float, ...]) -> str:
    """Little-endian float32, as the official clients decode it."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def embeddings_body(model: str, result: EmbedResult, *, as_base64: bool) -> bytes:
    tokens = result.usage.prompt_tokens
    rows: list[dict[str, Any]] = [
        {"object": "embedding", "index": i, "embedding": float32_base64(vector) if as_base64 else vector}
        for i, vector in enumerate(result.vectors)
    ]
    return json_value(
        {
            "object": "list",
            "data": rows,
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )
