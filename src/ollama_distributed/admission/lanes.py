"""Turns between the keys of one class: deficit round robin, counted in tokens.

Pure. Every key has a credit. One that has any left may go and is charged its whole request, so that it may
owe afterwards (the surplus form: Adiseshu, Parulkar and Varghese, 1996): a long request is not held back by
short ones, it is paid for before the key's next. When nobody who waits has credit left, all keys get as much
as the one that owes least needs.

A key that comes with credit, and had nobody waiting, goes before those who always wait until it has used that
up (the sparse flows of FQ-CoDel, RFC 8290 4.2); of several such the one with fewest requests, then the one
whose turn was longest ago. What it used is remembered while it is away until the others had as much; else one
that always had a single request waiting would always be next.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from ollama_distributed.base.queue import Waiter

W = TypeVar("W", bound=Waiter)

QUANTUM_TOKENS = 32.0
"""That a key gets a round. Rounds in which nobody could afford a turn cost nothing, so it is small:
keys with short requests change turns often."""
NEWCOMER_TOKENS = 512.0
"""Credit of a key that was not here lately, and the most that it can have: about one request."""
MOST_AWAY = 1024
"""Keys of which that is remembered; the one that left longest ago is forgotten."""


class Ahead(msgspec.Struct, frozen=True):
    """What comes before a request."""

    requests: int
    cost: float
    """Tokens of them together."""


class Flow(Generic[W]):
    """What one key has waiting."""

    __slots__ = ("used", "waiting")

    def __init__(self, used: float) -> None:
        self.waiting: deque[W] = deque()
        """Never empty once it is in a lane."""
        self.used = used
        """Tokens; its credit is what `Lane` gave to each key, less this."""


class Lane(Generic[W]):
    """One class."""

    __slots__ = ("_always", "_away", "_given", "_new", "since", "waiting")

    def __init__(self) -> None:
        self._new: OrderedDict[str, Flow[W]] = OrderedDict()
        """By key; who came with credit and has some left. Whose turn was longest ago, or who came, first."""
        self._always: OrderedDict[str, Flow[W]] = OrderedDict()
        """The others, likewise."""
        self._away: OrderedDict[str, float] = OrderedDict()
        """What keys that have nobody here used; who left longest ago first."""
        self._given = 0.0
        """Tokens to each key so far."""
        self.waiting = 0
        self.since = 0.0
        """Its last turn, or when somebody began to wait."""

    def flows(self) -> Iterator[Flow[W]]:
        """In the order of their turns, were there credit enough."""
        new = sorted(self._new.values(), key=_waiting) if len(self._new) > 1 else self._new.values()
        return itertools.chain(new, self._always.values())

    def flow(self, key: str) -> Flow[W] | None:
        return self._new.get(key) or self._always.get(key)

    @property
    def keys(self) -> Iterator[str]:
        return itertools.chain(self._new, self._always)

    def join(self, waiter: W, now: float) -> None:
        if not self.waiting:
            self.since = now
        key = waiter.ask.key
        flow = self.flow(key)
        if flow is None:
            least = self._given - NEWCOMER_TOKENS
            flow = Flow(max(self._away.pop(key, least), least))
            (self._new if flow.used < self._given else self._always)[key] = flow
        flow.waiting.append(waiter)
        self.waiting += 1

    def leave(self, waiter: W) -> bool:
        """False: it was not waiting any more."""
        key = waiter.ask.key
        flow = self.flow(key)
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
            self._gone(key, flow)
        return True

    def grant(self, waiter: W, now: float) -> bool:
        """Its turn has come: as `leave`, and charged for."""
        key = waiter.ask.key
        flow = self.flow(key)
        if flow is None or not self.leave(waiter):
            return False
        self.since = now
        flow.used += waiter.cost
        if not flow.waiting:
            self._away[key] = flow.used
        elif key not in self._new:
            self._always.move_to_end(key)
        elif flow.used < self._given:
            self._new.move_to_end(key)
        else:
            self._always[key] = self._new.pop(key)
        return True

    def _gone(self, key: str, flow: Flow[W]) -> None:
        self._new.pop(key, None)
        self._always.pop(key, None)
        self._away[key] = flow.used
        if len(self._away) > MOST_AWAY:
            self._away.popitem(last=False)

    def first(self, most: int | None) -> W | None:
        """Who is next, of those that came before number `most`; asking again changes nothing."""
        owes: float | None = None
        for flow in self.flows():
            if most is None or flow.waiting[0].number < most:
                if (owed := flow.used - self._given) < 0.0:
                    return flow.waiting[0]
                owes = owed if owes is None else min(owes, owed)
        if owes is None:
            return None
        # So many rounds until one of them has some left; all of them at once.
        self._given += (owes // QUANTUM_TOKENS + 1.0) * QUANTUM_TOKENS
        return self.first(most)

    def oldest(self) -> W | None:
        return min((flow.waiting[0] for flow in self.flows()), key=lambda one: one.number, default=None)

    def ahead(self, waiter: W) -> Ahead:
        """What would come before this one if nobody else came, nearly: those of its own key, and of each
        other key as much as the turns let it use until then."""
        own = self.flow(waiter.ask.key)
        assert own is not None, "it waits"
        mine = list(itertools.takewhile(lambda one: one is not waiter, own.waiting))
        requests, cost = len(mine), sum(one.cost for one in mine)
        owes, sooner, new = own.used + cost - self._given, True, waiter.ask.key in self._new
        for place, flow in enumerate(self.flows()):
            if flow is own:
                sooner = False
                continue
            left = self._given - flow.used
            if owes >= 0.0:  # until it has credit again each gets as many tokens
                before = _until(flow.waiting, owes + max(left, 0.0))
            elif place < len(self._new):
                before = _until(flow.waiting, left) if sooner else []
            else:  # who has credit and always waits takes turns one by one
                count = 0 if new else len(mine) + (sooner and left > 0.0)
                before = list(itertools.islice(flow.waiting, count))
            requests, cost = requests + len(before), cost + sum(one.cost for one in before)
        return Ahead(requests, cost)


def _waiting(flow: Flow[W]) -> int:
    return len(flow.waiting)


def _until(waiting: Iterable[W], tokens: float) -> list[W]:
    """The first of them that begin before so many are used up."""
    found, used = [], 0.0
    for one in waiting:
        if used >= tokens:
            break
        used += one.cost
        found.append(one)
    return found
