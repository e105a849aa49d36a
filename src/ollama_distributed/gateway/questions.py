"""Calls with one answer that is there as a whole: vectors, scores, counts."""

from __future__ import annotations

from functools import partial
from typing import assert_never

import msgspec

from ollama_distributed.base.inference import EmbedResult, Inference, Usage
from ollama_distributed.gateway.dialects.contract import CountTokens, Embed, Rerank
from ollama_distributed.gateway.workers import Offload

INLINE_NUMBERS = 16_384
"""Of vectors: their text takes 0.5 ms."""

Question = Embed | Rerank | CountTokens


class Reply(msgspec.Struct, frozen=True):
    body: bytes
    usage: Usage | None = None
    node: str = ""
    why: str | None = None
    """That node answers, as routing says; None: it is not told."""


async def answer(call: Question, inference: Inference, offload: Offload) -> Reply:
    """
    Raises:
        OllamaDistributedError: as `Inference` says.
    """
    match call:
        case Embed():
            embedded = await inference.embed(call.request)
            body = await _encoded(call, embedded, offload)
            return Reply(body, embedded.usage, embedded.node, embedded.route)
        case Rerank():
            ranked = await inference.rerank(call.request)
            return Reply(call.encode(ranked), ranked.usage, ranked.node, ranked.route)
        case CountTokens():
            return Reply(call.encode(await inference.count_tokens(call.request)))
        case _:
            assert_never(call)


async def _encoded(call: Embed, result: EmbedResult, offload: Offload) -> bytes:
    """The vectors as JSON; many of them in a thread."""
    if sum(map(len, result.vectors)) <= INLINE_NUMBERS:
        return call.encode(result)
    return await offload(partial(call.encode, result))
