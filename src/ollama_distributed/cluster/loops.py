"""Background work that outlives its failures: it says so, waits a little longer, and goes on."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio
import structlog

from ollama_distributed.base.errors import OllamaDistributedError

LOOP_FAILED = "loop.failed"
LOOP_RECOVERED = "loop.recovered"
FIRST_WAIT_S = 0.1

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


async def keep_going(
    name: str, step: Callable[[], Awaitable[None]], chance: random.Random, *, max_wait_s: float = 5.0
) -> NoReturn:
    """Run `step` again and again until cancelled; `step` itself waits for its next occasion.

    A task root: whatever `step` raises is logged (the 1st, 2nd, 4th, 8th … failure in a row,
    so that a long outage does not fill the log) and followed by a wait that doubles up to
    `max_wait_s`, jittered so that nodes do not come back together.
    """
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


def _tell(name: str, exc: Exception, failures: int) -> None:
    if isinstance(exc, OllamaDistributedError):
        log.warning(LOOP_FAILED, loop=name, code=exc.code, error=exc.message, failures=failures)
    else:
        log.error(LOOP_FAILED, loop=name, failures=failures, exc_info=exc)
