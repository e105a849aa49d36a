"""Whose turn it is at one model: classes first, then keys by deficit round robin.

Pure. Three rules decide:

1. The most urgent class that has somebody waiting goes first. A less urgent one that had no turn
   for its `AGE_S` has the next one (ageing): a stream of urgent requests cannot starve it, and its
   backlog, however old, costs the urgent ones no more than that one turn.
2. Inside a class the keys take turns by deficit round robin (`lanes.py`), counted in tokens of prompt
   and expected answer: a key with many or long requests gets no more than one with few or short ones.
3. Inside a key it is first come, first served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeAlias, TypeVar

from ollama_distributed.admission.lanes import Ahead, Lane
from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Waiter

W = TypeVar("W", bound=Waiter)

AGE_S: Mapping[Priority, float] = {"interactive": 0.0, "normal": 10.0, "batch": 60.0}
"""Longest time without a turn. Nobody watches a batch; a program has its own patience."""

Order: TypeAlias = tuple[int, int]
"""Who comes before whom among models: class as it counts now, then number of arrival."""


class Turns(Generic[W]):
    """The queue of one model. `now`: a monotonic clock's."""

    __slots__ = ("cost", "lanes", "questions")

    def __init__(self) -> None:
        self.lanes: tuple[Lane[W], ...] = tuple(Lane() for _ in PRIORITIES)
        """By class, as in `PRIORITIES`."""
        self.cost = 0.0
        """Tokens of all who wait."""
        self.questions = 0
        """Of those who wait, those that need no slot."""

    def __len__(self) -> int:
        return sum(lane.waiting for lane in self.lanes)

    def __iter__(self) -> Iterator[W]:
        """Class by class, and in a class key by key."""
        for lane in self.lanes:
            for flow in lane.flows():
                yield from flow.waiting

    def lane(self, priority: Priority) -> Lane[W]:
        return self.lanes[PRIORITIES.index(priority)]

    @property
    def keys(self) -> set[str]:
        return {key for lane in self.lanes for key in lane.keys}

    def join(self, waiter: W, now: float) -> None:
        self.lane(waiter.ask.priority).join(waiter, now)
        self.questions += not waiter.slot
        self.cost += waiter.cost

    def leave(self, waiter: W) -> bool:
        """False: it was not waiting any more."""
        left = self.lane(waiter.ask.priority).leave(waiter)
        self._without(waiter, left)
        return left

    def grant(self, waiter: W, now: float) -> bool:
        granted = self.lane(waiter.ask.priority).grant(waiter, now)
        self._without(waiter, granted)
        return granted

    def _without(self, waiter: W, left: bool) -> None:
        if left:
            self.questions -= not waiter.slot
            self.cost = self.cost - waiter.cost if len(self) else 0.0

    def first(self, now: float, before: Order | None = None) -> W | None:
        """Whose turn it is, of those that come before `before`."""
        for rank, lane in self._in_turn(now):
            if before is not None and rank > before[0]:
                continue
            most = before[1] if before is not None and rank == before[0] else None
            if (found := lane.first(most)) is not None:
                return found
        return None

    def order(self, now: float) -> Order:
        """Of this queue among those of other models; somebody must wait."""
        rank, lane = next(self._in_turn(now))
        oldest = lane.oldest()
        assert oldest is not None
        return rank, oldest.number

    def order_of(self, waiter: W, now: float) -> Order:
        index = PRIORITIES.index(waiter.ask.priority)
        return (0 if self._overdue(index, now) else index), waiter.number

    def _in_turn(self, now: float) -> Iterator[tuple[int, Lane[W]]]:
        """Lanes where somebody waits, those that had no turn for too long first."""
        waiting = [index for index, lane in enumerate(self.lanes) if lane.waiting]
        late = [index for index in waiting if self._overdue(index, now)]
        for index in sorted(late, key=lambda one: self.lanes[one].since):
            yield 0, self.lanes[index]
        for index in waiting:
            if index not in late:
                yield index, self.lanes[index]

    def _overdue(self, index: int, now: float) -> bool:
        return index > 0 and now - self.lanes[index].since >= AGE_S[PRIORITIES[index]]

    def ahead(self, waiter: W) -> Ahead:
        """What would come before this one if nobody else came, nearly: all of more urgent classes, and of
        its own what `Lane.ahead` says."""
        requests, cost = self._urgent(waiter.ask.priority)
        own = self.lane(waiter.ask.priority).ahead(waiter)
        return Ahead(requests + own.requests, cost + own.cost)

    def ahead_of_new(self, priority: Priority) -> Ahead:
        """What would come before a newcomer at worst: all of its class, and of more urgent ones."""
        requests, cost = self._urgent(priority)
        waiting = [one for flow in self.lane(priority).flows() for one in flow.waiting]
        return Ahead(requests + len(waiting), cost + sum(one.cost for one in waiting))

    def _urgent(self, priority: Priority) -> tuple[int, float]:
        """Requests of more urgent classes, and their tokens."""
        lanes = self.lanes[: PRIORITIES.index(priority)]
        waiting = [one for lane in lanes for flow in lane.flows() for one in flow.waiting]
        return len(waiting), sum(one.cost for one in waiting)
