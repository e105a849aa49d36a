"""Background work that breaks is said, begun again, and ends with its owner."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack

import anyio
import anyio.lowlevel
import pytest
from structlog.testing import capture_logs
from tests.limits import SOON_S

from ollama_distributed.base.errors import Invalid, Unavailable
from ollama_distributed.cluster import loops
from ollama_distributed.cluster.loops import LOOP_FAILED, LOOP_RECOVERED, in_background


@pytest.mark.parametrize("failure", [Unavailable("away"), KeyError("a defect"), OSError("no room")])
async def test_a_loop_that_breaks_is_begun_again(failure: Exception) -> None:
    begun, goes_on, ended = 0, anyio.Event(), anyio.Event()

    async def loop() -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise failure
        goes_on.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            in_background(stack, "one", loop, random.Random(1))
            with anyio.fail_after(SOON_S):
                await goes_on.wait()
            assert not ended.is_set()
    assert ended.is_set()
    assert begun == 2
    assert [(entry["event"], entry["loop"]) for entry in logs] == [(LOOP_FAILED, "one")]


async def test_steps_that_go_well_again_are_said_once() -> None:
    steps, enough = 0, anyio.Event()

    async def step() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            raise Unavailable("away")
        if steps == 4:
            enough.set()
        await anyio.lowlevel.checkpoint()

    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            in_background(stack, "one", step)
            with anyio.fail_after(SOON_S):
                await enough.wait()
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        (LOOP_FAILED, "info"),
        (LOOP_RECOVERED, "info"),
    ]


async def test_what_lasts_or_cannot_pass_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "FIRST_WAIT_S", 0.0)
    enough = anyio.Event()
    failures = 0

    async def step() -> None:
        nonlocal failures
        failures += 1
        if failures == 1:
            raise Invalid("never")
        if failures > loops.BRIEF:
            enough.set()
        raise Unavailable("away")

    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            in_background(stack, "one", step)
            with anyio.fail_after(SOON_S):
                await enough.wait()
    told = [(entry["failures"], entry["log_level"]) for entry in logs]
    assert told[:4] == [(1, "warning"), (2, "info"), (4, "info"), (loops.BRIEF, "warning")]
