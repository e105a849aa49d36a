"""The loop in virtual time: jumps, order, refusals, and that it notices what hangs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import anyio
import anyio.to_thread
import pytest

from ollama_distributed.testing import virtual_time
from ollama_distributed.testing.virtual_time import (
    EPOCH,
    Deadlock,
    Livelock,
    Overtime,
    VirtualClock,
    VirtualLoop,
    loop_random,
)


def test_time_jumps_and_never_waits() -> None:
    async def main() -> float:
        await anyio.sleep(86_400 * 365)
        return anyio.current_time()

    # By the test's own deadline: this computer does not sleep for a year.
    assert virtual_time.run(main) == 86_400 * 365


def test_deadlines_of_asyncio_and_anyio() -> None:
    async def main() -> list[float]:
        at: list[float] = []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 2.5)
        at.append(anyio.current_time())
        with anyio.move_on_after(10) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        at.append(anyio.current_time())
        async with asyncio.timeout(50):
            await asyncio.sleep(40)
        at.append(anyio.current_time())
        return at

    assert virtual_time.run(main) == [2.5, 12.5, 52.5]


def test_timers_due_together_keep_their_order() -> None:
    async def main() -> list[int]:
        seen: list[int] = []
        loop = asyncio.get_running_loop()
        for i in range(1000):
            loop.call_at(5.0, seen.append, i)
        await asyncio.sleep(6)
        return seen

    assert virtual_time.run(main) == list(range(1000))


def test_cancelled_timers_are_swept_out() -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        for _ in range(20_000):
            loop.call_later(1e6, print).cancel()
        left = len(loop._scheduled)
        await asyncio.sleep(1)
        return loop.time(), left

    now, left = virtual_time.run(main)
    assert now == 1.0
    assert left < 2_500


def test_a_deadlock_names_who_waits() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.Event().wait, name="the waiter")

    with pytest.raises(Deadlock, match="the waiter"):
        virtual_time.run(main)


def test_a_livelock_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    monkeypatch.setattr(virtual_time, "MAX_STEPS_AT_ONE_MOMENT", 1000)
    with pytest.raises(Livelock):
        virtual_time.run(main)


def test_a_run_has_a_limit() -> None:
    async def main() -> None:
        while True:
            await anyio.sleep(1)

    with pytest.raises(Overtime):
        virtual_time.run(main, limit_s=3600)


def test_an_exception_that_nobody_sees_fails_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1, lambda: 1 // 0)
        await anyio.sleep(2)

    with pytest.raises(BaseExceptionGroup) as caught:
        virtual_time.run(main)
    assert isinstance(caught.value.exceptions[0], ZeroDivisionError)


def test_nothing_real_is_waited_for() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="virtual time"):
            await asyncio.open_connection("127.0.0.1", 9)
        with pytest.raises(RuntimeError, match="virtual time"):
            await asyncio.create_subprocess_exec("true")
        with pytest.raises(RuntimeError, match="virtual time"):
            await asyncio.to_thread(print)

    virtual_time.run(main)


def test_clocks_of_nodes_differ() -> None:
    async def main() -> None:
        true, fast = VirtualClock(), VirtualClock(skew_s=-30, drift=0.01)
        await anyio.sleep(100)
        assert true.monotonic() == 100.0
        assert true.time() == EPOCH + 100
        assert fast.monotonic() == pytest.approx(101)
        assert fast.time() == pytest.approx(EPOCH + 101 - 30)
        fast.skew_s = 0
        assert fast.time() == pytest.approx(EPOCH + 101)

    virtual_time.run(main)


SCRIPT = """
import asyncio, anyio
from ollama_distributed.testing import virtual_time

async def main():
    seen = []
    random = virtual_time.loop_random()
    async def work(i):
        try:
            await anyio.sleep(random.random() * 10)
            seen.append(i)
            await anyio.sleep_forever()
        finally:
            seen.append(-i)
    async with anyio.create_task_group() as group:
        for i in range(300):
            group.start_soon(work, i)
        await anyio.sleep(5)
        group.cancel_scope.cancel()
    tasks = {asyncio.create_task(work(i)) for i in range(300)}
    await anyio.sleep(5)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return seen

print(virtual_time.run(main, seed=SEED))
"""


def _in_subprocess(seed: int, hash_seed: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("SEED", str(seed))],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def test_the_same_seed_is_the_same_run_in_another_process() -> None:
    """Cancellation included, which anyio and asyncio do in the order of a set of tasks."""
    first = _in_subprocess(1, "0")
    assert first == _in_subprocess(1, "1")
    assert first == _in_subprocess(1, "2")
    assert first != _in_subprocess(2, "0")


def test_chance_is_the_seeds() -> None:
    async def main() -> float:
        return loop_random().random()

    assert virtual_time.run(main, seed=1) == virtual_time.run(main, seed=1)
    assert virtual_time.run(main, seed=1) != virtual_time.run(main, seed=2)
