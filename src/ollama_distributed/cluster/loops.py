"""Background work that outlives its failures: it says so, waits a little longer, and goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import NoReturn

import anyio
import structlog

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.cluster.tasks import end

LOOP_FAILED = "loop.failed"
LOOP_RECOVERED = "loop.recovered"
FIRST_WAIT_S = 0.1
BRIEF = 8
"""Retryable failures in a row before it is a warning, some 6 s: what only starts is away for less."""

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def keep_going(
    name: str,
    step: Callable[[], Awaitable[None]],
    chance: random.Random | None = None,
    *,
    max_wait_s: float = 5.0,
) -> NoReturn:
    """Run `step` again and again until cancelled; `step` itself waits for its next occasion.

    A task root: whatever `step` raises is logged (the 1st, 2nd, 4th, 8th … failure in a row,
    so that a long outage does not fill the log; as a warning where it is not retryable, or lasts)
    and followed by a wait that doubles up to `max_wait_s`, jittered so that nodes do not come back
    together. `chance` None: one that nobody has to repeat.
    """
    chance = chance or random.Random()  # noqa: S311  # jitter
    failures = 0
    while True:
        try:
            await step()
        except Exception as exc:  # one loop's failure must not end the node
            failures += 1
            if failures & (failures - 1) == 0:
                _tell(name, exc, failures)
            wait_s = min(max_wait_s, FIRST_WAIT_S * 2.0 ** min(failures - 1, 16))
            await anyio.sleep(wait_s * (0.5 + 0.5 * chance.random()))
        else:
            if failures:
                log.info(LOOP_RECOVERED, loop=name, failures=failures)
            failures = 0


def in_background(
    stack: AsyncExitStack,
    name: str,
    step: Callable[[], Awaitable[None]],
    chance: random.Random | None = None,
) -> None:
    """`keep_going` as a task that ends with the stack. `step` may also be a loop of its own, which is
    begun again when it breaks."""
    work = keep_going(name, step, chance)
    stack.push_async_callback(end, [asyncio.create_task(work, name=name)])


def _tell(name: str, exc: Exception, failures: int) -> None:
    if isinstance(exc, OllamaDistributedError):
        tell = log.info if exc.retryable and failures < BRIEF else log.warning
        tell(LOOP_FAILED, loop=name, code=exc.code, error=exc.message, failures=failures)
    else:
        log.error(LOOP_FAILED, loop=name, failures=failures, exc_info=exc)
