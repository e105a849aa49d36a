"""Room on a disk: whatever runs together keeps within the limits."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.base.amounts import amount_bytes, size_text
from ollama_distributed.base.errors import DiskFull
from ollama_distributed.distribution.disk_ports import StoredFile, Survey
from ollama_distributed.distribution.room import STEP_BYTES, Limits, Rooms
from ollama_distributed.models.names import BlobId

TOTAL = 1000


def blob(number: int) -> BlobId:
    return BlobId(f"{number:064x}")


class FakeDisk:
    """Blobs that may go when asked for (`old`), others, and what is being written."""

    def __init__(self, *, quota: int | None = None, low: int = 0, old: dict[int, int] | None = None) -> None:
        self.limits = Limits(quota_bytes=quota, low_water_bytes=low)
        self.whole: dict[BlobId, int] = {}
        self.partial: dict[BlobId, int] = {}
        self.old = {blob(number): size for number, size in (old or {}).items()}
        self.whole |= self.old
        self.strangers = 0
        self.evicted: list[BlobId] = []
        self.rooms = Rooms(self.survey, lambda _: self.limits, self.make, self.why)

    async def survey(self) -> Survey:
        await asyncio.sleep(0)
        here = {one: StoredFile(size, 0.0) for one, size in self.whole.items()}
        coming = {one: StoredFile(size, 0.0) for one, size in self.partial.items()}
        free = TOTAL - self.strangers - sum(self.whole.values()) - sum(self.partial.values())
        return Survey(total_bytes=TOTAL, free_bytes=free, blobs=here, partials=coming)

    async def make(self, need: int, _survey: Survey) -> bool:
        await asyncio.sleep(0)
        before = need
        while need > 0 and self.old:
            one, size = self.old.popitem()
            del self.whole[one]
            self.evicted.append(one)
            need -= size
        return need < before

    async def why(self) -> str:
        return "; 1 is the last copy"


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 400), st.booleans()), max_size=8),
    quota=st.integers(100, 900) | st.none(),
    low=st.integers(0, 300),
    old=st.dictionaries(st.integers(100, 104), st.integers(1, 60)),
)
def test_fetches_that_run_together_keep_within_the_limits(
    sizes: list[tuple[int, int, bool]], quota: int | None, low: int, old: dict[int, int]
) -> None:
    disk = FakeDisk(quota=quota, low=low, old=old)
    size_of = {number: size for number, size, _ in reversed(sizes)}
    began = sum(old.values())

    def within() -> bool:
        used = sum(disk.whole.values()) + sum(disk.partial.values())
        fits = quota is None or used <= max(quota, began)
        return fits and TOTAL - used >= min(low, TOTAL - began)

    async def fetch(number: int, *, finishes: bool) -> None:
        one, size = blob(number), size_of[number]
        async with disk.rooms.room({one: size}), disk.rooms.room({one: size}):
            while one not in disk.whole and disk.partial.get(one, 0) < size:
                disk.partial[one] = min(size, disk.partial.get(one, 0) + 50)
                assert within()
                await asyncio.sleep(0)
            if finishes and disk.partial.pop(one, 0):
                disk.whole[one] = size
            elif not finishes:
                disk.partial.pop(one, None)

    async def run() -> None:
        async def one(number: int, *, finishes: bool) -> None:
            with suppress(DiskFull):
                await fetch(number, finishes=finishes)

        await asyncio.gather(*(one(number, finishes=finishes) for number, _, finishes in sizes))
        assert disk.rooms.taken(await disk.survey()) == 0, "every claim was given back"

    asyncio.run(run())


async def test_refused_before_the_first_byte_with_figures_and_what_to_do() -> None:
    disk = FakeDisk(quota=500, low=20, old={100: 60})
    disk.whole[blob(1)] = 300
    with pytest.raises(DiskFull) as refused:
        async with disk.rooms.room({blob(2): 600}):
            raise AssertionError("there was no room")
    said = refused.value.message
    assert said.startswith("no space left for 600 B: there is room for 200 B (300 B of 500 B are used, ")
    assert "20 B of the disk are kept free" in said
    assert "1 is the last copy" in said
    assert "rm" in said
    assert "model evict" in said
    assert disk.rooms.refused == 1


async def test_what_is_here_already_needs_no_room() -> None:
    disk = FakeDisk(quota=100)
    disk.whole[blob(1)] = 100
    disk.partial[blob(2)] = 30
    async with disk.rooms.room({blob(1): 100}):
        pass
    with pytest.raises(DiskFull):
        async with disk.rooms.room({blob(2): 31}):
            raise AssertionError("there was no room")
    async with disk.rooms.room({blob(2): 30}):
        pass


async def test_no_more_goes_than_must() -> None:
    disk = FakeDisk(quota=200, old={100: 50, 101: 50, 102: 50})
    async with disk.rooms.room({blob(1): 100}):
        assert len(disk.evicted) == 1
        assert disk.rooms.claimed() == {blob(1): 100}


async def test_an_upload_of_unknown_size_asks_as_it_grows() -> None:
    disk = FakeDisk(quota=120)
    async with disk.rooms.growing() as growing:
        for _ in range(12):
            await growing.take(10)
            disk.whole[blob(1)] = disk.whole.get(blob(1), 0) + 10
        with pytest.raises(DiskFull):
            await growing.take(1)
    assert disk.rooms.taken(await disk.survey()) == 0
    assert disk.rooms.refused == 1


async def test_an_upload_that_says_its_size_is_refused_at_once() -> None:
    disk = FakeDisk(quota=120)
    with pytest.raises(DiskFull, match="no space left for 121 B"):
        async with disk.rooms.growing(121):
            raise AssertionError("there was no room")
    async with disk.rooms.growing(100) as growing:
        with pytest.raises(DiskFull):
            async with disk.rooms.room({blob(2): 30}):
                raise AssertionError("it is taken")
        await growing.take(100)
    assert disk.rooms.taken(await disk.survey()) == 0


async def test_an_upload_does_not_ask_for_each_byte() -> None:
    disk = FakeDisk()
    looks = 0
    survey = disk.survey

    async def counted() -> Survey:
        nonlocal looks
        looks += 1
        found = await survey()
        return Survey(total_bytes=1 << 40, free_bytes=1 << 40, blobs=found.blobs)

    rooms = Rooms(counted, lambda _: Limits(), disk.make, disk.why)
    async with rooms.growing() as growing:
        for _ in range(100):
            await growing.take(STEP_BYTES // 50)
    assert looks <= 4


async def test_the_limits_are_restored_when_others_filled_the_disk() -> None:
    disk = FakeDisk(low=200, old={100: 300})
    assert await disk.rooms.restore()
    assert not disk.evicted
    disk.strangers = 600
    assert await disk.rooms.restore()
    assert disk.evicted == [blob(100)]
    disk.strangers = 900
    assert not await disk.rooms.restore()
    assert disk.rooms.refused == 0, "nobody asked"


@pytest.mark.parametrize(
    ("text", "whole", "bytes_"),
    [
        ("0", 10, 0),
        ("1500", 10, 1500),
        ("2GiB", 10, 2 << 30),
        ("1.5 TB", 10, 1_500_000_000_000),
        ("80%", 1000, 800),
        ("2.5%", 1000, 25),
        ("10 mb", 0, 10_000_000),
    ],
)
def test_amounts(text: str, whole: int, bytes_: int) -> None:
    assert amount_bytes(text, whole) == bytes_


@pytest.mark.parametrize("text", ["", "much", "-1", "101%", "1 GiBi", "%", "1e9"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"amount|100%"):
        amount_bytes(text, 1000)


def test_sizes_as_people_read_them() -> None:
    assert [size_text(one) for one in (0, 999, 98_200_000, 4_126_000_000)] == [
        "0 B",
        "999 B",
        "98.2 MB",
        "4.13 GB",
    ]
