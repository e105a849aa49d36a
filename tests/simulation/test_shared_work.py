"""Work that many wait for, its lines, and the limit on its speed, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from ollama_distributed.base.errors import Invalid, Unavailable
from ollama_distributed.distribution.joint import Joints
from ollama_distributed.distribution.pace import Pace
from ollama_distributed.distribution.ports import Status
from ollama_distributed.distribution.progress import Progress
from ollama_distributed.testing import virtual_time
from ollama_distributed.testing.virtual_time import VirtualClock

MB = 1_000_000


# ── pace ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("takers", [1, 7])
def test_all_together_are_no_faster_than_the_limit(takers: int) -> None:
    async def main() -> float:
        pace, clock = Pace(VirtualClock(), 10 * MB), VirtualClock()

        async def take() -> None:
            for _ in range(700 // takers):
                await pace.take(MB)

        began = clock.monotonic()
        await asyncio.gather(*(take() for _ in range(takers)))
        return clock.monotonic() - began

    assert 69.0 < virtual_time.run(main) <= 70.0


def test_a_pause_earns_no_burst_and_no_limit_no_wait() -> None:
    async def main() -> None:
        clock = VirtualClock()
        pace = Pace(clock, 10 * MB)
        await asyncio.sleep(3600)
        began = clock.monotonic()
        for _ in range(100):
            await pace.take(MB)
        assert clock.monotonic() - began > 9
        pace.limit(0)
        began = clock.monotonic()
        await pace.take(10**15)
        assert clock.monotonic() == began

    virtual_time.run(main)


# ── joint ───────────────────────────────────────────────────────────────────────────


class Work:
    """What runs, how often it began, and how it ended."""

    def __init__(self) -> None:
        self.begun = 0
        self.running = 0
        self.cancelled = 0

    async def run(self, told: Progress) -> None:
        self.begun += 1
        self.running += 1
        assert self.running == 1, "never two at once"
        try:
            told.tell(Status(status="begun"))
            await asyncio.sleep(10)
            told.tell(Status(status="success"))
        except asyncio.CancelledError:
            self.cancelled += 1
            await asyncio.sleep(1)  # puts its files in order
            raise
        finally:
            self.running -= 1


async def follow(joints: Joints[Progress], work: Work, *, leave_after_s: float = 1e9) -> list[str]:
    lines: list[str] = []
    async with (
        joints.joined("key", Progress, work.run) as joint,
        aclosing(joint.told.follow(joint.task)) as told,
    ):
        try:
            async with asyncio.timeout(leave_after_s):
                async for status in told:
                    lines.append(status.status)  # noqa: PERF401 - what came before it leaves
        except TimeoutError:
            lines.append("left")
    return lines


def test_who_asks_meanwhile_joins() -> None:
    async def main() -> None:
        joints, work = Joints[Progress](), Work()
        first = asyncio.create_task(follow(joints, work))
        await asyncio.sleep(4)
        late = asyncio.create_task(follow(joints, work, leave_after_s=2))
        assert await first == ["begun", "begun", "success"], "told again while nothing changes"
        assert await late == ["begun", "left"]
        assert (work.begun, work.cancelled) == (1, 0)
        assert await follow(joints, work) == ["begun", "begun", "success"]
        assert work.begun == 2
        await asyncio.sleep(0)
        assert joints._known == {}
        assert joints._tasks == set()

    virtual_time.run(main)


def test_it_ends_when_the_last_one_leaves_and_the_next_one_waits_for_that() -> None:
    async def main() -> None:
        joints, work = Joints[Progress](), Work()
        both = await asyncio.gather(
            follow(joints, work, leave_after_s=2), follow(joints, work, leave_after_s=3)
        )
        assert [lines[-1] for lines in both] == ["left", "left"]
        assert (await follow(joints, work))[-1] == "success"
        assert (work.begun, work.cancelled) == (2, 1)

    virtual_time.run(main)


def test_a_failure_is_told_to_all_and_to_nobody_later() -> None:
    async def main() -> None:
        joints = Joints[Progress]()

        async def fails(_: Progress) -> None:
            await asyncio.sleep(1)
            raise Invalid("no")

        async def ask() -> None:
            async with joints.joined("key", Progress, fails) as joint:
                await joint.result()

        for outcome in await asyncio.gather(ask(), ask(), return_exceptions=True):
            assert isinstance(outcome, Invalid)
        async with joints.joined("key", Progress, fails):
            pass

    virtual_time.run(main)


def test_a_stop_ends_all() -> None:
    async def main() -> None:
        joints, work = Joints[Progress](), Work()
        following = asyncio.create_task(follow(joints, work))
        await asyncio.sleep(1)
        await joints.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await following
        assert work.running == 0

    virtual_time.run(main)


# ── progress ────────────────────────────────────────────────────────────────────────


def test_a_slow_reader_gets_the_newest_of_each_line() -> None:
    async def main() -> None:
        progress = Progress()

        async def run() -> None:
            for count in range(1000):
                progress.tell(Status(status="a", completed=count))
                await asyncio.sleep(0.01)
            progress.tell(Status(status="b"))

        task = asyncio.create_task(run())
        seen: list[Status] = []
        async for status in progress.follow(task):
            seen.append(status)
            await asyncio.sleep(1)
        counts = [status.completed for status in seen[:-1]]
        assert counts == sorted(set(counts))
        assert 8 < len(counts) < 15
        assert counts[-1] == 999
        assert seen[-1].status == "b"

    virtual_time.run(main)
