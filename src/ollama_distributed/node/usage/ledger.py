"""This node's ledger: what is counted is in memory at once, and on the disk within a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from ollama_distributed.access.usage import Book
from ollama_distributed.adapters.ledger.files import Batch, LedgerFiles, Summed
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DiskFull
from ollama_distributed.base.usage import Doubt, Row, RowKey, Sums
from ollama_distributed.cluster.tasks import to_its_end

log = structlog.get_logger("usage.ledger")

NOT_WRITTEN = "usage.not_written"


class Kept(msgspec.Struct, frozen=True):
    """How long, in seconds."""

    hours_s: float
    days_s: float


class Ledger:
    def __init__(self, folder: Path, node: str, clock: Clock, kept: Callable[[], Kept]) -> None:
        self.id = ""
        self.book = Book()
        """What is on the disk."""
        self.pending: dict[RowKey, Sums] = {}
        """What is not; another object after each `flush`."""
        self.doubts: tuple[Doubt, ...] = ()
        self.failing = False
        """The disk refuses what was counted."""
        self._writing: dict[RowKey, Sums] = {}
        self._files = LedgerFiles(folder, node)
        self._clock = clock
        self._kept = kept
        self._disk = asyncio.Lock()

    def add(self, key: RowKey, sums: Sums) -> None:
        self.pending.setdefault(key, Sums()).add(sums)

    def month(self, at: float, *, key: str, team: str) -> Sums:
        """Of the month of `at`, by one key or one team; all that was counted."""
        found = Sums()
        found.add(self.book.month(at, key=key, team=team))
        for rows in (self.pending, self._writing):
            for row, sums in rows.items():
                if row.key == key if key else row.team == team:
                    found.add(sums)
        return found

    async def open(self) -> None:
        """
        Raises:
            DiskFull
        """
        opened = await asyncio.to_thread(self._files.open, self._clock.time())
        self.id, self.doubts = opened.ledger, opened.doubts
        self.book.enter(opened.summed.batch, opened.summed.rows)
        for batch in opened.batches:
            self.book.enter(batch.number, batch.rows)
        if opened.batches:
            await self._sum_up()
        await self._write(())

    async def flush(self) -> None:
        """Write down what was counted. What the disk refuses is tried again the next time."""
        async with self._disk:
            if self.pending:
                # As a whole: who is cancelled meanwhile must not lose what the disk refused.
                await to_its_end(self._flush())

    async def _flush(self) -> None:
        self._writing, self.pending = self.pending, {}
        rows = tuple(Row(key, sums) for key, sums in self._writing.items())
        try:
            await self._write(rows)
        except DiskFull as full:
            if not self.failing:
                log.warning(NOT_WRITTEN, reason=full.message)
            self.failing = True
            for row in rows:
                self.add(row.key, row.sums)
        else:
            self.failing = False
        finally:
            self._writing = {}
        if self._files.large:
            await self._sum_up()

    async def close(self) -> None:
        await self.flush()
        try:
            await self._write((), closed=True)
        except DiskFull as full:
            log.warning(NOT_WRITTEN, reason=full.message)
        await asyncio.to_thread(self._files.close)

    async def _write(self, rows: tuple[Row, ...], *, closed: bool = False) -> None:
        batch = Batch(number=self.book.batch + 1, at=self._clock.time(), rows=rows, closed=closed)

        async def both() -> None:
            await asyncio.to_thread(self._files.append, batch)
            self.book.enter(batch.number, batch.rows)

        await to_its_end(both())

    async def _sum_up(self) -> None:
        now, kept = self._clock.time(), self._kept()
        self.book.fold(now - kept.hours_s, now - kept.days_s)
        summed = Summed(batch=self.book.batch, rows=tuple(self.book.rows()), doubts=self.doubts)
        await to_its_end(asyncio.to_thread(self._files.sum_up, summed))
