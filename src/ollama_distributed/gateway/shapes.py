"""Which dialect's error shape a path has, where no hot route says it."""

from __future__ import annotations

from collections.abc import Container

from ollama_distributed.gateway.dialects.anthropic_errors import render_error as render_anthropic
from ollama_distributed.gateway.dialects.anthropic_models import VERSION_HEADER
from ollama_distributed.gateway.dialects.contract import RenderError
from ollama_distributed.gateway.dialects.openai_errors import render_error as render_openai
from ollama_distributed.gateway.errors import render_ollama, render_seed

_BY_PREFIX: tuple[tuple[str, RenderError], ...] = (
    ("/api/v1/", render_seed),
    ("/api/", render_ollama),
    ("/v1/", render_openai),
)
_MESSAGES, _MODELS = "/v1/messages", "/v1/models"


def for_anthropic(path: str, headers: Container[str]) -> bool:
    """By a client of Anthropic's: on its own routes, or on those of the models, which OpenAI's ask too."""
    return path.startswith(_MESSAGES) or (path.startswith(_MODELS) and VERSION_HEADER in headers)


def renderer_of(path: str, headers: Container[str] = ()) -> RenderError:
    if for_anthropic(path, headers):
        return render_anthropic
    for prefix, render in _BY_PREFIX:
        if path.startswith(prefix):
            return render
    return render_seed
