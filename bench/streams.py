"""Streamed chats against one server: how fast, and how soon the first token."""

from __future__ import annotations

import asyncio
import re
import statistics
import time

import msgspec

from ollama_distributed.adapters.engines.http import Address, request

DEADLINE_S = 120.0
_WORDS = re.compile(rb'"content":"[^"]')
"""An event of an answer's first chunk may say that there is none yet, before one with words."""
SAMPLING = {"top_k": 40, "top_p": 0.9, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A server that answers OpenAI chats."""

    name: str
    address: Address
    model: str
    key: str = ""


class Stream(msgspec.Struct, frozen=True):
    first_token_s: float
    tokens: int
    total_s: float


class Load(msgspec.Struct, frozen=True):
    """What `streams` concurrent chats gave."""

    streams: int
    tokens_per_s: float
    first_token_s: float
    """Median."""


def chat_body(model: str, number: int, tokens: int) -> bytes:
    """A short prompt, different for each `number`, answered with exactly `tokens` tokens."""
    return msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": f"Story number {number}: a fox and a river."}],
            "max_tokens": tokens,
            "temperature": 1.0,
            "seed": number,
            # Said to both, for their defaults differ; `options` is where a node looks for Ollama's.
            **SAMPLING,
            "options": SAMPLING,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {"2": -100},  # the end of the turn: every stream is as long as the others
        }
    )


async def chat(target: Target, body: bytes) -> Stream:
    """One streamed chat, counted by the server's own usage."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    received = bytearray()
    status = 0
    first_s = 0.0
    started = time.perf_counter()

    def on_head(code: int, _: object) -> None:
        nonlocal status
        status = code

    def on_body(data: bytes) -> None:
        nonlocal first_s
        received.extend(data)
        if not first_s and _WORDS.search(data):
            first_s = time.perf_counter() - started

    headers = {"content-type": "application/json"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"
    request(
        target.address,
        "POST",
        "/v1/chat/completions",
        headers=headers,
        body=body,
        on_head=on_head,
        on_body=on_body,
        on_end=lambda: done.set_result(None),
        on_error=done.set_exception,
    )
    await asyncio.wait_for(done, DEADLINE_S)
    total_s = time.perf_counter() - started
    if status != 200:
        raise RuntimeError(f"{target.name} answered {status}: {bytes(received[:500])!r}")
    usage = next(
        event["usage"]
        for line in reversed(received.split(b"\n"))
        if line.startswith(b"data: {") and (event := msgspec.json.decode(line[6:])).get("usage")
    )
    return Stream(first_s or total_s, usage["completion_tokens"], total_s)


async def load(target: Target, streams: int, tokens: int, first_number: int) -> Load:
    """`streams` chats at once."""
    bodies = [chat_body(target.model, first_number + i, tokens) for i in range(streams)]
    started = time.perf_counter()
    done = await asyncio.gather(*(chat(target, body) for body in bodies))
    wall_s = time.perf_counter() - started
    return Load(
        streams, sum(s.tokens for s in done) / wall_s, statistics.median(s.first_token_s for s in done)
    )
