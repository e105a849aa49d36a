"""Which dialect's error shape a path has, where no hot route says it."""

from __future__ import annotations

from ollama_distributed.gateway.dialects.anthropic_errors import render_error as render_anthropic
from ollama_distributed.gateway.dialects.contract import RenderError
from ollama_distributed.gateway.dialects.openai_errors import render_error as render_openai
from ollama_distributed.gateway.errors import render_ollama, render_seed

_BY_PREFIX: tuple[tuple[str, RenderError], ...] = (
    ("/api/v1/", render_seed),
    ("/api/", render_ollama),
    ("/v1/messages", render_anthropic),
    ("/v1/", render_openai),
)


def renderer_of(path: str) -> RenderError:
    for prefix, render in _BY_PREFIX:
        if path.startswith(prefix):
            return render
    return render_seed
