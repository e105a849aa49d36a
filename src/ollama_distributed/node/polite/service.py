"""Looks every few seconds whether the machine's owner needs it, and says so in the node's advert."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import anyio
import anyio.to_thread
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.node.polite.plan import Policy, Polite, Signs
from ollama_distributed.state.records import Rest

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

LOOK_S = 5.0
RESTS, WORKS = "polite.rests", "polite.works"


class Probe(Protocol):
    """What is seen of the machine (`adapters.hardware.owner.OwnerProbe`). Blocking."""

    def owner_idle_s(self) -> float | None: ...

    def on_battery(self) -> bool | None: ...

    def others_cpu(self) -> float | None: ...


class Politeness:
    """`rest`: why this node takes no work; None: it does."""

    def __init__(self, policy: Policy, probe: Probe, clock: Clock, changed: Callable[[], None]) -> None:
        """`changed`: called when `rest` is another one."""
        self.rest: Rest | None = None
        self._policy = policy
        self._probe = probe
        self._clock = clock
        self._changed = changed
        self._polite = Polite()
        self._news = anyio.Event()

    def use(self, policy: Policy) -> None:
        """From now on."""
        if policy != self._policy:
            self._policy = policy
            self._news.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.look()
            self._news = news = anyio.Event()
            with anyio.move_on_after(LOOK_S if self._policy else None):
                await news.wait()

    async def look(self) -> None:
        policy = self._policy
        signs = await anyio.to_thread.run_sync(self._signs, policy)
        reason = self._polite.look(signs, policy, self._clock.monotonic())
        before = self.rest
        if reason == (before.reason if before is not None else ""):
            return
        if not reason:
            self.rest = None
            log.info(WORKS)
        else:
            since = before.since if before is not None else round(self._clock.time(), 3)
            self.rest = Rest(reason=reason, since=since)
            log.info(RESTS, reason=reason)
        self._changed()

    def _signs(self, policy: Policy) -> Signs:
        """Only what the policy asks for is read."""
        here = time.localtime(self._clock.time())
        return Signs(
            minute=here.tm_hour * 60 + here.tm_min,
            owner_idle_s=self._probe.owner_idle_s() if policy.owner_idle_s else None,
            on_battery=self._probe.on_battery() if policy.battery else None,
            others_cpu=self._probe.others_cpu() if policy.cpu else None,
        )
