"""A node's queue that remembers whose turn it was."""

from __future__ import annotations

from ollama_distributed.admission.bounds import Bounds
from ollama_distributed.admission.service import Admission
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.inference import Queued
from ollama_distributed.serving.residents import Ticket


class TurnQueue(Admission[Ticket]):
    """`watched`: the key whose requests are followed."""

    def __init__(self, clock: Clock, watched: str, bounds: Bounds | None = None) -> None:
        super().__init__(clock, bounds)
        self.turns: list[str] = []
        """Keys."""
        self.passed: list[int] = []
        """Turns of others while a request of the watched key waited, of each that had its own."""
        self._watched = watched
        self._before: dict[int, int] = {}
        """Turns of others that were over when it came, by its number."""

    @property
    def _others(self) -> int:
        return sum(key != self._watched for key in self.turns)

    @property
    def watched_waiting(self) -> int:
        return len(self._before)

    def join(self, key: str, waiter: Ticket) -> Queued:
        place = super().join(key, waiter)
        if waiter.ask.key == self._watched:
            self._before[waiter.number] = self._others
        return place

    def grant(self, key: str, waiter: Ticket) -> None:
        super().grant(key, waiter)
        if waiter.ask.key == self._watched:
            self.passed.append(self._others - self._before.pop(waiter.number))
        self.turns.append(waiter.ask.key)
