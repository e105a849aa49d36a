"""What this node generated for others, kept for a while: an answer whose gateway died, or whose
client lost its connection, is taken up again from it (`streams/reattached.py`).

What is kept are the frames as they were sent, so that keeping them costs a reference each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from ollama_distributed.adapters.peers import wire
from ollama_distributed.adapters.peers.outlet import Outlet
from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.base.tokens import Done, Prepared, Resume, Tokens, Written
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.streams.kept import CutAndComplete, Key, key_of, same

T = TypeVar("T")


class Door(Protocol):
    """`adapters.peers.door.PeerDoor`."""

    def add(self, route: str, handler: Callable[[Peer, T], Awaitable[Any]], body: type[T]) -> None: ...


class _Sent(msgspec.Struct, frozen=True, gc=False):
    resume: Resume | None
    frames: Sequence[bytes]


class Answered:
    """The generations of one door. `now`: a monotonic clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._running: dict[Key, tuple[wire.GenerateAsk, Outlet]] = {}
        self._kept: CutAndComplete[_Sent] = CutAndComplete()

    def begins(self, ask: wire.GenerateAsk, outlet: Outlet) -> None:
        self._running[key_of(ask.request)] = (ask, outlet)

    def ended(self, ask: wire.GenerateAsk, outlet: Outlet) -> None:
        key = key_of(ask.request)
        if self._running.get(key, (None, None))[1] is outlet:
            del self._running[key]
        size = sum(map(len, outlet.sent))
        sent = _Sent(ask.resume, outlet.sent)
        self._kept.keep(ask.request, sent, size, self._now(), complete=outlet.complete)

    def forget(self) -> None:
        """All that ended."""
        self._kept.forget()

    def find(self, request: InferenceRequest) -> Written | None:
        """What it said to the same request. One that runs still ends: its caller is given up."""
        running = self._running.get(key_of(request))
        if running is not None and same(running[0].request, request):
            ask, outlet = running
            outlet.gone()
            return written_of(ask.resume, outlet.sent)
        sent = self._kept.find(request, self._now())
        return written_of(sent.resume, sent.frames) if sent is not None else None


def written_of(resume: Resume | None, frames: Sequence[bytes]) -> Written | None:
    """None: it cannot be taken up."""
    prepared: Prepared | None = None
    done: Done | None = None
    ids = list(resume.ids) if resume is not None else []
    said = [resume.said] if resume is not None else []
    for frame in frames:
        for event in wire.decode_events(wire.payload(frame)):
            match event:
                case Prepared():
                    prepared = event
                case Tokens():
                    ids += event.ids
                    said += (event.text.encode(), event.raw)
                case Done():
                    done = event
    if prepared is None or not prepared.resumable:
        return None
    if done is not None and resume is not None:
        before = len(resume.ids)
        done = msgspec.structs.replace(
            done,
            prompt_tokens=max(done.prompt_tokens - before, 0),
            completion_tokens=done.completion_tokens + before,
        )
    return Written(prepared=prepared, ids=tuple(ids), said=b"".join(said), done=done)


class Answers(Protocol):
    """`streams.service.Answers`."""

    def written(self, request: InferenceRequest) -> Written | None: ...

    def handed(self, request: InferenceRequest, written: Written) -> None: ...


def open_written(door: Door, answers: Answers) -> None:
    """Other nodes may ask what this one has of an answer, and leave theirs when they stop."""

    async def written(_peer: Peer, ask: wire.WrittenAsk) -> Written | None:
        return answers.written(ask.request)

    async def handed(_peer: Peer, ask: wire.HandedAsk) -> None:
        answers.handed(ask.request, ask.written)

    door.add(wire.WRITTEN, written, wire.WrittenAsk)
    door.add(wire.HANDED, handed, wire.HandedAsk)
