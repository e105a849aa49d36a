"""The network between simulated nodes and the coordination engine: what it does to a message.

An endpoint is the engine or one life of a node, `n07#2`; faults are said of nodes. All chance
comes from one seeded source, one draw or two per message, in the order of sending.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable

QUICKEST_S = 0.0002
TYPICAL_S = 0.002
"""Mean of the exponential part of a message's way: a local network under load."""


class FaultyLink:
    """An `adapters.coordination.memory.Link`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.loss = 0.0
        """Share of messages that vanish."""
        self.slow_s = 0.0
        """Mean of what is added to every way."""
        self.sent = 0
        self.lost = 0
        self._cut: Counter[tuple[str, str]] = Counter()
        self._clogged_until: dict[str, float] = {}
        self._dead: set[str] = set()

    def delay_s(self, source: str, target: str) -> float | None:
        self.sent += 1
        chance = self._chance
        lost = self.loss and chance.random() < self.loss
        if lost or source in self._dead or target in self._dead or self._is_cut(source, target):
            self.lost += 1
            return None
        delay_s = QUICKEST_S + chance.expovariate(1 / (TYPICAL_S + self.slow_s))
        return delay_s + self._clog_s(source, target) if self._clogged_until else delay_s

    # ── faults ──────────────────────────────────────────────────────────────────────

    def bury(self, endpoint: str) -> None:
        """This life of a node is over: nothing more comes from it or gets to it."""
        self._dead.add(endpoint)

    def cut(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        """Nothing gets from one of `sources` to one of `targets`, until it is mended as often."""
        self._cut.update(_pairs(sources, targets))

    def mend(self, sources: Iterable[str], targets: Iterable[str]) -> None:
        self._cut.subtract(_pairs(sources, targets))
        self._cut = +self._cut

    def clog(self, node: str, until: float) -> None:
        """All that goes to or from `node` is held until then, and then comes at once."""
        self._clogged_until[node] = max(until, self._clogged_until.get(node, 0.0))

    @property
    def clogged_until(self) -> float:
        return max(self._clogged_until.values(), default=0.0)

    def heal(self) -> None:
        """As on a good day. What is held stays held until its time."""
        self.loss = self.slow_s = 0.0
        self._cut.clear()

    def _is_cut(self, source: str, target: str) -> bool:
        return bool(self._cut) and (node_of(source), node_of(target)) in self._cut

    def _clog_s(self, source: str, target: str) -> float:
        now = asyncio.get_running_loop().time()
        until = [self._clogged_until.get(node_of(end), 0.0) for end in (source, target)]
        return max(0.0, max(until) - now)


def _pairs(sources: Iterable[str], targets: Iterable[str]) -> list[tuple[str, str]]:
    targets = list(targets)
    return [(source, target) for source in sources for target in targets if source != target]


def node_of(endpoint: str) -> str:
    return endpoint.partition("#")[0]
