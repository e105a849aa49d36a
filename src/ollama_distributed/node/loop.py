"""The node's event loop: uvloop, on which what can wait a little is done together.

A node has a few dozen duties that wake it once a second or so. Each wake-up alone costs 0.2 ms
on a machine whose caches a model fills, several times what the duty itself takes, and for as
long a thread of llama.cpp waits. So timers of half a second and more come on common beats, an
eighth of a second apart.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple

import uvloop

Ts = TypeVarTuple("Ts")

BEAT_S = 0.125
LEAST_S = 0.5
"""Shorter waits are kept as they are."""
STEP_S = 0.001
"""uvloop counts time in such steps, and rounds."""


class NodeLoop(uvloop.Loop):
    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """To the nearest beat: who sleeps a second again and again does so once a second."""
        if LEAST_S <= delay < math.inf:  # for ever is no time on a beat
            now = self.time()
            delay = round((now + delay) / BEAT_S) * BEAT_S - now
        return super().call_later(delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Never early: a deadline that is not over yet would be set again, as anyio does two or
        three times within the last millisecond of uvloop's own."""
        now = self.time()
        if LEAST_S <= when - now < math.inf:
            when = math.ceil(when / BEAT_S) * BEAT_S
        return super().call_later(when - now + STEP_S, callback, *args, context=context)
