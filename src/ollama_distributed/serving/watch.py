"""Notices a runner that hangs while requests are on it, and kills it.

A token or a step of the prompt is a sign of life. A runner that gave none for a while is
asked for its health, which it answers beside its work: a large model may read a prompt for
minutes, a stopped process or one that waits for a dead disk answers nothing. After the
kill the fleet does what it does after any crash.
"""

from __future__ import annotations

import anyio

from ollama_distributed.serving.residents import Resident

PROBES = 3
"""In a row without an answer: one alone may be a machine that is short of time."""
PAUSE_S = 0.5
"""Between two of them."""


async def watch(resident: Resident, quiet_s: float) -> None:
    """Look every `quiet_s`, until the resident is idle or its runner was killed."""
    runner = resident.runner
    assert runner is not None
    failed = 0
    while failed < PROBES:
        resident.heard = False
        await anyio.sleep(min(quiet_s, PAUSE_S) if failed else quiet_s)
        if not resident.active:
            resident.watch = None
            return
        failed = 0 if resident.heard or await runner.healthy() or resident.heard else failed + 1
    # The kill calls back into the fleet, which cancels whoever still watches.
    resident.watch = None
    runner.kill("it did not answer any more")
