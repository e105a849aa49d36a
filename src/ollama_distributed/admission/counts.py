"""What the queue counts of itself, for `/metrics`. State only."""

from __future__ import annotations

import bisect
from collections import Counter

from ollama_distributed.base.queue import Histogram

WAIT_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
ERROR_S = (-60.0, -30.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Below zero: who waited was served sooner than told."""


class Tally:
    """A histogram that grows."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._total += value

    def seen(self) -> Histogram:
        return Histogram(bounds=self._bounds, counts=tuple(self._counts), total=self._total)


class Counts:
    def __init__(self) -> None:
        self.granted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.waited = Tally(WAIT_S)
        self.eta_error = Tally(ERROR_S)
