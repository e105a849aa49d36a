"""Calls on their way to another node: a generation, whose events come as they are made, and a
question, which has one answer."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Protocol, TypeVar

import msgspec

from ollama_distributed.adapters.peers.link import Call, Link
from ollama_distributed.adapters.peers.wire import Frames, Result, Rows, decode_events, decode_reply
from ollama_distributed.base.errors import OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.refusal import Refusal, error_of
from ollama_distributed.base.tokens import Done, EngineFailed, Skipped, SourceSink

T = TypeVar("T")

_LAST = (Done, Skipped, EngineFailed)


class Sender(Protocol):
    """The pool."""

    def send(self, call: Call, node: NodeId, *, fresh: bool = False) -> None: ...


class Calling(ABC):
    """What all have: the request, the connection under it, and the second try of a connection
    that the other side had closed."""

    __slots__ = ("_frames", "_link", "_opening", "_over", "_paused", "_sender", "message", "node")

    def __init__(self, sender: Sender, node: NodeId, message: bytes) -> None:
        self.node = node
        self.message = message
        self._sender = sender
        self._frames = Frames()
        self._link: Link | None = None
        self._opening: asyncio.Task[None] | None = None
        self._over = False
        self._paused = False

    # ── for who called ──────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        """Close the connection: the other node then stops. Idempotent."""
        if self._over:
            return
        self._over = True
        link, self._link = self._link, None
        if link is not None:
            link.close()
        elif self._opening is not None:
            self._opening.cancel()

    # ── for the pool and the link ───────────────────────────────────────────────────

    def opening(self, task: asyncio.Task[None]) -> None:
        self._opening = task

    def taken(self, link: Link) -> None:
        self._link, self._opening = link, None
        if self._paused:
            link.pause()

    def broke(self, error: OllamaDistributedError, *, answered: bool, reused: bool) -> None:
        if self._over:
            return
        self._link = None
        if reused and not answered and isinstance(error, Unavailable):
            self._sender.send(self, self.node, fresh=True)
        else:
            self._fail(error)

    @abstractmethod
    def heard(self, data: bytes) -> None: ...

    def ended(self) -> None:
        self._link = None
        self._fail(Unavailable(f"node {self.node} ended its answer without its last word"))

    @abstractmethod
    def _fail(self, error: OllamaDistributedError) -> None: ...


class RemoteGeneration(Calling):
    """Implements `Generation` and `Call`."""

    __slots__ = ("_sink",)

    def __init__(self, sender: Sender, node: NodeId, message: bytes, sink: SourceSink) -> None:
        super().__init__(sender, node, message)
        self._sink = sink

    def pause(self) -> None:
        if self._over:
            return
        self._paused = True
        if self._link is not None:
            self._link.pause()

    def resume(self) -> None:
        self._paused = False
        if self._link is not None:
            self._link.resume()

    def heard(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            for event in decode_events(payload):
                if self._over:
                    return
                if isinstance(event, _LAST):
                    if self._paused:
                        self.resume()  # the rest of the answer is its end, which frees the connection
                    self._over = True
                self._sink(event)

    def _fail(self, error: OllamaDistributedError) -> None:
        if not self._over:
            self._over = True
            self._sink(EngineFailed(error))


class Awaited(Calling):
    """A call with one end. `done` is set, or raises what went wrong."""

    __slots__ = ("done",)

    def __init__(self, sender: Sender, node: NodeId, message: bytes) -> None:
        super().__init__(sender, node, message)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _fail(self, error: OllamaDistributedError) -> None:
        self._settle(error)

    def _settle(self, error: OllamaDistributedError | None) -> None:
        self._over = True
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class Question(Awaited):
    """Implements `Call`."""

    __slots__ = ("_result", "rows")

    def __init__(self, sender: Sender, node: NodeId, message: bytes) -> None:
        super().__init__(sender, node, message)
        self.rows: list[tuple[float, ...]] = []
        self._result = msgspec.Raw()

    def result(self, kind: type[T]) -> T:
        """
        Raises:
            Unavailable: it is not of this kind: the other node runs a version that does not fit.
        """
        try:
            return msgspec.msgpack.decode(self._result, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
            raise Unavailable(
                f"the answer of node {self.node} cannot be read; do both run versions that fit?"
            ) from failure

    def heard(self, data: bytes) -> None:
        for payload in self._frames.feed(data):
            match decode_reply(payload):
                case Rows(rows):
                    self.rows += rows
                case Result(value):
                    self._result = value.copy()
                    self._settle(None)
                case Refusal() as refusal:
                    self._settle(error_of(refusal))
