"""For how long a loaded model stays once nobody uses it (`plan.expires_at` decides).

Looks at the clock and at what placement holds; of the queue it knows nothing. What is done when
the time is over is the fleet's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from ollama_distributed.base.clock import Clock
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.holds import Holds
from ollama_distributed.serving.plan import expires_at
from ollama_distributed.serving.residents import Resident

LONGEST_TIMER_S = 86_400.0
"""Loops differ in the longest timer they take; one that fires early looks again."""


class KeepAlive:
    def __init__(
        self, clock: Clock, holds: Holds, default_s: float, unload: Callable[[Resident], None]
    ) -> None:
        self._clock = clock
        self._holds = holds
        self._unload = unload
        self._default_s = default_s
        self._by_name: Mapping[str, float] = {}

    def default_s(self, spec: ModelSpec) -> float:
        """Where no request said otherwise."""
        return self._by_name.get(spec.name.lower(), self._default_s)

    def configure(self, default_s: float, residents: Iterable[Resident]) -> None:
        """What was kept for the default time is kept for the new one."""
        before = self._defaults(residents)
        self._default_s = default_s
        self._renew(before)

    def configure_names(self, of: Mapping[str, float], residents: Iterable[Resident]) -> None:
        """Seconds by a model's canonical name, where they are others than the default; what was
        kept for the default time is kept for the new one."""
        if of != self._by_name:
            before = self._defaults(residents)
            self._by_name = of
            self._renew(before)

    def _defaults(self, residents: Iterable[Resident]) -> list[tuple[Resident, float]]:
        return [(resident, self.default_s(resident.spec)) for resident in residents]

    def _renew(self, before: list[tuple[Resident, float]]) -> None:
        """`before`: what the defaults were."""
        for resident, default_s in before:
            if resident.keep_alive_s == default_s:
                resident.keep_alive_s = self.default_s(resident.spec)
                self.look_after(resident)

    def look_after(self, resident: Resident) -> None:
        """Unload it when its time is over, unless it is used: it fell idle, or something else may
        hold for how long it stays. One timer that looks again costs a request nothing."""
        if resident.state != "ready" or resident.active:
            return
        due = expires_at(resident.last_used, resident.keep_alive_s)
        now = self._clock.monotonic()
        if due is None or resident.key in self._holds:
            return
        if due <= now:
            self._unload(resident)
        elif resident.expiry is None or due < resident.expiry_due:
            if resident.expiry is not None:
                resident.expiry.cancel()
            loop = asyncio.get_running_loop()
            resident.expiry = loop.call_later(min(due - now, LONGEST_TIMER_S), self._look, resident)
            resident.expiry_due = due

    def _look(self, resident: Resident) -> None:
        resident.expiry = None
        self.look_after(resident)
