"""Answers that ended, or whose client went away, for a while: who asks for the same may go on with
what was said (re-attach).

Bounded in bytes and time; the oldest go first. Only the same request by the same caller finds one:
a request id alone opens nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import msgspec

from ollama_distributed.base.inference import ChatPrompt, InferenceRequest, TextPrompt

T = TypeVar("T")

TTL_S = 60.0
MOST_BYTES = 64 << 20
"""Of prompts and answers together, estimated."""
ENTRY_BYTES = 1_000
"""Of what an entry holds besides."""


class _Entry(msgspec.Struct, gc=False):
    request: InferenceRequest
    value: object
    size_bytes: int
    until_s: float


class Kept(Generic[T]):
    """By request id."""

    def __init__(self, ttl_s: float = TTL_S, most_bytes: int = MOST_BYTES) -> None:
        self._ttl_s = ttl_s
        self._most_bytes = most_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, request: InferenceRequest, value: T, said_bytes: int, now: float) -> None:
        """`now`: a monotonic clock's. An earlier answer of the same id goes."""
        self._drop(request.request_id)
        size = ENTRY_BYTES + said_bytes + _size_of(request)
        self._entries[request.request_id] = _Entry(request, value, size, now + self._ttl_s)
        self._bytes += size
        while self._entries:
            first, entry = next(iter(self._entries.items()))
            if entry.until_s > now and self._bytes <= self._most_bytes:
                break
            self._drop(first)

    def find(self, request: InferenceRequest, now: float) -> T | None:
        entry = self._entries.get(request.request_id)
        if entry is None or entry.until_s <= now or not same(entry.request, request):
            return None
        return entry.value  # type: ignore[return-value]  # `keep` put it in

    def _drop(self, request_id: str) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._bytes -= entry.size_bytes


def same(one: InferenceRequest, other: InferenceRequest) -> bool:
    """Asked by the same caller in the same words."""
    if (one.identity.role, one.identity.key_id) != (other.identity.role, other.identity.key_id):
        return False
    return msgspec.structs.replace(other, identity=one.identity, resume_at=one.resume_at) == one


def _size_of(request: InferenceRequest) -> int:
    match request.prompt:
        case TextPrompt(text=text, images=images):
            return len(text) + sum(map(len, images))
        case ChatPrompt(messages=messages):
            return sum(len(one.content) + sum(map(len, one.images)) for one in messages)
        case _:
            return 8 * len(request.prompt.ids)
