"""What moves models is counted: how many, how they ended, how fast."""

from __future__ import annotations

import asyncio

import pytest

from ollama_distributed.distribution.tally import Speed, Tally


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


async def test_works_are_counted_while_they_run_and_as_they_end() -> None:
    tally, go = Tally(), asyncio.Event()

    async def good() -> None:
        await go.wait()

    async def bad() -> None:
        raise ValueError("no")

    running = asyncio.create_task(tally.count("pull", good()))
    leaving = asyncio.create_task(tally.count("pull", good()))
    await asyncio.sleep(0)
    assert tally.running["pull"] == 2
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    go.set()
    await running
    with pytest.raises(ValueError, match="no"):
        await tally.count("push", bad())
    assert +tally.running == {}
    assert tally.ended == {("pull", "done"): 1, ("pull", "cancelled"): 1, ("push", "failed"): 1}


def test_a_speed_is_of_the_last_minute_however_often_one_looks() -> None:
    clock = Hands()
    speed, total = Speed(clock), 0
    assert speed.per_s(0) == 0.0
    for second in range(300):
        clock.now += 1.0
        total += 10 if second < 200 else 50
        found = speed.per_s(total)
        assert found == speed.per_s(total), "a second look changes nothing"
        if second == 150:
            assert found == pytest.approx(10.0)
    assert found == pytest.approx(50.0)
    clock.now += 3600.0
    assert speed.per_s(total) < 1.0
    clock.now += 60.0
    assert speed.per_s(total) == 0.0
