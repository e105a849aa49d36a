"""How fast this node reads and writes: tokens per second of answers that had a runner to themselves.

State only. What is measured follows the weights' size and the device, so it also says how fast
another model would be (`placement.fit`).
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

LEAST_TOKENS = 8
"""In an answer that counts: shorter ones measure the clock."""
LEAST_READ = 64
"""Tokens of a prompt that counts: of a shorter one a step of the engine is most of the time."""
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
        self._reading: dict[tuple[Device, int], float] = {}

    def add(self, device: Device, weights_bytes: int, tokens: int, took_s: float) -> None:
        """An answer of so many tokens, that took so long after its prompt was read."""
        if tokens >= LEAST_TOKENS:
            _add(self._known, (device, weights_bytes), tokens, took_s)

    def add_read(
        self, device: Device, weights_bytes: int, tokens: int, took_s: float, *, alone: bool
    ) -> None:
        """So many tokens of a prompt were not cached and took so long. Beside others it counts only
        while nothing better is known."""
        if tokens >= LEAST_READ and (alone or (device, weights_bytes) not in self._reading):
            _add(self._reading, (device, weights_bytes), tokens, took_s)

    def reads(self, device: Device, weights_bytes: int) -> float:
        """Tokens of a prompt per second; 0: not measured yet."""
        return self._reading.get((device, weights_bytes), 0.0)

    def of(self, device: Device, weights_bytes: int) -> float:
        """0: not measured yet."""
        return self._known.get((device, weights_bytes), 0.0)

    def rows(self) -> list[Speed]:
        return [Speed(device, size, rate) for (device, size), rate in self._known.items()]


def _add(known: dict[tuple[Device, int], float], key: tuple[Device, int], tokens: int, took_s: float) -> None:
    if took_s <= 0.0 or key[1] <= 0:
        return
    rate, before = tokens / took_s, known.pop(key, None)
    if not math.isfinite(rate):
        return
    known[key] = rate if before is None else before + NEW * (rate - before)
    if len(known) > MOST:
        del known[next(iter(known))]
