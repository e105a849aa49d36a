"""The log on a real disk: what is written is there, what cannot be written is said, copies are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ollama_distributed.access.audit.chain import head_of
from ollama_distributed.access.audit.cluster import ClusterAudit
from ollama_distributed.access.audit.copies import Copies
from ollama_distributed.access.audit.log import MOST_IN_WINDOW, AuditLog
from ollama_distributed.access.audit.ports import (
    CheckAnswer,
    CheckAsk,
    PageAnswer,
    PageAsk,
    TakeAnswer,
    TakeAsk,
)
from ollama_distributed.adapters.audit.disk import AuditDisk
from ollama_distributed.base.audit import AuditEntry, AuditFilter, AuditRecord
from ollama_distributed.base.errors import Conflict, DiskFull, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.cluster import ClusterState

DEADLINE_S = 30.0


class Clock:
    wall = 1_700_000_000.0
    now = 0.0

    def time(self) -> float:
        self.wall += 1.0
        return self.wall

    def monotonic(self) -> float:
        return self.now


class FullDisk(AuditDisk):
    full = False

    async def append(self, node: str, records: Sequence[AuditRecord]) -> None:
        if self.full:
            raise DiskFull("no space left on device")
        await super().append(node, records)


class Alone:
    """No other nodes."""

    async def take(self, node: NodeId, ask: TakeAsk) -> TakeAnswer:
        raise Unavailable(f"{node} {ask}")

    async def page(self, node: NodeId, ask: PageAsk) -> PageAnswer:
        raise Unavailable(f"{node} {ask}")

    async def check(self, node: NodeId, ask: CheckAsk) -> CheckAnswer:
        raise Unavailable(f"{node} {ask}")


def entry(number: int = 0, **fields: object) -> AuditEntry:
    said = {
        "action": f"DELETE /api/v1/nodes/{number}",
        "result": "begun",
        "actor": f"k{number % 3}",
        **fields,
    }
    return AuditEntry(**said)  # type: ignore[arg-type]


def audit_of(log: AuditLog, disk: AuditDisk) -> ClusterAudit:
    return ClusterAudit(log, disk, Alone(), "one", ClusterState)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)


async def test_what_is_written_is_there(tmp_path: Path) -> None:
    disk = AuditDisk(tmp_path)
    log = AuditLog(NodeId("n1"), disk, Clock())
    await asyncio.gather(*(log.write(entry(number)) for number in range(30)))
    again = AuditLog(NodeId("n1"), AuditDisk(tmp_path), Clock())
    assert (await again.write(entry(30))).seq == 31
    audit = audit_of(again, disk)
    first = await audit.page(AuditFilter(limit=20))
    assert [record.seq for record in first.records] == list(range(31, 11, -1))
    assert first.next is not None
    rest = await audit.page(AuditFilter(limit=20, before=first.next))
    assert [record.seq for record in rest.records] == list(range(11, 0, -1))
    assert rest.next is None
    assert len((await audit.page(AuditFilter(actor="k1"))).records) == 10
    assert len((await audit.page(AuditFilter(action="nodes/30"))).records) == 1
    assert (await audit.verify()).ok


async def test_what_cannot_be_written_is_not_done(tmp_path: Path) -> None:
    disk = FullDisk(tmp_path)
    log = AuditLog(NodeId("n1"), disk, Clock())
    await log.write(entry())
    disk.full = True
    with pytest.raises(DiskFull):
        await log.write(entry())
    assert log.failure is not None
    disk.full = False
    assert (await log.write(entry())).seq == 2
    assert log.failure is None
    path = tmp_path / "n1.jsonl"
    with path.open("ab") as file:
        file.write(b'{"half')  # as a killed node leaves it
    assert (await AuditLog(NodeId("n1"), disk, Clock()).write(entry())).seq == 3
    assert (await audit_of(log, disk).verify()).ok
    path.write_bytes(path.read_bytes()[:-3] + b"}}\n")
    with pytest.raises(Unavailable):
        await AuditLog(NodeId("n1"), disk, Clock()).write(entry())
    path.unlink()
    with pytest.raises(Unavailable):
        await AuditLog(NodeId("n1"), disk, Clock()).write(entry())


async def test_verify_says_where(tmp_path: Path) -> None:
    disk = AuditDisk(tmp_path)
    log = AuditLog(NodeId("n1"), disk, Clock())
    for number in range(9):
        await log.write(entry(number))
    path = tmp_path / "n1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for changed, seq in (
        ([*lines[:4], lines[4].replace(b"k1", b"k2"), *lines[5:]], 5),
        ([*lines[:4], *lines[5:]], 5),
        ([*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        (lines[:7], 8),
        (lines[:-1], 9),
    ):
        path.write_bytes(b"".join(changed))
        answer = await audit_of(log, disk).verify()
        assert not answer.ok
        assert answer.chains[0].fault_seq == seq, answer.chains[0].fault
    path.write_bytes(b"".join(lines))
    assert (await audit_of(log, disk).verify()).ok
    (tmp_path / "n1.head").unlink()
    assert not (await audit_of(log, disk).verify()).ok


async def test_notes_are_written_soon_and_a_flood_is_counted(tmp_path: Path) -> None:
    clock = Clock()
    disk = FullDisk(tmp_path)
    log = AuditLog(NodeId("n1"), disk, clock)
    for _ in range(1000):
        log.refused(entry(action="sign-in", source="10.0.0.1"))
    log.refused(entry(action="sign-in", source="10.0.0.2"))
    clock.now = 100.0
    log.refused(entry(action="sign-in", source="10.0.0.1"))
    task = asyncio.create_task(log.run())
    audit = audit_of(log, disk)
    try:
        async with asyncio.timeout(DEADLINE_S):
            while len((await audit.page(AuditFilter())).records) < MOST_IN_WINDOW + 2:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    records = (await audit.page(AuditFilter())).records
    assert len(records) == MOST_IN_WINDOW + 2
    assert sum(record.count for record in records if record.source == "10.0.0.1") == 1001


async def test_who_flushes_while_notes_are_written_writes_none_twice(tmp_path: Path) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    class SlowDisk(AuditDisk):
        async def append(self, node: str, records: Sequence[AuditRecord]) -> None:
            begun.set()
            await go_on.wait()
            await super().append(node, records)

    disk = SlowDisk(tmp_path)
    log = AuditLog(NodeId("n1"), disk, Clock())
    for number in range(3):
        log.note(entry(number))
    task = asyncio.create_task(log.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            await begun.wait()
            flushed = asyncio.create_task(log.flush())
            await asyncio.sleep(0)
            go_on.set()
            await flushed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    records = (await audit_of(log, disk).page(AuditFilter())).records
    assert [record.action[-1] for record in reversed(records)] == ["0", "1", "2"]


async def test_a_copy_takes_what_follows_and_nothing_else(tmp_path: Path) -> None:
    clock = Clock()
    source = AuditDisk(tmp_path / "source")
    log = AuditLog(NodeId("n1"), source, clock)
    records = [await log.write(entry(number)) for number in range(6)]
    keeper = AuditDisk(tmp_path / "keeper")
    copies = Copies(AuditLog(NodeId("n2"), keeper, clock), keeper, Alone(), ClusterState)
    node = NodeId("n1")
    assert (await copies.take(node, TakeAsk())).seq == 0
    assert (await copies.take(node, TakeAsk(records=tuple(records[:3])))).seq == 3
    assert (await copies.take(node, TakeAsk(records=tuple(records[:5])))).seq == 5, "again, and more"
    with pytest.raises(Conflict):
        await copies.take(NodeId("n3"), TakeAsk(records=tuple(records[:1])))
    forged = AuditLog(node, AuditDisk(tmp_path / "forged"), clock)
    other = [await forged.write(entry(number, detail="another story")) for number in range(6)]
    with pytest.raises(Conflict):
        await copies.take(node, TakeAsk(records=(other[5],)))
    assert (await keeper.head(node)) == head_of(records[4])
    answer = await ClusterAudit(
        AuditLog(NodeId("n2"), keeper, clock), keeper, Alone(), "two", ClusterState
    ).check_here(CheckAsk(own=False))
    assert [(report.node, report.records, report.fault) for report in answer.chains] == [("n1", 5, "")]
    own = audit_of(forged, AuditDisk(tmp_path / "forged"))
    told = await own.check_here(CheckAsk(own=True, expect={"5": records[4].hash}))
    assert told.chains[0].fault_seq == 5
