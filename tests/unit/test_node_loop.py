"""Timers of the node's loop: what can wait a little comes on common beats."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

import pytest

from ollama_distributed.node.loop import BEAT_S, LEAST_S, NodeLoop


def nothing() -> None: ...


@pytest.mark.parametrize("delay_s", [0.01, 0.1, LEAST_S - 0.01])
def test_a_short_wait_is_kept(delay_s: float) -> None:
    with asyncio.Runner(loop_factory=NodeLoop) as runner:
        loop = runner.get_loop()
        began, now = time.monotonic(), loop.time()
        sleep = loop.call_later(delay_s, nothing).when()
        deadline = loop.call_at(now + delay_s, nothing).when()
        slack = 0.003 + time.monotonic() - began
        assert sleep == pytest.approx(now + delay_s, abs=slack)
        assert now + delay_s <= deadline <= now + delay_s + slack


@pytest.mark.parametrize("delay_s", [LEAST_S + 0.2, 1.0, 1.01, 30.0])
def test_a_long_wait_ends_on_a_beat(delay_s: float) -> None:
    with asyncio.Runner(loop_factory=NodeLoop) as runner:
        loop = runner.get_loop()
        began, now = time.monotonic(), loop.time()
        sleep = loop.call_later(delay_s, nothing).when()
        deadline = loop.call_at(now + delay_s, nothing).when()
        slack = 0.003 + time.monotonic() - began
        assert abs(sleep - now - delay_s) <= BEAT_S / 2 + slack
        assert 0 <= deadline - now - delay_s <= BEAT_S + slack
        for when in (sleep, deadline):
            past = when % BEAT_S
            assert min(past, BEAT_S - past) <= slack


def test_who_sleeps_for_ever_sleeps() -> None:
    with asyncio.Runner(loop_factory=NodeLoop) as runner:
        loop = runner.get_loop()
        for handle in (loop.call_later(math.inf, nothing), loop.call_at(math.inf, nothing)):
            assert not handle.cancelled()
            handle.cancel()


def test_a_deadline_never_comes_early() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        late: list[float] = []
        done = asyncio.Event()

        def due(when: float) -> None:
            late.append(loop.time() - when)
            if len(late) == 50:
                done.set()

        now = loop.time()
        for when in itertools.islice(itertools.count(now + 0.0101, 0.00037), 50):
            loop.call_at(when, due, when)
        await done.wait()
        return late

    with asyncio.Runner(loop_factory=NodeLoop) as runner:
        assert min(runner.run(main())) >= 0
