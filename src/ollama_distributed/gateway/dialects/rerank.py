"""POST /v1/rerank, /v2/rerank and /rerank, in the shape that Cohere and Jina share.

Sources: Cohere API reference "Rerank" v1 and v2, Jina AI reranker API. Errors have OpenAI's shape.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import RerankRequest, RerankResult
from ollama_distributed.gateway.dialects.contract import HotRoute, RequestContext, Rerank
from ollama_distributed.gateway.dialects.fields import INT_MAX, decode, need_model, within
from ollama_distributed.gateway.dialects.openai_errors import render_error
from ollama_distributed.gateway.dialects.options import keep_alive_s, merged_options
from ollama_distributed.gateway.dialects.sse import json_value

MAX_DOCUMENTS = 10_000
"""Each is a pass through the model; Cohere advises at most 1,000."""


class DocumentIn(msgspec.Struct, frozen=True):
    text: str


class RerankIn(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    query: str | None = None
    documents: list[str | DocumentIn] | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


_DECODER = msgspec.json.Decoder(RerankIn)


def parse_rerank(body: bytes, context: RequestContext) -> Rerank:
    row = decode(body, _DECODER)
    model = need_model(row.model)
    if not row.query:
        raise Invalid("query is required", param="query")
    if not row.documents:
        raise Invalid("documents must hold at least one document", param="documents")
    if len(row.documents) > MAX_DOCUMENTS:
        raise Invalid(
            f"documents takes at most {MAX_DOCUMENTS} documents, got {len(row.documents)}", param="documents"
        )
    texts = tuple(document if isinstance(document, str) else document.text for document in row.documents)
    top_n = within("top_n", row.top_n, 1, INT_MAX)
    request = RerankRequest(
        request_id=context.request_id,
        identity=context.identity,
        model=model,
        query=row.query,
        documents=texts,
        keep_alive_s=keep_alive_s(row.keep_alive),
        options=merged_options(row.options)[1],
    )

    def encode(result: RerankResult) -> bytes:
        return rerank_body(
            f"rerank-{context.request_id}", model, result, top_n, texts if row.return_documents else None
        )

    return Rerank(request, encode)


def rerank_body(
    answer_id: str, model: str, result: RerankResult, top_n: int | None, texts: tuple[str, ...] | None
) -> bytes:
    """Best first; equal scores keep the documents' order."""
    ranked = sorted(range(len(result.scores)), key=lambda index: -result.scores[index])[:top_n]
    rows: list[dict[str, Any]] = []
    for index in ranked:
        row: dict[str, Any] = {"index": index, "relevance_score": result.scores[index]}
        if texts is not None:
            row["document"] = {"text": texts[index]}
        rows.append(row)
    tokens = result.usage.prompt_tokens
    return json_value(
        {
            "id": answer_id,
            "object": "list",
            "model": model,
            "results": rows,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/v1/rerank", parse_rerank, render_error),
    HotRoute("POST", "/v2/rerank", parse_rerank, render_error),
    HotRoute("POST", "/rerank", parse_rerank, render_error),
)
