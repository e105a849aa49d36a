"""Answers that ended, or whose client went away, for a while: who asks for the same may go on with
what was said (re-attach).

Bounded in bytes and time. Only the same request by the same caller finds one: a request id alone
opens nothing, and whoever else sends it takes nothing away. Two generations, of which the older goes
as a whole: keeping one costs an entry in a dictionary, and nothing is ever searched for the oldest.
"""

from __future__ import annotations

from typing import Generic, TypeAlias, TypeVar

import msgspec

from ollama_distributed.base.inference import ChatPrompt, InferenceRequest, TextPrompt

T = TypeVar("T")
Key: TypeAlias = tuple[str, tuple[str, str, str]]
"""A request id and who asks: ids are the clients' own, and two callers may have the same."""

TTL_S = 60.0
"""So long at least, twice as long at most, while there is room."""
MOST_BYTES = 64 << 20
"""Of prompts and answers together, estimated."""
MOST_CUT, MOST_COMPLETE = 4096, 512
"""Answers kept. Of complete ones only the last bytes can be missing, and soon; and the garbage
collector walks through all that is kept, which may not stop the loop."""
ENTRY_BYTES = 1_000
"""Of what an entry holds besides."""


class Kept(Generic[T]):
    """By request id and caller. `now` is a monotonic clock's."""

    __slots__ = ("_bytes", "_most", "_most_bytes", "_new", "_old", "_ttl_s", "_turn_s")

    def __init__(self, most: int = MOST_CUT, *, ttl_s: float = TTL_S, most_bytes: int = MOST_BYTES) -> None:
        self._most = most // 2
        self._ttl_s = ttl_s
        self._most_bytes = most_bytes // 2
        """Of a generation."""
        self._new: dict[Key, tuple[InferenceRequest, T]] = {}
        self._old: dict[Key, tuple[InferenceRequest, T]] = {}
        self._bytes = 0
        self._turn_s = 0.0
        """When the generations move on."""

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def keep(self, request: InferenceRequest, value: T, said_bytes: int, now: float) -> None:
        """An earlier answer of the same id and caller goes."""
        self._move_on(now)
        self._bytes += ENTRY_BYTES + said_bytes + _size_of(request)
        self._new[key_of(request)] = (request, value)

    def forget(self) -> None:
        self._new, self._old, self._bytes = {}, {}, 0

    def find(self, request: InferenceRequest, now: float) -> T | None:
        self._move_on(now)
        key = key_of(request)
        entry = self._new.get(key) or self._old.get(key)
        if entry is None or not same(entry[0], request):
            return None
        return entry[1]

    def _move_on(self, now: float) -> None:
        if now < self._turn_s and self._bytes <= self._most_bytes and len(self._new) < self._most:
            return
        self._old = self._new if now < self._turn_s + self._ttl_s else {}
        self._new, self._bytes, self._turn_s = {}, 0, now + self._ttl_s


class CutAndComplete(Generic[T]):
    """Answers whose client went away before their end, and answers that ended."""

    def __init__(self) -> None:
        self._cut: Kept[T] = Kept(MOST_CUT)
        self._complete: Kept[T] = Kept(MOST_COMPLETE)

    def keep(
        self, request: InferenceRequest, value: T, said_bytes: int, now: float, *, complete: bool
    ) -> None:
        (self._complete if complete else self._cut).keep(request, value, said_bytes, now)

    def forget(self) -> None:
        self._cut.forget()
        self._complete.forget()

    def find(self, request: InferenceRequest, now: float) -> T | None:
        found = self._complete.find(request, now)
        return found if found is not None else self._cut.find(request, now)


def key_of(request: InferenceRequest) -> Key:
    return request.request_id, request.identity.owner


def same(one: InferenceRequest, other: InferenceRequest) -> bool:
    """Asked by the same caller in the same words."""
    if (one.identity.role, one.identity.owner) != (other.identity.role, other.identity.owner):
        return False
    alike = msgspec.structs.replace(
        other,
        identity=one.identity,
        resume_at=one.resume_at,
        priority=one.priority,
        within_s=one.within_s,
        progress=one.progress,
    )
    return alike == one


def _size_of(request: InferenceRequest) -> int:
    match request.prompt:
        case TextPrompt(text=text, images=images):
            return len(text) + sum(map(len, images))
        case ChatPrompt(messages=messages):
            return sum(len(one.content) + sum(map(len, one.images)) for one in messages)
        case _:
            return 8 * len(request.prompt.ids)
