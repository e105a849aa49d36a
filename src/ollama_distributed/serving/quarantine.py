"""Which models crashed lately, and may not be loaded for a while (`plan.Crashes` decides)."""

from __future__ import annotations

from typing import NamedTuple

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Quarantined
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.plan import CRASHES, Crashes
from ollama_distributed.serving.residents import LoadKey


class Crashed(NamedTuple):
    """A model that may not be loaded now."""

    model: str
    """As people see it."""
    left_s: float
    reason: str
    """Of its last crash."""


class Quarantine:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._crashes: dict[LoadKey, Crashes] = {}
        self._names: dict[LoadKey, str] = {}

    def crashed(self, key: LoadKey, spec: ModelSpec, reason: str) -> None:
        self._crashes[key] = self._crashes.get(key, Crashes()).add(self._clock.monotonic(), reason)
        self._names[key] = spec.display

    def held(self) -> list[Crashed]:
        now = self._clock.monotonic()
        return [
            Crashed(self._names[key], left_s, crashes.reason)
            for key, crashes in self._crashes.items()
            if (left_s := crashes.quarantined_for(now))
        ]

    def check(self, key: LoadKey, spec: ModelSpec) -> None:
        """
        Raises:
            Quarantined: it crashed too often; says until when and why.
        """
        crashes = self._crashes.get(key, Crashes())
        if left_s := crashes.quarantined_for(self._clock.monotonic()):
            raise Quarantined(
                f"{spec.display} crashed {CRASHES} times in a short while and may be loaded again in "
                f"{left_s:.0f} s; the last reason: {crashes.reason}"
            )
