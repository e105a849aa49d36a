"""This node's chain: written before what is recorded happens, on the disk when `write` returns."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque

import anyio
import msgspec
import structlog

from ollama_distributed.access.audit.chain import Head, head_of, seal
from ollama_distributed.access.audit.ports import ChainDisk
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

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Window(msgspec.Struct):
    began: float
    told: int = 0
    untold: int = 0


class AuditLog:
    """`run` writes what was noted, until it is cancelled."""

    def __init__(self, node: NodeId, disk: ChainDisk, clock: Clock) -> None:
        self.node = node
        self.grown = anyio.Event()
        """Set when there is more; it is another one then."""
        self._disk = disk
        self._clock = clock
        self._head: Head | None = None
        self._failure: OllamaDistributedError | None = None
        self._turn = asyncio.Lock()
        self._notes: deque[AuditEntry] = deque()
        self._lost = 0
        self._news = anyio.Event()
        self._windows: OrderedDict[str, _Window] = OrderedDict()

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
                head, self._head = self._head, None  # until it is known what is on the disk
                record = seal(entry, node=self.node, head=head, now=self._clock.time())
                # Also when who waits is cancelled: the next write must not meet it.
                await to_its_end(self._append(record))
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
            self._head = await self._disk.head(self.node)

    async def _append(self, record: AuditRecord) -> None:
        await self._disk.append(self.node, [record])
        self._head = head_of(record)
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
        """As `note`, of a caller who was not let in: a few a minute from one address."""
        now = self._clock.monotonic()
        window = self._windows.pop(entry.source, None) or _Window(now)
        if now - window.began >= WINDOW_S:
            window = _Window(now, untold=window.untold)
        self._windows[entry.source] = window
        while len(self._windows) > MOST_SOURCES:
            self._windows.popitem(last=False)
        if window.told >= MOST_IN_WINDOW:
            window.untold += 1
            return
        self.note(msgspec.structs.replace(entry, count=1 + window.untold))
        window.told += 1
        window.untold = 0

    async def flush(self) -> None:
        """What was noted, at the end; what cannot be written is lost, and the log says so."""
        while self._notes:
            try:
                await self.write(self._notes[0])
            except OllamaDistributedError as failure:
                log.warning("audit.lost", error=failure.message, entries=len(self._notes))
                return
            self._notes.popleft()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = anyio.Event()
            while self._notes:
                entry = self._notes[0]
                if self._lost:
                    entry = msgspec.structs.replace(entry, detail=f"{self._lost} more were lost before it")
                try:
                    await self.write(entry)
                except OllamaDistributedError as failure:
                    log.warning("audit.not_written", error=failure.message, waiting=len(self._notes))
                    await anyio.sleep(RETRY_S)
                else:
                    self._notes.popleft()
                    self._lost = 0
