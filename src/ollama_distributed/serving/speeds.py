"""How fast this node writes: tokens per second of answers that had a runner to themselves.

State only. What is measured follows the weights' size and the device, so it also says how fast
another model would be (`placement.fit`).
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

LEAST_TOKENS = 8
"""In an answer that counts: shorter ones measure the clock."""
NEW = 0.3
"""Weight of the latest answer."""
MOST = 32
"""Models that are remembered; the one measured longest ago is forgotten."""

Device = Literal["gpu", "cpu"]


class Speed(msgspec.Struct, frozen=True):
    device: Device
    weights_bytes: int
    tokens_per_s: float


class Speeds:
    def __init__(self) -> None:
        self._known: dict[tuple[Device, int], float] = {}

    def add(self, device: Device, weights_bytes: int, tokens: int, took_s: float) -> None:
        """An answer of so many tokens, that took so long after its prompt was read."""
        if tokens < LEAST_TOKENS or took_s <= 0.0 or weights_bytes <= 0:
            return
        rate, before = tokens / took_s, self._known.pop((device, weights_bytes), None)
        if not math.isfinite(rate):
            return
        self._known[device, weights_bytes] = rate if before is None else before + NEW * (rate - before)
        if len(self._known) > MOST:
            del self._known[next(iter(self._known))]

    def of(self, device: Device, weights_bytes: int) -> float:
        """0: not measured yet."""
        return self._known.get((device, weights_bytes), 0.0)

    def rows(self) -> list[Speed]:
        return [Speed(device, size, rate) for (device, size), rate in self._known.items()]
