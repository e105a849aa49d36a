"""A chain in parts: begun by size and age, copied as they are, removed when they are old; cut, never."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.audit.test_audit_log import Alone, Clock, audit_of, entry

from ollama_distributed.access.audit.chain import PART, REMOVED
from ollama_distributed.access.audit.cluster import ClusterAudit
from ollama_distributed.access.audit.copies import Copies
from ollama_distributed.access.audit.log import AuditLog, Keep
from ollama_distributed.access.audit.ports import CheckAsk, TakeAsk
from ollama_distributed.access.audit.retention import Retention
from ollama_distributed.adapters.audit.disk import AuditDisk
from ollama_distributed.adapters.audit.parts import parts_of
from ollama_distributed.base.audit import AuditFilter, ChainReport
from ollama_distributed.base.errors import Conflict, DiskFull, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.cluster import ClusterState

ME = NodeId("n1")
DAY_S = 86400.0
KEEP = Keep(kept_s=10 * DAY_S, part_bytes=2_000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of writes, and no power cut in between."""
    monkeypatch.setattr("os.fsync", lambda _: None)


class World:
    """A node's chain on a disk, and a keeper of a copy."""

    def __init__(self, root: Path, keep: Keep = KEEP) -> None:
        self.root = root
        self.clock = Clock()
        self.disk = AuditDisk(root / "own")
        self.log = AuditLog(ME, self.disk, self.clock, keep)
        self.kept = AuditDisk(root / "kept")
        self.keeper = AuditLog(NodeId("n2"), self.kept, self.clock, keep)
        self.copies = Copies(self.keeper, self.kept, Alone(), ClusterState)

    async def write(self, count: int) -> None:
        for number in range(count):
            await self.log.write(entry(number))

    async def copy(self) -> None:
        while records := await self.disk.after(ME, (await self.copies.take(ME, TakeAsk())).seq, 7):
            await self.copies.take(ME, TakeAsk(records=tuple(records)))

    async def own(self) -> ChainReport:
        return (await audit_of(self.log, self.disk).check_here(CheckAsk(own=True))).chains[0]

    async def kept_copy(self) -> ChainReport:
        """As its keeper sees it."""
        audit = ClusterAudit(self.keeper, self.kept, Alone(), "two", ClusterState)
        return (await audit.check_here(CheckAsk(own=False))).chains[0]

    def days(self, count: float) -> None:
        self.clock.wall += count * DAY_S

    def files(self, where: str = "own") -> list[Path]:
        return parts_of(self.root / where, ME)


async def test_a_new_part_begins_with_the_head_of_the_old(tmp_path: Path) -> None:
    """By size, and by age; pages, copies and a restart go over all parts."""
    world = World(tmp_path)
    await world.write(40)
    assert len(world.files()) > 3
    assert all(file.stat().st_size <= KEEP.part_bytes + 1_000 for file in world.files())
    records = await world.disk.after(ME, 0, 1000)
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    parts = [record for record in records if record.action == PART]
    assert len(parts) == len(world.files()) - 1
    assert all(part.prev == records[part.seq - 2].hash for part in parts)
    for file, part in zip(world.files()[1:], parts, strict=True):
        assert f".{part.seq:012}." in file.name
    page = await audit_of(world.log, world.disk).page(AuditFilter(action="DELETE", limit=100))
    assert len(page.records) == 40
    count = len(world.files())
    world.days(2)  # an eighth of ten days is over
    again = World(tmp_path)
    again.clock.wall = world.clock.wall
    await again.write(1)
    assert len(again.files()) == count + 1
    assert (await again.own()).fault == ""
    await again.copy()
    assert [file.read_bytes() for file in again.files("kept")] == [
        file.read_bytes() for file in again.files()
    ]
    assert (await again.kept_copy()).fault == ""


async def test_old_parts_go_and_the_chain_says_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.write(30)
    await world.copy()
    old = len(world.files())
    await Retention(world.log, world.disk).step()
    assert len(world.files()) == old, "they are not old"
    world.days(9)
    await world.write(3)
    world.days(2)
    await Retention(world.log, world.disk).step()
    own = await world.own()
    assert (own.fault, len(world.files())) == ("", 2)
    assert own.first > 30
    said = await audit_of(world.log, world.disk).page(AuditFilter(action=REMOVED, limit=100))
    assert len(said.records) == old
    keeping = Retention(world.keeper, world.kept)
    await keeping.step()
    assert len(world.files("kept")) == old, "its chain does not say yet that they are removed"
    await world.copy()
    await keeping.step()
    copy = await world.kept_copy()
    assert (copy.fault, copy.first, copy.head) == ("", own.first, own.head)


async def test_a_copy_is_not_removed_because_a_node_says_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.write(30)
    impatient = AuditLog(ME, world.disk, world.clock, Keep(kept_s=3600.0, part_bytes=2_000))
    world.days(1)
    await Retention(impatient, world.disk).step()
    await world.copy()
    count = len(world.files("kept"))
    await Retention(world.keeper, world.kept).step()
    assert len(world.files("kept")) == count


async def test_a_keeper_that_begins_later_takes_what_is_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.write(20)
    world.days(11)
    await world.write(20)
    await Retention(world.log, world.disk).step()
    records = await world.disk.after(ME, 0, 5)
    assert records[0].seq > 1
    await world.copies.take(ME, TakeAsk(records=tuple(records)))
    behind = await world.kept_copy()
    assert (behind.fault, behind.first) == ("", records[0].seq), (
        "nothing says it yet, but what it lacks is old"
    )
    await world.copy()
    copy, own = await world.kept_copy(), await world.own()
    assert (copy.fault, copy.first, copy.head) == ("", own.first, own.head)


async def test_a_copy_of_a_young_chain_whose_begin_is_withheld_is_no_whole_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.write(20)
    records = await world.disk.after(ME, 0, 100)
    begin = next(at for at, record in enumerate(records) if record.action == PART)
    await world.copies.take(ME, TakeAsk(records=tuple(records[begin:])))
    copy = await world.kept_copy()
    assert (copy.fault_seq, copy.first) == (begin + 1, begin + 1)
    assert "are gone" in copy.fault


async def test_a_keeper_that_was_away_for_longer_than_records_are_kept_begins_anew(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.write(20)
    await world.copy()
    had = (await world.kept_copy()).records
    await world.write(20)
    world.days(5)
    await world.write(20)
    young = await world.disk.after(ME, 0, 1000)
    skipped = next(record.seq for record in young if record.action == PART and record.seq > had + 1)
    with pytest.raises(Conflict):  # what it has is not old yet: nobody may have it thrown away
        await world.copies.take(ME, TakeAsk(records=tuple(young[skipped - 1 :])))
    world.days(9)
    await world.write(20)
    await Retention(world.log, world.disk).step()
    assert (await world.disk.after(ME, 0, 1))[0].seq > had + 1
    world.days(3)
    await world.copy()
    copy, own = await world.kept_copy(), await world.own()
    assert (copy.fault, copy.first, copy.head) == ("", own.first, own.head)


@pytest.mark.parametrize("left", [b"", b'{"action":"audit.part","half'])
async def test_a_crash_at_the_begin_of_a_part(tmp_path: Path, left: bytes) -> None:
    world = World(tmp_path)
    await world.write(12)
    count, head = len(world.files()), await world.disk.head(ME)
    (tmp_path / "own" / f"n1.{head.seq + 1:012}.jsonl").write_bytes(left)
    again = World(tmp_path)
    again.clock.wall = world.clock.wall
    assert (await again.own()).fault == "", "nobody was told of what was not written whole"
    await again.write(1)
    assert len(again.files()) == count
    assert (await again.own()).fault == ""


@pytest.mark.parametrize("cut", ["first", "middle", "last", "within", "end", "renamed"])
async def test_a_part_that_is_gone_is_found(tmp_path: Path, cut: str) -> None:
    world = World(tmp_path)
    await world.write(30)
    files = world.files()
    match cut:
        case "first":
            files[0].unlink()
        case "middle":
            files[1].unlink()
        case "last":
            files[-1].unlink()
        case "within":
            files[1].write_bytes(b"".join(files[1].read_bytes().splitlines(keepends=True)[:-1]))
        case "end":
            files[1].write_bytes(files[1].read_bytes()[:-1])
        case "renamed":
            files[1].rename(files[1].with_name(f"n1.{10**9:012}.jsonl"))
    own = await world.own()
    assert own.fault
    if cut == "last":
        with pytest.raises(Unavailable):
            await AuditLog(ME, world.disk, world.clock, KEEP).write(entry())


async def test_parts_of_an_older_chain_that_were_cut_further_are_missed(tmp_path: Path) -> None:
    """What was removed for its age hides no later cut."""
    world = World(tmp_path)
    await world.write(20)
    world.days(9)
    await world.write(20)
    world.days(2)
    await Retention(world.log, world.disk).step()
    assert (await world.own()).fault == ""
    world.files()[0].unlink()
    own = await world.own()
    assert own.fault
    assert own.fault_seq == own.first


async def test_a_part_that_could_not_be_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full just then: nothing is done, nothing is left, and the next one begins it."""
    world = World(tmp_path)
    while not world.files() or world.files()[-1].stat().st_size < KEEP.part_bytes:
        await world.write(1)
    count, head = len(world.files()), await world.disk.head(ME)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.write", full)
        with pytest.raises(DiskFull):
            await world.write(1)
    assert await world.disk.head(ME) == head
    assert len(world.files()) == count
    await world.write(1)
    assert len(world.files()) == count + 1
    assert (await world.own()).fault == ""


async def test_a_flood_from_many_addresses_is_kept_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_distributed.access.audit.log.MOST_IN_ALL", 12)
    world = World(tmp_path)
    for number in range(500):
        world.log.refused(entry(action="sign-in", source=f"10.0.{number // 250}.{number % 250}"))
    await world.log.flush()
    page = await audit_of(world.log, world.disk).page(AuditFilter(action="sign-in", limit=1000))
    assert len(page.records) == 12
