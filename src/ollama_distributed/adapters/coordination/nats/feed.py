"""Keeps a mirror of the bucket from republished messages, and notices every loss.

JetStream's own watchers go silent for 17 s when their server dies. So: one core subscription
to everything the stream republishes. Its sequence numbers have no holes, so a lost message
shows at the next one; where none follows, a look at the stream's last sequence shows it.
What is lost is not fetched singly: the whole state is read again (`Resync`).
"""

from __future__ import annotations

import asyncio
import random

import anyio
import msgspec
import structlog
from nats.aio.msg import Msg

from ollama_distributed.adapters.coordination.nats import wire
from ollama_distributed.adapters.coordination.nats.session import NoResponders, Session
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import random_id
from ollama_distributed.cluster.fanout import Fanout
from ollama_distributed.cluster.ports import Entry, Removed, Resync

log = structlog.get_logger()

RESYNCED = "coordination.resynced"

ANSWER_S = 2.0
IDLE_CHECK_S = (4.0, 6.0)
"""A quiet feed is compared with the stream so often; the range keeps nodes from asking at once."""
RETRY_S = 0.2
CATCH_UP_S = 1.0
"""Events that the stream has already sent take less to arrive."""
MAX_BEHIND = 1000
"""A copy that lags further is not walked but read again."""
MAX_PENDING = 50_000
"""Events held while the state is read; more, and reading starts over."""

Change = Entry | Removed | int
"""What a message means; an int is the revision of one that nobody may see."""


class Feed:
    """The mirror's source; `run` it in a task."""

    def __init__(self, session: Session, bucket: wire.Bucket, fanout: Fanout) -> None:
        self._session = session
        self._bucket = bucket
        self._fanout = fanout
        self._live = False
        self._pending: list[tuple[int, Change]] = []
        self._doubt = anyio.Event()
        self._backwards = False
        session.on_connect(lambda: self._doubt.set())

    async def run(self) -> None:
        subscription = await self._session.subscribe(self._bucket.all_events, self._on_message)
        try:
            while True:
                self._doubt = anyio.Event()
                try:
                    if not self._live or not await self._complete():
                        await self._resync()
                except (Unavailable, NoResponders, TimeoutError):
                    await anyio.sleep(RETRY_S)
                    continue
                with anyio.move_on_after(random.uniform(*IDLE_CHECK_S)):  # noqa: S311  # spreads load
                    await self._doubt.wait()
        finally:
            await self._session.unsubscribe(subscription)

    # ── live ────────────────────────────────────────────────────────────────────────

    def _on_message(self, message: Msg) -> None:
        headers = message.headers or {}
        revision = int(headers[wire.SEQUENCE])
        change = _change(self._bucket.key(message.subject), message.data, revision, headers)
        if self._live and revision == self._fanout.revision + 1:
            self._apply(revision, change)
        elif not self._live or revision > self._fanout.revision:
            if self._live or len(self._pending) == MAX_PENDING:
                self._pending.clear()
                self._doubt.set()
            self._live = False
            self._pending.append((revision, change))

    def _apply(self, revision: int, change: Change) -> None:
        if isinstance(change, int):
            self._fanout.skip(revision)
        else:
            self._fanout.apply(change)

    async def _complete(self) -> bool:
        """Whether the mirror has all that the stream has."""
        last = await self._last_sequence()
        with anyio.move_on_after(CATCH_UP_S):
            await self._fanout.reach(last)
        # A leader that was paused can answer from its past, once (M8b): not believed at once.
        again, self._backwards = self._backwards, last < self._fanout.revision
        return self._live and self._fanout.revision >= last and not (again and self._backwards)

    async def _last_sequence(self) -> int:
        info = msgspec.json.decode(
            await self._api(f"STREAM.INFO.{self._bucket.stream}", b""), type=wire.StreamInfo
        )
        if info.error is not None:
            raise Unavailable(info.error.description)
        if not info.config.sound:
            raise Unavailable(f"the stream {self._bucket.stream} is there, but it is not ours")
        return info.state.last_seq

    async def _api(self, subject: str, body: bytes) -> bytes:
        return await self._session.request(f"$JS.API.{subject}", body, timeout_s=ANSWER_S)

    # ── the whole state ─────────────────────────────────────────────────────────────

    async def _resync(self) -> None:
        self._live = False
        least = await self._last_sequence()
        found: dict[str, tuple[int, Change]] = {}
        reached = await self._read_copy(found)
        if reached < least:
            await self._walk(found, reached + 1, least)
        base = max(reached, least)
        # A key may have been replaced while the copy was read: its new value is an event.
        target = await self._last_sequence()
        with anyio.fail_after(CATCH_UP_S):
            # At most once per resync, for some milliseconds: an event of its own would say no more.
            while base < target and (not self._pending or self._pending[-1][0] < target):  # noqa: ASYNC110  # both ends move
                await anyio.sleep(0.002)
        for revision, change in self._pending:
            if revision <= base:
                continue
            if revision != base + 1:
                self._pending.clear()
                raise Unavailable("events were lost while the state was read")
            base = revision
            if isinstance(change, int):
                continue
            found[change.key] = (revision, change)
        entries = tuple(change for _, change in found.values() if isinstance(change, Entry))
        # No await from here on: nothing can arrive between the state and the first event.
        self._pending.clear()
        self._backwards = False
        self._fanout.resync(Resync(entries, base))
        self._live = True
        log.info(RESYNCED, revision=base, keys=len(entries))

    async def _read_copy(self, found: dict[str, tuple[int, Change]]) -> int:
        """All keys from some replica, which may lag; the highest sequence it had."""
        name, inbox = f"snapshot-{random_id()}", self._session.inbox()
        arrived: asyncio.Queue[Msg] = asyncio.Queue()
        subscription = await self._session.subscribe(inbox, arrived.put_nowait)
        reached = 0
        try:
            body = msgspec.json.encode(wire.snapshot_consumer(self._bucket, inbox, name))
            answer = await self._api(f"CONSUMER.CREATE.{self._bucket.stream}.{name}", body)
            consumer = msgspec.json.decode(answer, type=wire.ConsumerInfo)
            if consumer.error is not None:
                raise Unavailable(consumer.error.description)
            # The count may already leave out what was sent before the answer: an empty
            # bucket only sends nothing.
            pending = consumer.num_pending
            while pending or not arrived.empty():
                with anyio.fail_after(ANSWER_S):
                    message = await arrived.get()
                delivered = wire.parse_delivered(message.reply)
                reached, pending = delivered.sequence, delivered.pending
                key = self._bucket.key(message.subject)
                found[key] = (reached, _change(key, message.data, reached, message.headers or {}))
        finally:
            await self._session.unsubscribe(subscription)
        return reached

    async def _walk(self, found: dict[str, tuple[int, Change]], start: int, end: int) -> None:
        """Read from the leader what the copy lacked: usually nothing but forgotten deletions."""
        at = start
        for _ in range(MAX_BEHIND):
            body = msgspec.json.encode({"seq": at, "next_by_subj": self._bucket.all_keys})
            answer = await self._api(f"STREAM.MSG.GET.{self._bucket.stream}", body)
            got = msgspec.json.decode(answer, type=wire.GotMessage)
            if got.message is None:
                if got.error is not None and got.error.err_code == wire.NO_MESSAGE:
                    return
                raise Unavailable("the stream cannot be read")
            key, at = self._bucket.key(got.message.subject), got.message.seq
            found[key] = (at, _change(key, got.message.value, at, got.message.headers))
            if at >= end:
                return
            at += 1
        raise Unavailable("the copy that was read lags too far behind")


def _change(key: str, value: bytes, revision: int, headers: dict[str, str]) -> Change:
    if key.startswith("_"):
        return revision
    return Removed(key, revision) if wire.OPERATION in headers else Entry(key, value, revision)
