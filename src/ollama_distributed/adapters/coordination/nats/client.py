"""The coordination port over NATS JetStream.

Each write names the sequence that its key must stand at, and carries an id. An attempt that
got no answer is repeated; where that meets a conflict, the id in the stored message says
whether the first attempt was the one that won. When no quorum answered within `REFUSAL_S`,
writes are refused at once until a probe gets through.

A server that slept while it led goes on for a moment as if it did, beside the new leader, and
both answer; the first answer counts here. Only the one that leads can acknowledge. So what else
an answer says proves nothing: an error leaves a write in doubt, and a refusal counts where the
state that explains it is newer than what the writer knew.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import msgspec
import structlog
from nats.aio.msg import Msg

from ollama_distributed.adapters.coordination.nats import wire
from ollama_distributed.adapters.coordination.nats.feed import Feed
from ollama_distributed.adapters.coordination.nats.session import Address, NoResponders, Session
from ollama_distributed.adapters.coordination.nats.streams import Stream
from ollama_distributed.base.errors import Conflict, DeadlineExceeded, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import random_id
from ollama_distributed.cluster.fanout import Fanout, Inbox
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.ports import (
    ABSENT,
    REFUSAL_S,
    Entry,
    Fence,
    Handler,
    Message,
    Messages,
    Resync,
    Watch,
    Write,
    check_batch,
    check_key,
    check_value,
)
from ollama_distributed.cluster.tasks import end

log = structlog.get_logger()

QUORUM_LOST = "coordination.quorum_lost"
QUORUM_BACK = "coordination.quorum_back"
HANDLER_FAILED = "coordination.handler_failed"
FORGED = "coordination.message_of_a_consumer"

OPEN_S = 10.0
ATTEMPT_S = 0.8
"""One attempt of a write; measured p99 is 4.5 ms, so silence this long means a dead leader."""
PAUSE_S = 0.05
STALE_S = 0.5
"""How long a state that is older than what the writer knows is looked at again. A server that
wakes as the leader of old hears of the new one at its next word."""
UNSETTLED_S = 10.0
"""So long after that two servers may answer as leaders: an election takes up to 9 s."""
AMONG_OTHERS = "the write may have happened: another one followed it, or was first"
PROBE_S = (0.3, 0.6)
"""Between probes while writes are refused: they are back 1 s after the quorum (M5)."""


class _Refused(Exception):
    """The stream answered: a sequence does not match."""


class _Unproven(Exception):
    """An answer that may come from a server which does not lead any more."""


class NatsCoordination:
    """One node's connection to the bucket; an async context manager."""

    def __init__(self, address: Address, *, name: str, bucket: str = "cfg", create: bool = False) -> None:
        """`name`: the node's id, as in its JWT.

        `create` makes the bucket where it is not there yet: for the node that runs the
        standalone server, and nobody else. With several servers the bucket is there, and an
        empty one made while it moves (`growth`) would take its place.
        """
        self._bucket = wire.Bucket(bucket)
        self._stream = Stream(address, name=name, bucket=bucket) if create else None
        self._session = Session(address, name=name)
        self._fanout = Fanout()
        self._feed = Feed(self._session, self._bucket, self._fanout)
        self._written = 0
        self._troubled_at = float("-inf")
        """When a write last met servers that elect, or were away."""
        self._probing: asyncio.Task[None] | None = None
        self._feeding: asyncio.Task[None] | None = None

    async def __aenter__(self) -> NatsCoordination:
        """Without `create` it waits for nothing: a node starts while coordination is away.

        Raises:
            Unavailable: the bucket cannot be made, or nobody answers.
        """
        if self._stream is not None:
            await self._stream.create()
            await self._session.open(OPEN_S)
        else:
            self._session.start()
        feed = keep_going("coordination feed", self._feed.run)
        self._feeding = asyncio.create_task(feed, name="coordination feed")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await end([task for task in (self._feeding, self._probing) if task is not None])
        await self._session.close()

    @property
    def connected(self) -> bool:
        """To some server; whether they have a quorum is `writable`."""
        return self._session.connected

    def update_servers(self, urls: Iterable[str]) -> None:
        """The servers that there are now (`tls://host:port`, never empty), for the next
        reconnect. Servers come and go by `growth`; they advertise none themselves."""
        self._session.update_servers(urls)

    # ── reading ─────────────────────────────────────────────────────────────────────

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        stored = await self._last(key)
        if stored is None or wire.OPERATION in stored.headers:
            return None
        return Entry(key, stored.value, stored.seq)

    async def scan(self, prefix: str = "") -> Resync:
        try:
            with anyio.fail_after(REFUSAL_S):
                await self._fanout.reach(self._written)
        except TimeoutError as exc:
            raise Unavailable("coordination does not answer") from exc
        return self._fanout.snapshot(prefix)

    def watch(self, prefix: str = "") -> Watch:
        return self._fanout.watch(prefix)

    async def _last(self, key: str) -> wire.RawMessage | None:
        """
        Raises:
            Unavailable: nobody answers, or only with errors.
        """
        subject = f"$JS.API.STREAM.MSG.GET.{self._bucket.stream}"
        body = msgspec.json.encode({"last_by_subj": self._bucket.subject(key)})
        deadline = anyio.current_time() + REFUSAL_S
        while (left_s := deadline - anyio.current_time()) > 0:
            try:
                answer = await self._session.request(subject, body, timeout_s=min(left_s, ATTEMPT_S))
            except (NoResponders, Unavailable, TimeoutError):
                self._troubled_at = anyio.current_time()
                await anyio.sleep(PAUSE_S)
                continue
            got = msgspec.json.decode(answer, type=wire.GotMessage)
            if got.message is not None or (got.error is not None and got.error.err_code == wire.NO_MESSAGE):
                return got.message
            await anyio.sleep(PAUSE_S)
        raise Unavailable("coordination does not answer")

    # ── writing ─────────────────────────────────────────────────────────────────────

    async def create(self, key: str, value: bytes) -> int:
        return await self.put(key, value, revision=ABSENT)

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        check_key(key)
        check_value(value)
        return (await self._write([Write(key, value, revision)], None))[0]

    async def delete(self, key: str, *, revision: int) -> int:
        check_key(key)
        return (await self._write([Write(key, None, revision)], None))[0]

    async def batch(self, writes: Sequence[Write], *, fence: Fence | None = None) -> tuple[int, ...]:
        check_batch(writes)
        return await self._write(writes, fence)

    async def _write(self, writes: Sequence[Write], fence: Fence | None) -> tuple[int, ...]:
        if self._probing is not None:
            raise Unavailable("coordination has no quorum; writes are refused until it is back")
        expected = {write.key: write.revision for write in writes}
        write_id = random_id(20)
        known = max(self._written, self._fanout.revision)
        began_at = anyio.current_time()
        deadline = began_at + REFUSAL_S
        uncertain = False
        while (left_s := deadline - anyio.current_time()) > 0:
            try:
                last = await self._attempt(writes, expected, fence, write_id, min(left_s, ATTEMPT_S))
            except TimeoutError:
                uncertain = True
                self._troubled_at = anyio.current_time()
            except _Unproven:
                uncertain = True
                self._troubled_at = anyio.current_time()
                await anyio.sleep(PAUSE_S)
            except (NoResponders, Unavailable):
                self._troubled_at = anyio.current_time()
                await anyio.sleep(PAUSE_S)
            except _Refused:
                try:
                    last_or_none = await self._after_refusal(
                        writes, expected, fence, write_id, uncertain, known, patient_until=began_at + STALE_S
                    )
                except Unavailable as exc:
                    if uncertain:  # an earlier attempt may have won: that cannot be told now
                        raise DeadlineExceeded("the write may have happened") from exc
                    raise
                if last_or_none is None:
                    continue  # only tombstones stood in the way, or the view was an old one
                return self._acknowledged(last_or_none, len(writes))
            else:
                return self._acknowledged(last, len(writes))
        self._lose_quorum()
        if uncertain:
            raise DeadlineExceeded("coordination did not answer in time: the write may have happened")
        raise Unavailable("coordination has no quorum; nothing was written")

    def _acknowledged(self, last: int, count: int) -> tuple[int, ...]:
        self._written = max(self._written, last)
        return tuple(range(last - count + 1, last + 1))

    async def _attempt(
        self,
        writes: Sequence[Write],
        expected: dict[str, int | None],
        fence: Fence | None,
        write_id: str,
        timeout_s: float,
    ) -> int:
        """Send it once; the sequence of the last message."""
        messages: list[tuple[str, bytes, dict[str, str]]] = []
        if fence is not None:
            checks = {
                wire.EXPECTED_SEQUENCE: str(fence.revision),
                wire.EXPECTED_SUBJECT: self._bucket.subject(fence.key),
            }
            messages.append((self._bucket.subject(wire.FENCE_KEY), b"", checks))
        for write in writes:
            headers = {wire.WRITE_ID: write_id}
            if (sequence := expected[write.key]) is not None:
                headers[wire.EXPECTED_SEQUENCE] = str(sequence)
            if write.value is None:
                headers |= {wire.OPERATION: "DEL", wire.TTL: wire.TOMBSTONE_TTL}
            messages.append((self._bucket.subject(write.key), write.value or b"", headers))
        if len(messages) > 1:
            batch_id = random_id(20)
            for i, (_, _, headers) in enumerate(messages, start=1):
                headers |= {wire.BATCH_ID: batch_id, wire.BATCH_SEQUENCE: str(i)}
            messages[-1][2][wire.BATCH_COMMIT] = "1"
        for subject, data, headers in messages[:-1]:
            await self._session.publish(subject, data, headers)
        subject, data, headers = messages[-1]
        answer = await self._session.request(subject, data, headers=headers, timeout_s=timeout_s)
        ack = msgspec.json.decode(answer, type=wire.Ack)
        if ack.error is None:
            return ack.seq
        if ack.error.err_code in wire.WRONG_LAST_SEQUENCE:
            raise _Refused
        raise _Unproven(ack.error.description)

    async def _after_refusal(
        self,
        writes: Sequence[Write],
        expected: dict[str, int | None],
        fence: Fence | None,
        write_id: str,
        uncertain: bool,
        known: int,
        *,
        patient_until: float,
    ) -> int | None:
        """Why a sequence did not match: ours (the last sequence), tombstones or an answer from an
        older state than the writer's (None), or a conflict. `known`: what stood before we wrote."""
        stored = {write.key: await self._last(write.key) for write in writes}
        ours = [m.seq for m in stored.values() if m is not None and m.headers.get(wire.WRITE_ID) == write_id]
        if ours:
            last = stored[writes[-1].key]
            if last is not None and last.seq in ours:
                return last.seq
            raise DeadlineExceeded("the write happened, and another one followed it at once")
        if uncertain:
            raise DeadlineExceeded(AMONG_OTHERS)
        # A server that led before an election may refuse what the one that leads now takes. Of a
        # batch all or nothing is written, so one key without it is proof enough.
        settled = anyio.current_time() - self._troubled_at > UNSETTLED_S
        absent = settled or any(
            _is_not_below(stored[write.key], expected[write.key], known) for write in writes
        )
        if fence is not None:
            holder = await self._last(fence.key)
            if _older(holder, fence.revision) and anyio.current_time() < patient_until:
                await anyio.sleep(PAUSE_S)
                return None
            standing = ABSENT if holder is None or wire.OPERATION in holder.headers else holder.seq
            if standing != fence.revision:
                if not absent:
                    raise DeadlineExceeded(AMONG_OTHERS)
                raise Conflict(f"the fence {fence.key} moved on to {standing}", revision=standing)
        moved = False
        for write in writes:
            message = stored[write.key]
            sequence = message.seq if message is not None else ABSENT
            deleted = message is not None and wire.OPERATION in message.headers
            standing = ABSENT if deleted else sequence
            if write.revision is None or write.revision == standing:
                if write.revision is not None and expected[write.key] != sequence:
                    expected[write.key] = sequence
                    moved = True
                continue
            # What is there may have been deleted since, for all that a server knows that led once.
            doubtful = write.revision == ABSENT and absent and not settled
            if (doubtful or _older(message, write.revision)) and anyio.current_time() < patient_until:
                moved = False
                break
            if not absent:
                raise DeadlineExceeded(AMONG_OTHERS)
            raise Conflict(f"{write.key} stands at {standing}, not at {write.revision}", revision=standing)
        if not moved:
            await anyio.sleep(PAUSE_S)  # another write is under way on a key of ours
        return None

    # ── quorum ──────────────────────────────────────────────────────────────────────

    @property
    def writable(self) -> bool:
        """False while writes are refused because no quorum answers."""
        return self._probing is None

    def _lose_quorum(self) -> None:
        if self._probing is None:
            log.warning(QUORUM_LOST)
            self._probing = asyncio.create_task(self._probe(), name="coordination probe")

    async def _probe(self) -> None:
        """Write until one write is acknowledged; then writes are let through again."""
        subject = self._bucket.subject(wire.PROBE_KEY)
        while True:
            try:
                answer = await self._session.request(subject, b"", timeout_s=ATTEMPT_S)
                if msgspec.json.decode(answer, type=wire.Ack).error is None:
                    break
            except (NoResponders, Unavailable, TimeoutError, msgspec.DecodeError):
                log.debug(QUORUM_LOST)
            await anyio.sleep(random.uniform(*PROBE_S))  # noqa: S311  # spreads load
        log.info(QUORUM_BACK)
        self._troubled_at = anyio.current_time()
        self._probing = None

    # ── messages ────────────────────────────────────────────────────────────────────

    async def publish(self, subject: str, data: bytes) -> None:
        await self._session.publish(subject, data)

    def subscribe(self, subject: str) -> Messages:
        return self._subscribe(subject)

    @asynccontextmanager
    async def _subscribe(self, subject: str) -> AsyncIterator[AsyncIterator[Message]]:
        inbox = Inbox()

        def hear(message: Msg) -> None:
            if not _replayed(message):
                inbox.push(Message(message.subject, message.data))

        subscription = await self._session.subscribe(subject, hear)
        try:
            yield inbox.read()
        finally:
            await self._session.unsubscribe(subscription)

    async def request(self, subject: str, data: bytes, *, timeout_s: float = REFUSAL_S) -> bytes:
        try:
            return await self._session.request(subject, data, timeout_s=timeout_s)
        except NoResponders as exc:
            raise Unavailable(f"nobody answers on {subject}") from exc
        except TimeoutError as exc:
            raise DeadlineExceeded("no answer in time: it may have happened") from exc

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        return self._serve(subject, handler)

    @asynccontextmanager
    async def _serve(self, subject: str, handler: Handler) -> AsyncIterator[None]:
        tasks: set[asyncio.Task[None]] = set()

        async def work(message: Msg) -> None:
            try:
                answer = await handler(Message(message.subject, message.data))
                await self._session.publish(message.reply, answer)
            except OllamaDistributedError as exc:  # no answer: the asker's deadline tells
                log.warning(HANDLER_FAILED, subject=message.subject, code=exc.code)
            except Exception:  # a task root: a defect, or a question that cannot be read
                log.exception(HANDLER_FAILED, subject=message.subject)

        def begin(message: Msg) -> None:
            if _replayed(message):
                return
            task = asyncio.create_task(work(message), name=f"answer on {subject}")
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        subscription = await self._session.subscribe(subject, begin)
        try:
            yield
        finally:
            await self._session.unsubscribe(subscription)
            await end(list(tasks))


def _is_not_below(message: wire.RawMessage | None, expected: int | None, known: int) -> bool:
    """Whether a write over `expected` cannot have been between that and what stands now: this
    stood already when we wrote (`known`), or follows what we expected itself."""
    if message is None or message.seq <= known or message.seq == expected:
        return True
    return expected is not None and message.headers.get(wire.EXPECTED_SEQUENCE) == str(expected)


def _older(message: wire.RawMessage | None, revision: int) -> bool:
    """Whether who showed this as a key's last message had not seen `revision` of it."""
    return (message.seq if message is not None else ABSENT) < revision


def _replayed(message: Msg) -> bool:
    """Whether a JetStream consumer sent it. Whoever may read the state may have the server send
    a consumer's messages to any subject, in nobody's name; nothing of ours comes that way."""
    if not message.reply.startswith(wire.SERVERS_OWN):
        return False
    log.warning(FORGED, subject=message.subject)
    return True
