"""Which models crashed lately, and may not be loaded for a while (`plan.Crashes` decides)."""

from __future__ import annotations

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Quarantined
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.plan import CRASHES, Crashes
from ollama_distributed.serving.residents import LoadKey


class Quarantine:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._crashes: dict[LoadKey, Crashes] = {}

    def crashed(self, key: LoadKey, reason: str) -> None:
        self._crashes[key] = self._crashes.get(key, Crashes()).add(self._clock.monotonic(), reason)

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
