"""What a request may need at most, and the headers that say what is left of a limit.

A prompt is counted by the model only later; until then its size stands for it: two bytes of plain
text, or one of any other, are a token at most for nearly all texts and models (English prose has
four). An answer without a length of its own may be as long as the model's context; a key with
limits of tokens or money gets no longer one, so that what was reserved is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from ollama_distributed.access.quotas import Amounts
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.inference import (
    ChatPrompt,
    EmbedRequest,
    InferenceRequest,
    RerankRequest,
    TextPrompt,
    TokensPrompt,
)
from ollama_distributed.base.policies import UNLIMITED, Limits
from ollama_distributed.base.usage import Left
from ollama_distributed.gateway.dialects.contract import Call, CountTokens, Generate
from ollama_distributed.gateway.out import RawHeaders

BYTES_PER_TOKEN = 2
IMAGE_TOKENS = 1500
"""Vision models take 256 to 1,500 for one."""
MESSAGE_TOKENS = 12
"""What templates put around a message."""
_ANTHROPIC = "/v1/messages"


class Ticket(Protocol):
    """A request that was let in (`access.metering.Ticket`)."""

    left: Left

    def close(self, tokens: int) -> None:
        """It has ended, and took so many tokens."""
        ...


class Metering(Protocol):
    """Lets requests in within limits (`node.usage.service.NodeUsage`)."""

    def longest(self, request: InferenceRequest) -> int:
        """Tokens that an answer has at most, whose request does not say."""
        ...

    def admit(self, identity: Identity, need: Need) -> Ticket | None:
        """None: perhaps with `borrow`.

        Raises:
            RateLimited, BudgetSpent
        """
        ...

    async def borrow(self, identity: Identity, need: Need) -> Ticket: ...


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What a call takes at most. `call`: with a length for each answer, where that is limited."""

    call: Call
    amounts: Amounts
    model: str
    prompt_tokens: int
    answer_tokens: int


def limits_of(identity: Identity | None) -> Limits | None:
    """None: there are none, which is nearly always so."""
    if identity is None or identity.policy is None or identity.policy.limits == UNLIMITED:
        return None
    return identity.policy.limits


def need_of(call: Call, limits: Limits, longest: Callable[[InferenceRequest], int]) -> Need:
    if not isinstance(call, Generate):
        prompt = 0 if isinstance(call, CountTokens) else _asked_tokens(call.request)
        amounts = Amounts(requests=1, tokens=prompt, running=1)
        return Need(
            call=call, amounts=amounts, model=call.request.model, prompt_tokens=prompt, answer_tokens=0
        )
    bounded = (limits.tokens_per_minute, limits.tokens_per_month, limits.budget_per_month) != (None,) * 3
    prompts, answers = 0, 0
    seen: set[int] = set()
    requests: list[InferenceRequest] = []
    for request in call.requests:
        if id(request.prompt) not in seen:  # several answers to one prompt read it once
            seen.add(id(request.prompt))
            prompts += prompt_tokens(request)
        most = request.sampling.num_predict
        if request.load_only or request.render_only:
            most = 0
        elif most is None or most < 0:
            most = longest(request)
            if bounded:
                sampling = msgspec.structs.replace(request.sampling, num_predict=most)
                request = msgspec.structs.replace(request, sampling=sampling)
        answers += most
        requests.append(request)
    return Need(
        call=msgspec.structs.replace(call, requests=tuple(requests)),
        amounts=Amounts(requests=1, tokens=prompts + answers, running=1),
        model=call.requests[0].model,
        prompt_tokens=prompts,
        answer_tokens=answers,
    )


def prompt_tokens(request: InferenceRequest) -> int:
    """As many as the prompt may have."""
    if request.load_only:
        return 0
    match request.prompt:
        case TokensPrompt(ids=ids):
            return len(ids)
        case TextPrompt() as text:
            parts = (text.text, text.suffix, text.system or "")
            return (
                sum(map(_text_tokens, parts))
                + len(text.context)
                + len(text.images) * IMAGE_TOKENS
                + 2 * MESSAGE_TOKENS
            )
        case ChatPrompt(messages=messages, tools=tools):
            found = sum(
                MESSAGE_TOKENS
                + _text_tokens(message.content)
                + _text_tokens(message.thinking)
                + sum(_text_tokens(one.arguments) + MESSAGE_TOKENS for one in message.tool_calls)
                + len(message.images) * IMAGE_TOKENS
                for message in messages
            )
            return found + sum(
                MESSAGE_TOKENS
                + _text_tokens(tool.description)
                + len(msgspec.json.encode(tool.parameters)) // BYTES_PER_TOKEN
                for tool in tools
            )


def _asked_tokens(request: EmbedRequest | RerankRequest | InferenceRequest) -> int:
    if isinstance(request, EmbedRequest):
        return sum(_text_tokens(one) + 2 if isinstance(one, str) else len(one) for one in request.inputs)
    if isinstance(request, RerankRequest):
        query = _text_tokens(request.query)
        return sum(_text_tokens(one) + query + 4 for one in request.documents)
    return prompt_tokens(request)


def _text_tokens(text: str) -> int:
    if text.isascii():
        return (len(text) + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN
    data = text.encode(errors="replace")
    plain = sum(1 for character in text if character < "\x80")
    return len(data) - plain + plain // BYTES_PER_TOKEN + 1


def limit_headers(left: Left | None, path: str, now: float) -> RawHeaders:
    """In OpenAI's names, or Anthropic's on its route; nothing of limits that there are not."""
    if left is None:
        return []
    found: RawHeaders = []
    for what, limit, remaining in (
        ("requests", left.limit_requests, left.requests),
        ("tokens", left.limit_tokens, left.tokens),
    ):
        if limit is None:
            continue
        if path.startswith(_ANTHROPIC):
            reset = datetime.fromtimestamp(now + left.reset_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            names = [f"anthropic-ratelimit-{what}-{one}" for one in ("limit", "remaining", "reset")]
        else:
            reset = f"{math.ceil(left.reset_s)}s"
            names = [f"x-ratelimit-{one}-{what}" for one in ("limit", "remaining", "reset")]
        values = (str(limit), str(remaining), reset)
        found += [(name.encode(), value.encode()) for name, value in zip(names, values, strict=True)]
    return found
