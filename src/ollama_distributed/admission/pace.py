"""How fast one model's slots work, and so how long who waits will wait.

State only. Measured is the time that requests held a slot, for each token that they counted for:
it holds for the model, the machine and the number of answers that it writes side by side. Before
the first has ended nothing is told.
"""

from __future__ import annotations

import heapq

from ollama_distributed.base.queue import Ask, Run

NEW = 0.2
"""Weight of the latest answer."""
TYPICAL_TOKENS = 256.0
"""Of an answer, before one was seen."""
MOST_TIMES_TYPICAL = 4.0
"""What a request says that its answer may have is mostly a limit and not a wish."""
MOST_KEYS = 1024
"""Whose typical answers are remembered; the one seen longest ago is forgotten."""
LEAST_S = 0.001
"""Until a slot that is overdue becomes free."""


class Pace:
    """`now`: a monotonic clock's."""

    __slots__ = ("_answers", "_runs", "_s_per_token", "_typical", "slots")

    def __init__(self) -> None:
        self.slots = 0
        """0: it is not loaded, or was not asked yet."""
        self._runs: set[Run] = set()
        self._s_per_token = 0.0
        """0: not measured."""
        self._typical = 0.0
        """Tokens of an answer; 0: none was seen."""
        self._answers: dict[str, float] = {}
        """The same, by key."""

    @property
    def running(self) -> int:
        return len(self._runs)

    def cost_of(self, ask: Ask) -> float:
        """Tokens that it counts for: its prompt and the answer that its key typically gets."""
        typical = self._answers.get(ask.key) or self._typical or TYPICAL_TOKENS
        answer = typical if ask.most_tokens is None else min(float(ask.most_tokens), _limit(typical))
        return max(1.0, ask.prompt_tokens + answer)

    def began(self, run: Run, slots: int) -> None:
        self.slots = slots
        self._runs.add(run)

    def ended(self, run: Run, now: float) -> None:
        """Idempotent. Answers that were broken off say nothing of the pace."""
        if run not in self._runs:
            return
        self._runs.discard(run)
        held_s, tokens = now - run.began_s, run.tokens
        if tokens is None or run.prompt_tokens + tokens <= 0 or held_s <= 0.0:
            return
        rate = held_s / (run.prompt_tokens + tokens)
        known = self._s_per_token
        self._s_per_token = rate if not known else known + NEW * (rate - known)
        if not tokens:
            return
        typical, seen = self._answers.pop(run.key, None), float(tokens)
        self._typical = self._typical + NEW * (seen - self._typical) if self._typical else seen
        self._answers[run.key] = seen if typical is None else typical + NEW * (seen - typical)
        if len(self._answers) > MOST_KEYS:
            del self._answers[next(iter(self._answers))]

    def wait_s(self, requests: int, cost: float, now: float) -> float | None:
        """Until somebody has a slot who has so many requests before, of so many tokens together;
        None: nothing was measured yet."""
        if not self._s_per_token or not self.slots:
            return None
        free = [self._left_s(run, now) for run in self._runs]
        while len(free) < self.slots:
            free.append(0.0)
        heapq.heapify(free)
        each_s = self._s_per_token * cost / requests if requests else 0.0
        for _ in range(requests):
            heapq.heapreplace(free, free[0] + each_s)
        return free[0]

    def _left_s(self, run: Run, now: float) -> float:
        return max(LEAST_S, self._s_per_token * run.cost - (now - run.began_s))

    def requests_per_s(self, cost: float) -> float | None:
        """That begin while all slots work, of so many tokens each."""
        if not self._s_per_token or not self.slots:
            return None
        return self.slots / (self._s_per_token * max(cost, 1.0))


def _limit(typical: float) -> float:
    return typical * MOST_TIMES_TYPICAL
