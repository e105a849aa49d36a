"""The queue of this node: who waits for which model, and who is refused.

Implements `serving.queues.Waiting`; `plan.py` has the order, `bounds.py` who gives way, `pace.py`
how long it takes. Runs on one event loop; nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from ollama_distributed.admission.bounds import Bounds, Places
from ollama_distributed.admission.counts import Counts
from ollama_distributed.admission.pace import Pace
from ollama_distributed.admission.plan import Order, Turns
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DeadlineExceeded, OllamaDistributedError, QueueFull
from ollama_distributed.base.inference import Queued
from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Ask, QueuedRow, QueueFigures, QueueRow, Run, Waiter

W = TypeVar("W", bound=Waiter)

BUSY = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's text, two spaces and all: clients match on it."""
_OF = {
    "model": "too many requests wait for this model; try again",
    "team": "too many requests of your team wait; try again",
    "key": "too many requests of this key wait; try again",
}
SOONEST_S, LATEST_S = 1.0, 60.0
"""Of `Retry-After`: longer than that is a guess."""
DRAINED_S = 0.25
"""For so long one answer to that does for all who are refused."""
MOST_BEGAN, BEGAN_S = 1024, 10.0
"""Requests that had their turn of which that is remembered, and for how long: whoever watched them wait
asks every second or two."""
MOST_MODELS = 256
"""Whose pace is remembered; the one that ended longest ago is forgotten."""


class Admission(Generic[W]):
    def __init__(self, clock: Clock, bounds: Bounds | None = None) -> None:
        self._clock = clock
        self._turns: dict[str, Turns[W]] = {}
        """By load; none of them is empty."""
        self._paces: dict[str, Pace] = {}
        self._places = Places(bounds or Bounds())
        self._joined: dict[int, tuple[float, float | None]] = {}
        """When, and which wait was told; by number."""
        self._began: deque[tuple[float, int]] = deque(maxlen=MOST_BEGAN)
        """When, and number."""
        self._counts = Counts()
        self._drained: dict[str | None, tuple[float, float]] = {}
        """Of loads (None: all): until when it holds, and how long until they are drained."""

    def configure(self, bounds: Bounds) -> None:
        """Use others from now on; who waits already goes on waiting."""
        self._places.bounds = bounds

    # ── for the fleet ───────────────────────────────────────────────────────────────

    @property
    def waiting(self) -> int:
        return self._places.taken

    def __contains__(self, key: str) -> bool:
        return key in self._turns

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._turns))

    def of(self, key: str) -> tuple[W, ...]:
        turns = self._turns.get(key)
        return tuple(turns) if turns is not None else ()

    def questions(self, key: str) -> int:
        turns = self._turns.get(key)
        return turns.questions if turns is not None else 0

    def first(self, key: str, before: Order | None = None) -> W | None:
        return self._turns[key].first(self._clock.monotonic(), before)

    def order(self, key: str) -> Order:
        return self._turns[key].order(self._clock.monotonic())

    def order_of(self, key: str, waiter: W) -> Order:
        return self._turns[key].order_of(waiter, self._clock.monotonic())

    def join(self, key: str, waiter: W) -> Queued:
        """
        Raises:
            QueueFull: as many wait as may, or its turn would come too late.
        """
        now, ask, pace = self._clock.monotonic(), waiter.ask, self._pace(key)
        waiter.cost = pace.cost_of(ask)
        if (error := self._refusal(key, ask, now)) is not None:
            raise error
        turns = self._turns.get(key)
        if turns is None:
            turns = self._turns[key] = Turns()
        turns.join(waiter, now)
        place = self._place(key, waiter, now)
        if ask.within_s is not None and place.eta_s is not None and place.eta_s > ask.within_s:
            # Before anybody gives way to it.
            turns.leave(waiter)
            if not len(turns):
                del self._turns[key]
            self._counts.refused["deadline"] += 1
            raise QueueFull(
                f"the wait would be {place.eta_s:.1f} s, longer than the {ask.within_s:g} s of the request",
                retry_after_s=_bounded(place.eta_s - ask.within_s),
            )
        if self._places.full and (loser := self._places.loser(ask)) is not None:
            self._push_out(loser.priority, loser.key, now)
        self._places.take(key, ask)
        self._joined[waiter.number] = (now, place.eta_s)
        return place

    def leave(self, key: str, waiter: W) -> bool:
        """False: it was not waiting any more."""
        turns = self._turns.get(key)
        if turns is None or not turns.leave(waiter):
            return False
        self._left(key, turns, waiter)
        return True

    def grant(self, key: str, waiter: W) -> None:
        """Its turn has come."""
        turns, now = self._turns.get(key), self._clock.monotonic()
        if turns is None or not turns.grant(waiter, now):
            return
        joined_s, told_s = self._joined.get(waiter.number, (now, None))
        self._left(key, turns, waiter)
        self._began.append((now, waiter.number))
        self._counts.granted[waiter.ask.priority] += 1
        self._counts.waited.add(now - joined_s)
        if told_s is not None:
            self._counts.eta_error.add(now - joined_s - told_s)

    def place(self, key: str, waiter: W) -> Queued:
        """Where it stands now, as far as can be told."""
        return self._place(key, waiter, self._clock.monotonic())

    def expired(self, key: str, waiter: W, error: DeadlineExceeded) -> None:
        """It waited for as long as it may."""
        if self.leave(key, waiter):
            self._counts.refused["expired"] += 1
        waiter.refuse(error)

    def began(self, key: str, ask: Ask, slots: int) -> Run:
        """A request has one of so many slots."""
        pace = self._pace(key)
        run = Run(key, ask.key, self._clock.monotonic(), pace.cost_of(ask), ask.prompt_tokens)
        pace.began(run, slots)
        return run

    def ended(self, run: Run) -> None:
        """It has given its slot back. Idempotent."""
        if (pace := self._paces.get(run.model)) is not None:
            pace.ended(run, self._clock.monotonic())

    # ── for the node ────────────────────────────────────────────────────────────────

    def refusal(self, ask: Ask) -> OllamaDistributedError | None:
        """Why a request of this kind would be refused, whatever its model; None: it may wait."""
        return self._refusal(None, ask, self._clock.monotonic())

    def rows(self, names: dict[str, str], node: str) -> tuple[QueueRow, ...]:
        """Models for which somebody waits or runs. `names`: of loads, as people see them."""
        now = self._clock.monotonic()
        rows = [self._row(key, name, node, now) for key, name in names.items()]
        return tuple(sorted((row for row in rows if row.waiting or row.running), key=lambda row: row.model))

    def waiters(self, names: Mapping[str, str], node: str) -> Iterator[QueuedRow]:
        """Each request that waits, model by model; lazily, as its place takes some work to say. What leaves
        meanwhile is left out. `names`: of loads, as people see them."""
        there = [(key, waiter) for key, turns in self._turns.items() for waiter in turns]
        epoch = self._clock.time() - self._clock.monotonic()
        for key, waiter in there:
            joined = self._joined.get(waiter.number)
            if joined is None:
                continue
            place, ask = self.place(key, waiter), waiter.ask
            yield QueuedRow(
                number=waiter.number,
                request_id=ask.request_id,
                model=names.get(key, ""),
                node=node,
                position=place.position,
                eta_s=place.eta_s,
                priority=ask.priority,
                since=epoch + joined[0],
                key=ask.key,
                team=ask.team,
                user=ask.user,
            )

    def began_lately(self) -> tuple[int, ...]:
        """Numbers of requests that had their turn."""
        since = self._clock.monotonic() - BEGAN_S
        return tuple(number for at, number in self._began if at >= since)

    @property
    def most(self) -> int:
        return self._places.bounds.total

    def figures(self) -> QueueFigures:
        counts = self._counts
        return QueueFigures(
            waiting=self._places.waiting(),
            granted=dict(counts.granted),
            refused=dict(counts.refused),
            waited=counts.waited.seen(),
            eta_error=counts.eta_error.seen(),
        )

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _pace(self, key: str) -> Pace:
        pace = self._paces.get(key)
        if pace is None:
            if len(self._paces) >= MOST_MODELS:
                idle = (name for name, one in self._paces.items() if not one.running)
                if (oldest := next(idle, None)) is not None:
                    del self._paces[oldest]
            pace = self._paces[key] = Pace()
        return pace

    def _left(self, key: str, turns: Turns[W], waiter: W) -> None:
        self._places.take(key, waiter.ask, -1)
        self._joined.pop(waiter.number, None)
        if not len(turns):
            del self._turns[key]

    def _refusal(self, key: str | None, ask: Ask, now: float) -> QueueFull | None:
        """Why there is no place for it, even if somebody gave way."""
        reason = self._places.over(key, ask)
        if reason is None and self._places.full and self._places.loser(ask) is None:
            reason = "full"
        if reason is None:
            return None
        self._counts.refused[reason] += 1
        return QueueFull(_OF.get(reason, BUSY), retry_after_s=self._drained_s(key, now))

    def _push_out(self, priority: Priority, of: str, now: float) -> None:
        """The latest request of that key in that class gives way."""
        found: tuple[str, W] | None = None
        for key, turns in self._turns.items():
            flow = turns.lane(priority).flow(of)
            if flow is not None and (found is None or flow.waiting[-1].number > found[1].number):
                found = key, flow.waiting[-1]
        assert found is not None, "who holds a place waits"
        key, waiter = found
        self._counts.refused["pushed_out"] += 1
        self.leave(key, waiter)
        waiter.refuse(QueueFull(BUSY, retry_after_s=self._drained_s(key, now)))

    def _drained_s(self, key: str | None, now: float) -> float:
        """Until who waits now has had their turn; of all models where it is not known which. Under a
        flood it is asked for often, and worked out now and then."""
        until_s, drained_s = self._drained.get(key, (0.0, 0.0))
        if now < until_s:
            return drained_s
        if len(self._drained) > MOST_MODELS:
            self._drained.clear()
        keys = self._turns if key is None else (key,)
        longest = 0.0
        for one in keys:
            turns = self._turns.get(one)
            if turns is not None:
                wait_s = self._pace(one).wait_s(len(turns), turns.cost, now)
                longest = max(longest, wait_s or 0.0)
        self._drained[key] = (now + DRAINED_S, _bounded(longest))
        return _bounded(longest)

    def _place(self, key: str, waiter: W, now: float) -> Queued:
        ahead = self._turns[key].ahead(waiter)
        eta_s = self._pace(key).wait_s(ahead.requests, ahead.cost, now)
        return Queued(position=ahead.requests + 1, eta_s=eta_s)

    def _row(self, key: str, name: str, node: str, now: float) -> QueueRow:
        pace, turns = self._pace(key), self._turns.get(key) or Turns()
        ahead = turns.ahead_of_new("normal")
        oldest = [self._joined[one.number][0] for one in turns if one.number in self._joined]
        typical = turns.cost / len(turns) if len(turns) else pace.cost_of(Ask())
        return QueueRow(
            model=name,
            node=node,
            waiting=len(turns),
            classes={
                p: lane.waiting for p, lane in zip(PRIORITIES, turns.lanes, strict=True) if lane.waiting
            },
            keys=len(turns.keys),
            running=pace.running,
            slots=pace.slots,
            oldest_s=now - min(oldest) if oldest else 0.0,
            eta_s=pace.wait_s(ahead.requests, ahead.cost, now),
            requests_per_s=pace.requests_per_s(typical),
        )


def _bounded(seconds: float) -> float:
    return min(max(seconds, SOONEST_S), LATEST_S)
