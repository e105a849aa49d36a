"""The OpenAI dialect: which route is parsed by what."""

from __future__ import annotations

from ollama_distributed.gateway.dialects.contract import HotRoute
from ollama_distributed.gateway.dialects.openai_chat import parse_chat
from ollama_distributed.gateway.dialects.openai_completions import parse_completion
from ollama_distributed.gateway.dialects.openai_embeddings import parse_embeddings
from ollama_distributed.gateway.dialects.openai_errors import render_error

ROUTES: tuple[HotRoute, ...] = (
    HotRoute("POST", "/v1/chat/completions", parse_chat, render_error, large_body=True),
    HotRoute("POST", "/v1/completions", parse_completion, render_error),
    HotRoute("POST", "/v1/embeddings", parse_embeddings, render_error),
)
