"""Whose turn it is at one model: classes first, then keys by deficit round robin.

Pure. Three rules decide:

1. The most urgent class that has somebody waiting goes first. A less urgent one that had no turn
   for its `AGE_S` has the next one (ageing): a stream of urgent requests cannot starve it, and its
   backlog, however old, costs the urgent ones no more than that one turn.
2. Inside a class the keys take turns by deficit round robin (Shreedhar and Varghese, 1995), counted
   in tokens of prompt and expected answer: a key with many or long requests gets no more than one
   with few or short ones.
3. Inside a key it is first come, first served.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeAlias, TypeVar

import msgspec

from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Waiter

W = TypeVar("W", bound=Waiter)

QUANTUM_TOKENS = 32.0
"""That a key may use a round. Rounds in which nobody could afford a turn cost nothing, so it is small:
keys with short requests change turns often."""
NEWCOMER_TOKENS = 512.0
"""That a key may use at once which had nobody here: about one request. Who asks now and then goes before
those who always wait; one long request more, and it waits its turn as they do."""
AGE_S: Mapping[Priority, float] = {"interactive": 0.0, "normal": 10.0, "batch": 60.0}
"""Longest time without a turn. Nobody watches a batch; a program has its own patience."""

Order: TypeAlias = tuple[int, int]
"""Who comes before whom among models: class as it counts now, then number of arrival."""


class Flow(Generic[W]):
    """What one key has waiting."""

    __slots__ = ("deficit", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[W] = deque()
        """Never empty once it is in a lane."""
        self.deficit = NEWCOMER_TOKENS
        """Tokens that it may use now."""


class Lane(Generic[W]):
    """One class."""

    __slots__ = ("flows", "since", "waiting")

    def __init__(self) -> None:
        self.flows: OrderedDict[str, Flow[W]] = OrderedDict()
        """By key; whose turn was longest ago first."""
        self.waiting = 0
        self.since = 0.0
        """Its last turn, or when somebody began to wait."""

    def join(self, waiter: W, now: float) -> None:
        if not self.flows:
            self.since = now
        flow = self.flows.get(waiter.ask.key)
        if flow is None:
            # Who has nothing here goes before those who had their turn.
            flow = self.flows[waiter.ask.key] = Flow()
            self.flows.move_to_end(waiter.ask.key, last=False)
        flow.waiting.append(waiter)
        self.waiting += 1

    def leave(self, waiter: W) -> bool:
        flow = self.flows.get(waiter.ask.key)
        if flow is None:
            return False
        if flow.waiting[0] is waiter:
            flow.waiting.popleft()
        elif flow.waiting[-1] is waiter:
            flow.waiting.pop()
        else:
            try:
                flow.waiting.remove(waiter)
            except ValueError:
                return False
        self.waiting -= 1
        if not flow.waiting:
            # What it did not use is lost: nobody saves up turns while away.
            del self.flows[waiter.ask.key]
        return True

    def grant(self, waiter: W, now: float) -> bool:
        """Its turn has come: as `leave`, and charged for."""
        flow = self.flows.get(waiter.ask.key)
        if flow is None or not self.leave(waiter):
            return False
        self.since = now
        flow.deficit -= waiter.cost
        if flow.waiting:
            self.flows.move_to_end(waiter.ask.key)
        return True

    def first(self, most: int | None) -> W | None:
        """Who is next, of those that came before number `most`; asking again changes nothing."""
        flows = [f for f in self.flows.values() if most is None or f.waiting[0].number < most]
        if not flows:
            return None
        short = [flow.waiting[0].cost - flow.deficit for flow in flows]
        if (least := min(short)) > 0.0:
            # So many rounds until one of them has enough; all of them at once.
            rounds = -(-least // QUANTUM_TOKENS)
            for flow in flows:
                flow.deficit += rounds * QUANTUM_TOKENS
            short = [missing - rounds * QUANTUM_TOKENS for missing in short]
        return next(flow.waiting[0] for flow, missing in zip(flows, short, strict=True) if missing <= 0.0)

    def oldest(self) -> W | None:
        return min((f.waiting[0] for f in self.flows.values()), key=lambda one: one.number, default=None)


class Ahead(msgspec.Struct, frozen=True):
    """What comes before a request."""

    requests: int
    cost: float
    """Tokens of them together."""


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
            for flow in lane.flows.values():
                yield from flow.waiting

    def lane(self, priority: Priority) -> Lane[W]:
        return self.lanes[PRIORITIES.index(priority)]

    @property
    def keys(self) -> set[str]:
        return {key for lane in self.lanes for key in lane.flows}

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
        """What would come before this one if nobody else came, nearly: all of more urgent classes, those
        of its own key, and of each other key as much as the turns let it use until then."""
        lane = self.lane(waiter.ask.priority)
        requests, cost = self._urgent(waiter.ask.priority)
        own = lane.flows[waiter.ask.key]
        mine = list(itertools.takewhile(lambda one: one is not waiter, own.waiting))
        own_cost = sum(one.cost for one in mine)
        requests, cost = requests + len(mine), cost + own_cost
        short = own_cost + waiter.cost - own.deficit
        for flow in lane.flows.values():
            if flow is not own:
                # Who can afford its turns shares them one by one; else each gets as many tokens.
                before = (
                    list(itertools.islice(flow.waiting, len(mine)))
                    if short <= 0.0
                    else _within(flow.waiting, short + max(flow.deficit, 0.0))
                )
                requests, cost = requests + len(before), cost + sum(one.cost for one in before)
        return Ahead(requests, cost)

    def ahead_of_new(self, priority: Priority) -> Ahead:
        """What would come before a newcomer at worst: all of its class, and of more urgent ones."""
        requests, cost = self._urgent(priority)
        waiting = [one for flow in self.lane(priority).flows.values() for one in flow.waiting]
        return Ahead(requests + len(waiting), cost + sum(one.cost for one in waiting))

    def _urgent(self, priority: Priority) -> tuple[int, float]:
        """Requests of more urgent classes, and their tokens."""
        lanes = self.lanes[: PRIORITIES.index(priority)]
        waiting = [one for lane in lanes for flow in lane.flows.values() for one in flow.waiting]
        return len(waiting), sum(one.cost for one in waiting)


def _within(waiting: Iterable[W], tokens: float) -> list[W]:
    """The first of them that together take no more."""
    found, used = [], 0.0
    for one in waiting:
        if (used := used + one.cost) > tokens:
            break
        found.append(one)
    return found
