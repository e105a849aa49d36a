"""Every hot route there is; the hot path and the documentation are built of this."""

from __future__ import annotations

from ollama_distributed.gateway.dialects import anthropic, ollama, openai, rerank, responses, seed
from ollama_distributed.gateway.dialects.contract import HotRoute

HOT_ROUTES: tuple[HotRoute, ...] = (
    *seed.ROUTES,
    *ollama.ROUTES,
    *openai.ROUTES,
    *responses.ROUTES,
    *anthropic.ROUTES,
    *rerank.ROUTES,
)
