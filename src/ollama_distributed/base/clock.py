"""Time as a dependency: services get a `Clock`, pure rooms get plain numbers."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds; for durations and deadlines. Never jumps."""
        ...

    def time(self) -> float:
        """Seconds since the Unix epoch; for what people read. May jump."""
        ...


class SystemClock:
    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)
