"""What a request says of its turn: who asks, how urgently, for about how many tokens. Pure."""

from __future__ import annotations

from ollama_distributed.base.inference import (
    ChatPrompt,
    EmbedRequest,
    InferenceRequest,
    RerankRequest,
    TextPrompt,
)
from ollama_distributed.base.queue import Ask, key_of

BYTES_PER_TOKEN = 4
"""Of English text; only how requests compare matters here."""
IMAGE_TOKENS = 500
"""Vision models take 256 to 1,500 for one."""


def generation(request: InferenceRequest, *, goes_on: bool = False) -> Ask:
    """`goes_on`: it had its turn at a node that was lost, and its client reads on: nobody urgent waits
    longer than that."""
    most = request.sampling.num_predict
    return Ask(
        key=key_of(request.identity),
        team=request.identity.team,
        priority="interactive" if goes_on else request.priority,
        prompt_tokens=_prompt_tokens(request),
        most_tokens=most if most is not None and most >= 0 else None,
        within_s=None if goes_on else request.within_s,
        progress=request.progress,
        request_id=request.request_id,
        user=request.identity.user,
    )


def question(request: EmbedRequest | RerankRequest) -> Ask:
    """For vectors or scores: prompts only."""
    if isinstance(request, EmbedRequest):
        size = sum(
            len(one) // BYTES_PER_TOKEN if isinstance(one, str) else len(one) for one in request.inputs
        )
    else:
        size = sum(len(one) + len(request.query) for one in request.documents) // BYTES_PER_TOKEN
    return Ask(
        key=key_of(request.identity),
        team=request.identity.team,
        priority=request.priority,
        prompt_tokens=size,
        most_tokens=0,
        within_s=request.within_s,
        request_id=request.request_id,
        user=request.identity.user,
    )


def _prompt_tokens(request: InferenceRequest) -> int:
    prompt = request.prompt
    if isinstance(prompt, ChatPrompt):
        text = images = 0
        for one in prompt.messages:
            text += len(one.content)
            images += len(one.images)
        return text // BYTES_PER_TOKEN + images * IMAGE_TOKENS
    if isinstance(prompt, TextPrompt):
        text = len(prompt.text) + len(prompt.system or "") + len(prompt.suffix)
        return text // BYTES_PER_TOKEN + len(prompt.context) + len(prompt.images) * IMAGE_TOKENS
    return len(prompt.ids)
