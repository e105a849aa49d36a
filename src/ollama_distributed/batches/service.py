"""The batches of this node: taken, worked on in idle slots, kept over restarts.

A line's result is on the disk before it counts; a node that comes back goes on with the lines that
have none. Every line is asked through the node's own inference, which finds a node for it, as the
owner that sent it and no longer than that owner's key holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio
import anyio.abc
import msgspec
import structlog

from ollama_distributed.base.batches import FINAL, Batch, BatchFault, BatchFaults, BatchStatus, RequestCounts
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import NotFound, OllamaDistributedError, QueueFull
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.batches.asking import Asker
from ollama_distributed.batches.files import Files
from ollama_distributed.batches.flights import Berths, Results
from ollama_distributed.batches.plan import (
    Judge,
    Line,
    check_ask,
    may_see,
    moved,
    owner_of,
    read_line,
)
from ollama_distributed.batches.ports import Asking, Disk, Known, Room, Which
from ollama_distributed.batches.records import (
    Asked,
    BatchRecord,
    CreateAsked,
    Limits,
    LineError,
    ListAsked,
    Result,
)

DRIVES = 64
"""Batches that are worked on at once; the rest wait their turn."""
FAILED_PAUSE_S = 10.0
"""After the disk refused."""
SWEEP_S = 600.0

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _One:
    """A batch in memory."""

    def __init__(self, record: BatchRecord) -> None:
        self.record = record
        self.working: anyio.CancelScope | None = None
        self.refused: BatchFault | None = None
        """Why it cannot go on at all."""
        self.changing = anyio.Lock()
        """What is on the disk changes in one order."""

    @property
    def batch(self) -> Batch:
        return self.record.batch


class Batches:
    """Those that this node took. `run` works on them until it is cancelled."""

    def __init__(
        self,
        node: NodeId,
        name: str,
        disk: Disk,
        files: Files,
        *,
        ask: Asking,
        room: Room,
        known: Known,
        limits: Limits,
        clock: Clock,
        chance: random.Random,
    ) -> None:
        self._node = node
        self._name = name
        self._disk = disk
        self._files = files
        self._asker = Asker(ask, known, clock, chance)
        self._berths = Berths(room, clock)
        self._limits = limits
        self._clock = clock
        self._all: dict[str, _One] = {}
        self._tasks: anyio.abc.TaskGroup | None = None
        self._turns = anyio.Semaphore(DRIVES)

    async def start(self) -> None:
        """Read what the disk has."""
        for record in await self._disk.batches():
            self._all[record.batch.id] = _One(record)

    async def run(self) -> None:
        """Work on all that is not done."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                for one in sorted(self._all.values(), key=_age):
                    if one.batch.status not in FINAL:
                        tasks.start_soon(self._drive, one)
                while True:
                    try:
                        await self._sweep()
                    except OllamaDistributedError as error:  # what is worked on goes on meanwhile
                        log.warning("batch.not_swept", code=error.code, error=error.message)
                    await anyio.sleep(SWEEP_S)
        finally:
            self._tasks = None

    # ── what is asked ───────────────────────────────────────────────────────────────

    async def create(self, asked: CreateAsked) -> Batch:
        """
        Raises:
            Invalid: it can never be; the message names the field.
            NotFound: there is no such file of this owner.
            QueueFull: too many wait already.
        """
        seconds = check_ask(asked.ask)
        file = self._files.get(Asked(identity=asked.identity, id=asked.ask.input_file_id))
        if file.purpose != "batch":
            raise NotFound(f"file {file.id} was not sent with purpose=batch")
        if sum(one.batch.status not in FINAL for one in self._all.values()) >= self._limits.open_batches:
            raise QueueFull(
                f"this node has {self._limits.open_batches} batches to do already", retry_after_s=60.0
            )
        now = self._clock.time()
        after = asked.ask.output_expires_after
        batch = Batch(
            id=f"batch_{self._node}_{random_id(16)}",
            endpoint=asked.ask.endpoint,
            input_file_id=file.id,
            completion_window=asked.ask.completion_window,
            created_at=int(now),
            expires_at=int(now + seconds),
            metadata=asked.ask.metadata,
            node=self._name,
        )
        one = _One(
            BatchRecord(
                owner=owner_of(asked.identity),
                batch=batch,
                kept_s=after.seconds if after else self._limits.kept_s,
            )
        )
        await self._disk.save(one.record)
        self._all[batch.id] = one
        log.info("batch.taken", batch=batch.id, endpoint=batch.endpoint, key_id=one.record.owner.key)
        if self._tasks is not None:
            self._tasks.start_soon(self._drive, one)
        return batch

    def get(self, asked: Asked) -> Batch:
        """
        Raises:
            NotFound: there is none, or it is somebody else's.
        """
        return self._find(asked).batch

    def list(self, asked: ListAsked) -> list[Batch]:
        """Newest first, one more than asked for where there are more."""
        rows = [
            one.batch for one in self._all.values() if may_see(one.record.owner, owner_of(asked.identity))
        ]
        rows.sort(key=lambda batch: (batch.created_at, batch.id), reverse=True)
        if asked.after:
            rows = [row for row in rows if (row.created_at, row.id) < (asked.after_at, asked.after)]
        return rows[: asked.limit + 1]

    async def cancel(self, asked: Asked) -> Batch:
        """
        Raises:
            NotFound: as `get`.
            Conflict: it is over already.
        """
        one = self._find(asked)
        await self._change(one, self._cancelling)
        if one.working is not None and one.batch.status == "cancelling":
            one.working.cancel()
        return one.batch

    def _cancelling(self, record: BatchRecord) -> BatchRecord:
        if record.batch.status in ("cancelling", "cancelled"):
            return record
        return _with(record, moved(record.batch, "cancelling", self._clock.time()))

    def uses(self, file_id: str) -> str | None:
        """The batch that still reads this file."""
        for one in self._all.values():
            if one.batch.input_file_id == file_id and one.batch.status not in FINAL:
                return one.batch.id
        return None

    def _find(self, asked: Asked) -> _One:
        one = self._all.get(asked.id)
        if one is None or not may_see(one.record.owner, owner_of(asked.identity)):
            raise NotFound(f"No batch found with id '{asked.id[:80]}'.")
        return one

    # ── one batch ───────────────────────────────────────────────────────────────────

    async def _drive(self, one: _One) -> None:
        """From wherever it stands to its end; the root of its task."""
        async with self._turns:
            while one.batch.status not in FINAL:
                try:
                    if one.record.ending is None:
                        await self._work(one)
                    await self._end(one)
                except OllamaDistributedError as error:
                    log.warning("batch.stuck", batch=one.batch.id, code=error.code, error=error.message)
                    await anyio.sleep(FAILED_PAUSE_S)
                except Exception:  # a defect must not end the other batches
                    log.exception("batch.broke", batch=one.batch.id)
                    said = "internal error; the node's log has the details"
                    one.refused = BatchFault(code="internal", message=said)
                    await anyio.sleep(FAILED_PAUSE_S)

    async def _work(self, one: _One) -> None:
        """Until it is decided how it ends."""
        if one.batch.status == "validating" and one.refused is None:
            faults = await self._judge(one)
            if faults is not None:
                await self._decide(one, "failed", faults)
                return
        left_s = (one.batch.expires_at or 0) - self._clock.time()
        with anyio.CancelScope() as scope:
            one.working = scope
            scope.deadline = anyio.current_time() + max(left_s, 0.0)
            if one.batch.status == "in_progress" and one.refused is None:
                await self._lines(one, scope)
        one.working = None
        if one.refused is not None:
            await self._decide(one, "failed", BatchFaults(data=(one.refused,)))
        elif one.batch.status == "cancelling":
            await self._decide(one, "cancelled")
        elif scope.cancelled_caught:
            await self._expire(one)
            await self._decide(one, "expired")
        else:
            await self._decide(one, "completed")

    async def _judge(self, one: _One) -> BatchFaults | None:
        judge = Judge(one.batch.endpoint)
        async for rows in self._disk.lines(one.batch.input_file_id):
            for number, data in rows:
                judge.take(number, data)
            if judge.enough:
                break
        faults = judge.verdict()
        if faults is None:
            counts = RequestCounts(total=judge.lines)

            def begun(record: BatchRecord) -> BatchRecord:
                if record.batch.status != "validating":
                    return record  # cancelled meanwhile
                batch = moved(record.batch, "in_progress", self._clock.time())
                return _with(record, msgspec.structs.replace(batch, request_counts=counts))

            await self._change(one, begun)
        return faults

    async def _lines(self, one: _One, scope: anyio.CancelScope) -> None:
        done = await self._disk.done(one.batch.id)
        finished = done.completed | done.failed
        self._count(one, completed=len(done.completed), failed=len(done.failed))
        results = Results(self._disk, one.batch.id, lambda ok, bad: self._add(one, ok, bad), scope)
        try:
            async with anyio.create_task_group() as tasks:
                async with anyio.create_task_group() as lines:
                    tasks.start_soon(results.run)
                    async for rows in self._disk.lines(one.batch.input_file_id):
                        for _, data in rows:
                            line = read_line(data, one.batch.endpoint) if data.strip() else None
                            if isinstance(line, Line) and line.custom_id not in finished:
                                await self._berths.take(line.model)
                                lines.start_soon(self._line, one, line, results)
                results.close()
        finally:
            with anyio.CancelScope(shield=True):  # what was answered is not asked again
                await results.flush()
            if results.failure is not None:
                raise results.failure

    async def _line(self, one: _One, line: Line, results: Results) -> None:
        try:
            result = await self._asker.answered(one.record.owner, one.batch.endpoint, line)
        finally:
            self._berths.leave(line.model)
        if result is not None:
            results.add(result)
            return
        said = "the key that sent this batch was revoked or has expired"
        one.refused = BatchFault(code="key_not_valid", message=said)
        if one.working is not None:
            one.working.cancel()

    async def _expire(self, one: _One) -> None:
        """Say of each line that is left that its time is over."""
        done = await self._disk.done(one.batch.id)
        finished = done.completed | done.failed
        error = LineError(
            code="batch_expired",
            message="This request could not be executed before the completion window expired.",
        )
        total = 0
        async for rows in self._disk.lines(one.batch.input_file_id):
            left: list[Result] = []
            for _, data in rows:
                line = read_line(data, one.batch.endpoint) if data.strip() else None
                if isinstance(line, Line) and line.custom_id not in finished:
                    left.append(
                        Result(id=f"batch_req_{random_id(20)}", custom_id=line.custom_id, error=error)
                    )
            if left:
                await self._disk.append(one.batch.id, left)
                total += len(left)
        self._count(one, completed=len(done.completed), failed=len(done.failed) + total)

    # ── its end ─────────────────────────────────────────────────────────────────────

    async def _decide(self, one: _One, ending: BatchStatus, errors: BatchFaults | None = None) -> None:
        """From here on it only ends; a node that comes back does not work on it again."""
        now = self._clock.time()

        def decided(record: BatchRecord) -> BatchRecord:
            batch, last = record.batch, ending
            if batch.status == "cancelling":
                last = "cancelled"
            elif ending == "completed":
                batch = moved(batch, "finalizing", now)
            if errors is not None:
                batch = msgspec.structs.replace(batch, errors=errors)
            return msgspec.structs.replace(record, batch=batch, ending=last)

        await self._change(one, decided)

    async def _end(self, one: _One) -> None:
        ending = one.record.ending
        assert ending is not None
        now = self._clock.time()
        output = await self._publish(one, "output", now)
        errors = await self._publish(one, "errors", now)

        def ended(record: BatchRecord) -> BatchRecord:
            batch = moved(record.batch, ending, now)
            return _with(record, msgspec.structs.replace(batch, output_file_id=output, error_file_id=errors))

        await self._change(one, ended)
        counts = one.batch.request_counts
        log.info(
            "batch.ended",
            batch=one.batch.id,
            status=ending,
            total=counts.total,
            completed=counts.completed,
            failed=counts.failed,
            took_s=round(now - one.batch.created_at, 1),
        )

    async def _publish(self, one: _One, which: Which, now: float) -> str | None:
        expires_at = int(now + one.record.kept_s)
        return await self._files.publish(one.record.owner, one.batch.id, which, expires_at)

    async def _sweep(self) -> None:
        """Let go what is too old."""
        now = self._clock.time()
        self._berths.forget(SWEEP_S)
        for one in [*self._all.values()]:
            batch = one.batch
            ended = batch.completed_at or batch.failed_at or batch.expired_at or batch.cancelled_at
            if batch.status in FINAL and ended is not None and ended + self._limits.kept_s < now:
                await self._disk.forget(batch.id)
                del self._all[batch.id]
        await self._files.sweep(now)

    # ── what is known ───────────────────────────────────────────────────────────────

    def _add(self, one: _One, completed: int, failed: int) -> None:
        counts = one.batch.request_counts
        self._count(one, completed=counts.completed + completed, failed=counts.failed + failed)

    def _count(self, one: _One, *, completed: int, failed: int) -> None:
        counts = RequestCounts(total=one.batch.request_counts.total, completed=completed, failed=failed)
        batch = msgspec.structs.replace(one.batch, request_counts=counts)
        one.record = msgspec.structs.replace(one.record, batch=batch)

    async def _change(self, one: _One, change: Callable[[BatchRecord], BatchRecord]) -> None:
        """Known once it is on the disk. Counts go on meanwhile: they are not changed here."""
        async with one.changing:
            before = one.record
            after = change(before)
            if after is before:
                return
            await self._disk.save(after)
            if after.batch.request_counts is before.batch.request_counts:
                counts = one.batch.request_counts
                after = _with(after, msgspec.structs.replace(after.batch, request_counts=counts))
            one.record = after


def _with(record: BatchRecord, batch: Batch) -> BatchRecord:
    return msgspec.structs.replace(record, batch=batch)


def _age(one: _One) -> tuple[int, str]:
    return one.batch.created_at, one.batch.id
