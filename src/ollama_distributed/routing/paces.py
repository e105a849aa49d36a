"""Decides which replica has become so slow that it counts as failed (pure).

A machine that throttles, swaps or shares its processor with a stranger still answers every question
about its health. What it says of each answer a second tells: tokens for each second of an answer that
is spoken, over the last `WINDOW` seconds. It is compared with what the same replica did before, since
machines differ; with its peers only until it was heard for `KNOWN_S`. A replica that is slow for good
is what it is in the end: what was usual fades.

What follows is `health.py`'s: it is asked last, probed, and gets its share back slowly.
"""

from __future__ import annotations

import statistics
from collections import deque

import msgspec

from ollama_distributed.base.ids import NodeId

Replica = tuple[NodeId, str]

SLOWER = 6.0
"""Less would take a machine that fills all its slots, or reads long prompts, for a sick one."""
WINDOW = 5
"""Seconds in which it spoke; a long prompt of a neighbour holds a slot for one or two."""
KNOWN_S = 20.0
"""Of answers."""
DOUBTED = 0.05
"""How much a slow second counts for what is usual: a sickness of minutes is none of it."""
FADES_S = 600.0
"""Half of what was usual is from the last so many seconds of answers."""
MOST = 4096


class _Pace(msgspec.Struct):
    recent: deque[tuple[int, float]]
    tokens: float = 0.0
    seconds: float = 0.0
    """Of what was usual before `recent`."""

    @property
    def usual(self) -> float | None:
        """Tokens a second of one answer; None: too little is known."""
        return self.tokens / self.seconds if self.seconds >= KNOWN_S else None

    def add(self, tokens: int, seconds: float) -> None:
        if len(self.recent) == WINDOW:
            self.pass_on()
        self.recent.append((tokens, seconds))

    def pass_on(self) -> None:
        """The oldest second becomes a part of what is usual."""
        tokens, seconds = self.recent.popleft()
        usual = self.usual
        weight = DOUBTED if usual is not None and tokens / seconds * SLOWER < usual else 1.0
        self.tokens, self.seconds = self.tokens + weight * tokens, self.seconds + weight * seconds
        if self.seconds > FADES_S:
            self.tokens, self.seconds = self.tokens / 2, self.seconds / 2

    @property
    def now(self) -> float | None:
        """Tokens a second of one answer lately."""
        if len(self.recent) < WINDOW:
            return None
        return sum(tokens for tokens, _ in self.recent) / sum(seconds for _, seconds in self.recent)


class Paces:
    """Of the replicas that one gateway uses."""

    def __init__(self) -> None:
        self._paces: dict[Replica, _Pace] = {}

    def said(self, replica: Replica, tokens: int, seconds: float) -> bool:
        """In one second, in answers that were spoken for `seconds` together; whether that makes it slow."""
        if seconds <= 0.0:
            return False
        pace = self._paces.get(replica)
        if pace is None:
            if len(self._paces) >= MOST:
                self._paces.clear()
            pace = self._paces[replica] = _Pace(deque())
        pace.add(tokens, seconds)
        now, expected = pace.now, pace.usual or self._of_peers(replica)
        if now is None or expected is None or now * SLOWER >= expected:
            return False
        while pace.recent:
            pace.pass_on()  # it is judged anew when it comes back
        return True

    def _of_peers(self, replica: Replica) -> float | None:
        node, model = replica
        peers = [
            pace.usual
            for (other, same), pace in self._paces.items()
            if same == model and other != node and pace.usual is not None
        ]
        return statistics.median(peers) if peers else None
