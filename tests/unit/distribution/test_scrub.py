"""Which files are read again, and who goes first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence

import pytest

from ollama_distributed.base.errors import BlobNotFound, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution import scrub
from ollama_distributed.distribution.disk_ports import Leftover, StoredFile, Survey
from ollama_distributed.distribution.scrub import Pacing, Scrubber
from ollama_distributed.distribution.uses import Uses
from ollama_distributed.models.names import BlobId, ModelName
from ollama_distributed.models.stored import StoredModel

DAY_S = 86_400.0
PARTS = 3
NAME = ModelName.parse("m")


def blob(number: int) -> BlobId:
    return BlobId(f"{number:064x}")


class Clock:
    now = 100 * DAY_S

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class FakeDisk:
    """Files by the day on which they came; `wrong`: how often each reads as something else."""

    def __init__(self, **came: float) -> None:
        self.files = {blob(int(name[1:])): StoredFile(30, day * DAY_S) for name, day in came.items()}
        self.wrong: dict[BlobId, int] = {}
        self.read: list[int] = []
        self.away: set[BlobId] = set()

    async def survey(self) -> Survey:
        here = {one: file for one, file in self.files.items() if one not in self.away}
        return Survey(blobs=here, damaged={one: self.files[one] for one in self.away})

    async def digest(self, one: BlobId, between: Callable[[int], Awaitable[None]]) -> str:
        if one not in self.files:
            raise BlobNotFound("gone")
        self.read.append(int(one.hex, 16))
        for _ in range(PARTS):
            await between(10)
        self.wrong[one] = self.wrong.get(one, 0) - 1
        return one.hex if self.wrong[one] < 0 else ""

    async def take_away(self, one: BlobId) -> None:
        self.away.add(one)

    async def drop_leftover(self, kind: Leftover, one: BlobId) -> bool:
        raise AssertionError(f"{kind} {one} stays: nobody gave it back")


class FakeModels:
    def __init__(self, disk: FakeDisk) -> None:
        self.disk = disk

    def stored(self) -> Sequence[StoredModel]:
        lacking = "gone" if self.disk.away else ""
        blobs = dict.fromkeys(self.disk.files, 30)
        return [
            StoredModel(name=NAME, key=NAME.key, digest="d", blobs=blobs, modified_at=1.0, lacking=lacking)
        ]

    def in_use(self) -> Collection[BlobId]:
        return ()

    async def delete(self, name: str) -> None:
        raise AssertionError(name)

    async def forget(self, blobs: Collection[BlobId]) -> None:
        raise AssertionError(blobs)

    async def recheck(self, blobs: Collection[BlobId]) -> Sequence[StoredModel]:
        assert blobs
        return self.stored()


class World:
    def __init__(self, disk: FakeDisk, *, every_days: float = 30.0, warm: Collection[BlobId] = ()) -> None:
        self.clock = Clock()
        self.uses = Uses(self.clock)
        self.busy = 0
        self.holders: list[NodeId] = []
        self.fetched: list[tuple[str, Sequence[NodeId]]] = []
        self.scrubber = Scrubber(
            disk,
            FakeModels(disk),
            self.uses,
            self.clock,
            Pacing(every_s=every_days * DAY_S),
            busy=self._busy,
            warm=lambda: warm,
            holding=lambda _: self.holders,
            fetch=self._fetch,
        )

    def _busy(self) -> bool:
        self.busy -= 1
        return self.busy >= 0

    async def _fetch(self, model: StoredModel, holders: Sequence[NodeId]) -> None:
        self.fetched.append((model.name.display, holders))
        raise Unavailable("it went away")


async def test_cold_files_are_read_the_oldest_first() -> None:
    disk = FakeDisk(b1=10, b2=5, b3=90, b4=20)
    world = World(disk, warm=[blob(4)])
    await world.scrubber.step()
    assert disk.read == [2, 1], "the third came lately, the fourth is loaded"
    assert not world.scrubber.row.running
    await world.scrubber.step()
    assert disk.read == [2, 1], "they were checked"
    world.clock.now += 31 * DAY_S
    await world.scrubber.step()
    assert disk.read == [2, 1, 3, 1, 2]
    assert world.scrubber.scrubbed_bytes == 5 * PARTS * 10


async def test_never_by_itself_but_when_asked() -> None:
    disk = FakeDisk(b1=1, b2=2)
    world = World(disk, every_days=0, warm=[blob(1)])
    await world.scrubber.step()
    assert disk.read == []
    running = asyncio.create_task(world.scrubber.run())
    assert world.scrubber.ask().running
    async with asyncio.timeout(30):
        while world.scrubber.row.running:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert disk.read == [1, 2], "all, also what is loaded"
    row = world.scrubber.row
    assert (row.files, row.total_bytes, row.done_bytes) == (2, 60, 60)


async def test_answers_to_people_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "BUSY_S", 0.0)
    disk = FakeDisk(b1=1)
    world = World(disk)
    world.busy = 50
    step = asyncio.create_task(world.scrubber.step())
    while world.busy > 10:
        await asyncio.sleep(0)
        assert world.scrubber.scrubbed_bytes <= 10, "one part, then it waits"
    await step
    assert world.scrubber.scrubbed_bytes == PARTS * 10


async def test_who_is_never_idle_gets_on_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "BUSY_S", 0.0)
    monkeypatch.setattr(scrub, "MOST_BUSY_S", 0.0)
    disk = FakeDisk(b1=1)
    world = World(disk)
    world.busy = 1 << 60
    await world.scrubber.step()
    assert disk.read == [1]


async def test_wrong_once_is_not_damaged_and_twice_is() -> None:
    disk = FakeDisk(b1=1, b2=2)
    disk.wrong = {blob(1): 1, blob(2): 2}
    world = World(disk)
    world.holders = [NodeId("other")]
    await world.scrubber.step()
    assert disk.read == [1, 1, 2, 2]
    assert disk.away == {blob(2)}
    assert world.scrubber.row.corrupt == world.scrubber.corrupt == 1
    assert world.fetched == [("m:latest", [NodeId("other")])]
    assert world.scrubber.repaired == 0, "the other went away"
    await world.scrubber.step()
    assert len(world.fetched) == 2, "it is tried again"
