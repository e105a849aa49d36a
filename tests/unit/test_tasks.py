"""Tasks that are ended, and work that comes to its end."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest
from tests.limits import SOON_S

from ollama_distributed.cluster.tasks import end, to_its_end

pytestmark = pytest.mark.anyio


async def test_what_a_thread_began_ends_before_its_caller_does() -> None:
    began, go_on, wrote = asyncio.Event(), threading.Event(), []
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(began.set)
        assert go_on.wait(SOON_S)
        wrote.append("all of it")

    async def caller() -> None:
        try:
            await to_its_end(asyncio.to_thread(work))
        finally:
            wrote.append("put in order")

    calling = asyncio.create_task(caller())
    with anyio.fail_after(SOON_S):
        await began.wait()
        ending = asyncio.create_task(end([calling]))  # cancels again and again
        while calling.cancelling() < 3:
            await anyio.sleep(0.01)
        assert not calling.done()
        go_on.set()
        await ending
    assert wrote == ["all of it", "put in order"]
    assert calling.cancelled()


async def test_its_answer_and_its_error_are_the_callers() -> None:
    assert await to_its_end(asyncio.to_thread(lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        await to_its_end(asyncio.to_thread(lambda: 1 // 0))
