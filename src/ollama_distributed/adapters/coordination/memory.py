"""A coordination engine in memory, for tests and simulation in virtual time.

One `MemoryEngine` is the quorum; each node talks to it through its own `MemoryCoordination`
over a `Link` that may delay or lose each message. Deterministic: time passes only on the
running loop (give it a virtual clock), chance only in the link (give it a seed), and all
queues are in order of arrival. Messages between two ends never overtake each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol, TypeVar

import anyio
import structlog

from ollama_distributed.base.errors import Conflict, DeadlineExceeded, OllamaDistributedError, Unavailable
from ollama_distributed.cluster.fanout import Fanout, Inbox
from ollama_distributed.cluster.ports import (
    ABSENT,
    REFUSAL_S,
    Entry,
    Fence,
    Handler,
    Message,
    Messages,
    Removed,
    Resync,
    Watch,
    Write,
    check_batch,
    check_key,
    matches,
)
from ollama_distributed.cluster.tasks import end

log = structlog.get_logger()

HANDLER_FAILED = "coordination.handler_failed"
RESYNC_RETRY_S = 0.5
IDLE_CHECK_S = 5.0
"""A client asks so often whether it missed the last events: nothing later shows a gap."""

T = TypeVar("T")


class Link(Protocol):
    def delay_s(self, source: str, target: str) -> float | None:
        """How long the next message takes from one end to the other; None: it is lost."""
        ...


class Direct:
    """Nothing is lost, nothing waits."""

    def delay_s(self, source: str, target: str) -> float | None:  # noqa: ARG002  # the protocol's
        return 0.0


class MemoryEngine:
    """The state and its history, and the wires to its clients."""

    def __init__(self, link: Link | None = None, *, name: str = "engine") -> None:
        self.name = name
        self.available = True
        """False: the quorum is lost; writes and reads are refused, messages still flow."""
        self.revision = 0
        self.entries: dict[str, Entry] = {}
        self.clients: dict[str, MemoryCoordination] = {}
        self.subscriptions: dict[str, list[tuple[MemoryCoordination, Inbox]]] = {}
        """By pattern, in order of subscription."""
        self._link = link or Direct()
        self._free_at: dict[tuple[str, str], float] = {}

    def client(self, name: str) -> MemoryCoordination:
        """A connection for node `name`; enter it before use."""
        return MemoryCoordination(self, name)

    def send(self, source: str, target: str, arrive: Callable[[], None]) -> bool:
        """Call `arrive` when the message gets there; False when it is lost."""
        delay_s = self._link.delay_s(source, target)
        if delay_s is None:
            return False
        loop = asyncio.get_running_loop()
        if isinstance(self._link, Direct):
            # Not by a timer: one of a process that had to stop for a while would come behind `REFUSAL_S`.
            loop.call_soon(arrive)
            return True
        at = max(loop.time() + delay_s, self._free_at.get((source, target), 0.0))
        self._free_at[source, target] = at
        loop.call_at(at, arrive)
        return True

    def commit(
        self,
        writes: Sequence[Write],
        fence: Fence | None,
        by: str,  # noqa: ARG002  # for who watches
    ) -> tuple[int, ...]:
        """A batch of client `by`; a simulation watches here.

        Raises:
            Unavailable, Conflict: nothing was written.
        """
        if not self.available:
            raise Unavailable("coordination has no quorum")
        if fence is not None:
            self._expect(fence.key, fence.revision)
        for write in writes:
            if write.revision is not None:
                self._expect(write.key, write.revision)
        return tuple(self._write(write) for write in writes)

    def scan(self) -> Resync:
        if not self.available:
            raise Unavailable("coordination has no quorum")
        return Resync(tuple(self.entries.values()), self.revision)

    def _expect(self, key: str, revision: int) -> None:
        entry = self.entries.get(key)
        current = entry.revision if entry else ABSENT
        if current != revision:
            raise Conflict(f"{key} stands at {current}, not at {revision}", revision=current)

    def _write(self, write: Write) -> int:
        self.revision += 1
        event: Entry | Removed
        if write.value is None:
            self.entries.pop(write.key, None)
            event = Removed(write.key, self.revision)
        else:
            event = self.entries[write.key] = Entry(write.key, write.value, self.revision)
        for client in self.clients.values():
            # A lost event shows as a gap at the next one, or at the next idle check.
            self.send(self.name, client.name, partial(client.on_event, event))
        return self.revision


class MemoryCoordination:
    """One node's connection; an async context manager."""

    def __init__(self, engine: MemoryEngine, name: str) -> None:
        self.name = name
        self._engine = engine
        self._fanout = Fanout()
        self._written = 0
        self._gap = anyio.Event()
        self._handlers: list[tuple[str, Callable[[Message, Callable[[bytes], None]], None]]] = []
        self._feeding: asyncio.Task[None] | None = None

    async def __aenter__(self) -> MemoryCoordination:
        self._engine.clients[self.name] = self
        self._feeding = asyncio.create_task(self._feed(), name=f"feed of {self.name}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._engine.clients.pop(self.name, None)
        assert self._feeding is not None
        await end([self._feeding])

    # ── state ───────────────────────────────────────────────────────────────────────

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        return next((e for e in (await self._read()).entries if e.key == key), None)

    async def scan(self, prefix: str = "") -> Resync:
        try:
            with anyio.fail_after(REFUSAL_S):
                await self._fanout.reach(self._written)
        except TimeoutError as exc:
            raise Unavailable("coordination does not answer") from exc
        return self._fanout.snapshot(prefix)

    async def create(self, key: str, value: bytes) -> int:
        return await self.put(key, value, revision=ABSENT)

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        return (await self.batch([Write(key, value, revision)]))[0]

    async def delete(self, key: str, *, revision: int) -> int:
        return (await self.batch([Write(key, None, revision)]))[0]

    async def batch(self, writes: Sequence[Write], *, fence: Fence | None = None) -> tuple[int, ...]:
        check_batch(writes)
        revisions = await self._call(lambda: self._engine.commit(writes, fence, self.name))
        self._written = max(self._written, revisions[-1])
        return revisions

    def watch(self, prefix: str = "") -> Watch:
        return self._fanout.watch(prefix)

    async def _read(self) -> Resync:
        try:
            return await self._call(self._engine.scan)
        except DeadlineExceeded as exc:
            raise Unavailable("coordination does not answer") from exc

    async def _call(self, work: Callable[[], T]) -> T:
        """Do `work` at the engine: the question may be lost, and so may the answer."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def at_engine() -> None:
            try:
                result = work()
            except OllamaDistributedError as exc:
                refusal = exc
                self._engine.send(self._engine.name, self.name, lambda: _settle(answer, refusal))
            else:
                self._engine.send(self._engine.name, self.name, lambda: _settle(answer, result))

        self._engine.send(self.name, self._engine.name, at_engine)
        return await _answered(answer, REFUSAL_S)

    # ── the feed ────────────────────────────────────────────────────────────────────

    def on_event(self, event: Entry | Removed) -> None:
        if not self._fanout.synced or event.revision <= self._fanout.revision:
            return  # the state that is being fetched has it
        if event.revision == self._fanout.revision + 1:
            self._fanout.apply(event)
        else:
            self._gap.set()

    async def _feed(self) -> None:
        while True:
            self._gap = anyio.Event()
            try:
                state = await self._read()
            except Unavailable:
                await anyio.sleep(RESYNC_RETRY_S)
                continue
            if not self._fanout.synced or state.revision > self._fanout.revision:
                self._fanout.resync(state)
            with anyio.move_on_after(IDLE_CHECK_S):
                await self._gap.wait()

    # ── messages ────────────────────────────────────────────────────────────────────

    async def publish(self, subject: str, data: bytes) -> None:
        message = Message(subject, data)
        for pattern, subscribers in self._engine.subscriptions.items():
            if matches(pattern, subject):
                for client, inbox in subscribers:
                    self._engine.send(self.name, client.name, partial(inbox.push, message))

    def subscribe(self, subject: str) -> Messages:
        return self._subscribe(subject)

    @asynccontextmanager
    async def _subscribe(self, subject: str) -> AsyncIterator[AsyncIterator[Message]]:
        subscribers, inbox = self._engine.subscriptions.setdefault(subject, []), Inbox()
        subscribers.append((self, inbox))
        try:
            yield inbox.read()
        finally:
            subscribers.remove((self, inbox))
            if not subscribers:
                self._engine.subscriptions.pop(subject, None)

    async def request(self, subject: str, data: bytes, *, timeout_s: float = REFUSAL_S) -> bytes:
        message = Message(subject, data)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        found = False
        for client in list(self._engine.clients.values()):
            for pattern, handle in client._handlers:
                if matches(pattern, subject):
                    found = True
                    self._ask(client, handle, message, answer)
        if not found:
            raise Unavailable(f"nobody answers on {subject}")
        return await _answered(answer, timeout_s)

    def _ask(
        self,
        other: MemoryCoordination,
        handle: Callable[[Message, Callable[[bytes], None]], None],
        message: Message,
        answer: asyncio.Future[bytes],
    ) -> None:
        def reply(data: bytes) -> None:
            self._engine.send(other.name, self.name, lambda: _settle(answer, data))

        self._engine.send(self.name, other.name, lambda: handle(message, reply))

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        return self._serve(subject, handler)

    @asynccontextmanager
    async def _serve(self, subject: str, handler: Handler) -> AsyncIterator[None]:
        tasks: set[asyncio.Task[None]] = set()

        async def work(message: Message, reply: Callable[[bytes], None]) -> None:
            try:
                reply(await handler(message))
            except OllamaDistributedError:
                return  # no answer: the asker's deadline tells
            except Exception:  # a task root
                log.exception(HANDLER_FAILED, subject=message.subject)

        def handle(message: Message, reply: Callable[[bytes], None]) -> None:
            task = asyncio.create_task(work(message, reply), name=f"answer on {subject}")
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        registration = (subject, handle)
        self._handlers.append(registration)
        try:
            yield
        finally:
            self._handlers.remove(registration)
            await end(list(tasks))


def _settle(answer: asyncio.Future[T], result: T | OllamaDistributedError) -> None:
    if answer.done():
        return  # too late, or somebody else was first
    if isinstance(result, OllamaDistributedError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


async def _answered(answer: asyncio.Future[T], timeout_s: float) -> T:
    try:
        return await asyncio.wait_for(answer, timeout_s)
    except TimeoutError as exc:
        raise DeadlineExceeded("no answer in time: it may have happened") from exc
