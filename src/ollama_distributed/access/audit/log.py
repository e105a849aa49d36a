"""This node's chain: written before what is recorded happens, on the disk when `write` returns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque

import anyio
import msgspec
import structlog

from ollama_distributed.access.audit.chain import PART, Head, begin_of, encode, head_of, seal
from ollama_distributed.access.audit.ports import ChainDisk, Part
from ollama_distributed.base.audit import AuditEntry, AuditRecord
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DiskFull, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.tasks import to_its_end

MOST_NOTES = 10_000
"""That wait for the disk; more are counted, not kept."""
RETRY_S = 5.0
WINDOW_S, MOST_IN_WINDOW = 60.0, 10
"""Refused callers of one address that are told one by one; a flood must not fill the disk."""
MOST_SOURCES = 1024
MOST_IN_ALL = 300
"""Of all addresses in one window: 150 MB a day at most."""
DAY_S = 86400.0

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Window(msgspec.Struct):
    began: float
    told: int = 0
    untold: int = 0


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """For how long records are kept, and when a new part of the chain begins."""

    kept_s: float = 400 * DAY_S
    """0: for ever."""
    part_bytes: int = 16 << 20

    @property
    def part_s(self) -> float:
        """Whole parts are removed: one is short beside the time that it is kept."""
        return min(30 * DAY_S, self.kept_s / 8) if self.kept_s else 30 * DAY_S


class AuditLog:
    """`run` writes what was noted, until it is cancelled."""

    def __init__(self, node: NodeId, disk: ChainDisk, clock: Clock, keep: Keep | None = None) -> None:
        self.node = node
        self.grown = anyio.Event()
        """Set when there is more; it is another one then."""
        self._disk = disk
        self._clock = clock
        self._keep = keep or Keep()
        self._head: Head | None = None
        self._part: Part | None = None
        self._failure: OllamaDistributedError | None = None
        self._turn = asyncio.Lock()
        self._notes: deque[AuditEntry] = deque()
        self._note_turn = asyncio.Lock()
        self._lost = 0
        self._news = anyio.Event()
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._all = _Window(0.0)

    @property
    def due_before(self) -> float | None:
        """Records that are older need not be kept; None: all are kept. Wall time."""
        return self._clock.time() - self._keep.kept_s if self._keep.kept_s else None

    @property
    def failure(self) -> OllamaDistributedError | None:
        """Why nothing can be written now, as far as is known."""
        return self._failure

    async def write(self, entry: AuditEntry) -> AuditRecord:
        """
        Raises:
            DiskFull, Unavailable: it is not written; what it is about must not be done.
        """
        async with self._turn:
            try:
                if self._head is None:
                    self._head = await self._disk.head(self.node)
                    self._part = await self._disk.part(self.node)
                head, self._head = self._head, None  # until it is known what is on the disk
                now = self._clock.time()
                records = []
                if self._is_full(self._part, now):
                    records = [seal(begin_of(head), node=self.node, head=head, now=now)]
                    head = head_of(records[0])
                record = seal(entry, node=self.node, head=head, now=now)
                # Also when who waits is cancelled: the next write must not meet it.
                await to_its_end(self._append([*records, record]))
            except DiskFull as failure:
                self._failure = failure
                raise DiskFull(f"not done, for it cannot be recorded: {failure.message}") from failure
            except OllamaDistributedError as failure:
                self._failure = failure
                raise Unavailable(f"not done, for it cannot be recorded: {failure.message}") from failure
            self._failure = None
            return record

    async def start(self) -> None:
        """Find the end of the chain. What is wrong with it is told by the first write."""
        with contextlib.suppress(OllamaDistributedError):
            head = await self._disk.head(self.node)
            self._head, self._part = head, await self._disk.part(self.node)

    def _is_full(self, part: Part | None, now: float) -> bool:
        if part is None:
            return False
        return part.size_bytes >= self._keep.part_bytes or now - part.began_at >= self._keep.part_s

    async def _append(self, records: list[AuditRecord]) -> None:
        await self._disk.append(self.node, records)
        first = records[0]
        size_bytes = sum(len(encode(record)) + 1 for record in records)
        if self._part is None or first.action == PART:
            self._part = Part(size_bytes, first.at)
        else:
            self._part = Part(self._part.size_bytes + size_bytes, self._part.began_at)
        self._head = head_of(records[-1])
        self.grown.set()
        self.grown = anyio.Event()

    def note(self, entry: AuditEntry) -> None:
        """Write it soon; it is about what has happened already."""
        if len(self._notes) >= MOST_NOTES:
            self._lost += 1
            return
        self._notes.append(entry)
        self._news.set()

    def refused(self, entry: AuditEntry) -> None:
        """As `note`, of a caller who was not let in: a few a minute from one address, and of all."""
        now = self._clock.monotonic()
        if now - self._all.began >= WINDOW_S:
            self._all = _Window(now)
        window = self._windows.pop(entry.source, None) or _Window(now)
        if now - window.began >= WINDOW_S:
            window = _Window(now, untold=window.untold)
        self._windows[entry.source] = window
        while len(self._windows) > MOST_SOURCES:
            self._windows.popitem(last=False)
        if window.told >= MOST_IN_WINDOW or self._all.told >= MOST_IN_ALL:
            window.untold += 1
            return
        self._all.told += 1
        self.note(msgspec.structs.replace(entry, count=1 + window.untold))
        window.told += 1
        window.untold = 0

    async def flush(self) -> None:
        """What was noted, at the end; what cannot be written is lost, and the log says so."""
        while self._notes:
            try:
                await self._write_next()
            except OllamaDistributedError as failure:
                log.warning("audit.lost", error=failure.message, entries=len(self._notes))
                return

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            while self._notes:
                try:
                    await self._write_next()
                except OllamaDistributedError as failure:
                    log.warning("audit.not_written", error=failure.message, waiting=len(self._notes))
                    await anyio.sleep(RETRY_S)

    async def _write_next(self) -> None:
        """The oldest note; each once, for who flushes comes while `run` goes on."""
        async with self._note_turn:
            if not self._notes:
                return
            entry = self._notes[0]
            if self._lost:
                entry = msgspec.structs.replace(entry, detail=f"{self._lost} more were lost before it")
            await self.write(entry)
            self._notes.popleft()
            self._lost = 0
