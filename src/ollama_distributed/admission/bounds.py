"""How many may wait, and who gives way when that is reached. Pure.

When all places are taken, a newcomer of a more urgent class takes that of the least urgent; among
equals, a key takes from the one that holds most, as long as that still holds more afterwards. So a
key that has fewer places than its share is never refused, whoever floods the node.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Ask

Reason = Literal["full", "model", "team", "key"]


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that may wait; 0: as many as `total`."""

    total: int = 512
    """As in Ollama."""
    per_model: int = 0
    per_team: int = 0
    per_key: int = 0


class Loser(msgspec.Struct, frozen=True):
    """Whose latest request gives way."""

    priority: Priority
    key: str


class Places:
    """Who holds how many."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.taken = 0
        self._models: Counter[str] = Counter()
        self._teams: Counter[str] = Counter()
        self._keys: Counter[str] = Counter()
        self._lanes: dict[Priority, Counter[str]] = {priority: Counter() for priority in PRIORITIES}
        """By class and key."""

    def take(self, model: str, ask: Ask, count: int = 1) -> None:
        """`count` -1: give back."""
        self.taken += count
        for counter, name in (
            (self._models, model),
            (self._teams, ask.team),
            (self._keys, ask.key),
            (self._lanes[ask.priority], ask.key),
        ):
            counter[name] += count
            if not counter[name]:
                del counter[name]

    def over(self, model: str | None, ask: Ask) -> Reason | None:
        """Which bound one more would break, that no other can make room under. `model` None: not
        known yet."""
        bounds = self.bounds
        if bounds.per_key and self._keys[ask.key] >= bounds.per_key:
            return "key"
        if bounds.per_team and self._teams[ask.team] >= bounds.per_team:
            return "team"
        if model is not None and bounds.per_model and self._models[model] >= bounds.per_model:
            return "model"
        return None

    @property
    def full(self) -> bool:
        return self.taken >= self.bounds.total

    def loser(self, ask: Ask) -> Loser | None:
        """Who gives way to this one when all places are taken; None: nobody."""
        for priority in reversed(PRIORITIES):
            lane = self._lanes[priority]
            if not lane:
                continue
            key, most = max(lane.items(), key=lambda one: one[1])
            if PRIORITIES.index(priority) > PRIORITIES.index(ask.priority):
                return Loser(priority, key)
            if priority == ask.priority and most > lane[ask.key] + 1:
                return Loser(priority, key)
            return None
        return None

    def waiting(self) -> dict[str, int]:
        """By class."""
        return {priority: lane.total() for priority, lane in self._lanes.items()}
