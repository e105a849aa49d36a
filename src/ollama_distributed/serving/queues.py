"""Requests that wait for a runner: first come, first served per model.

State only; the fleet decides whose turn it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.serving.options import Shape
from ollama_distributed.serving.residents import LoadKey, Ticket


class Queues:
    def __init__(self) -> None:
        self._queues: dict[LoadKey, deque[Ticket]] = {}
        """None of them is empty."""
        self.waiting = 0
        """Tickets in all of them."""
        self.questions = 0
        """Of them, those that need no slot."""

    def __contains__(self, key: LoadKey) -> bool:
        return key in self._queues

    def __iter__(self) -> Iterator[LoadKey]:
        return iter(tuple(self._queues))

    def first(self, key: LoadKey) -> Ticket:
        return self._queues[key][0]

    def of(self, key: LoadKey) -> tuple[Ticket, ...]:
        return tuple(self._queues.get(key, ()))

    def join(self, key: LoadKey, ticket: Ticket) -> None:
        self._queues.setdefault(key, deque()).append(ticket)
        self.waiting += 1
        self.questions += not ticket.slot

    def leave(self, key: LoadKey, ticket: Ticket) -> bool:
        """False: it was not waiting any more."""
        queue = self._queues.get(key)
        if queue is None:
            return False
        if queue[0] is ticket:
            queue.popleft()
        else:
            try:
                queue.remove(ticket)
            except ValueError:
                return False
        self.waiting -= 1
        self.questions -= not ticket.slot
        if not queue:
            del self._queues[key]
        return True

    def refuse(self, key: LoadKey, error: OllamaDistributedError, shape: Shape | None = None) -> None:
        """Everybody who waits for this load gets the reason; None: for any shape of the model."""
        for ticket in self.of(key):
            if shape is None or ticket.shape == shape:
                self.leave(key, ticket)
                if not ticket.future.done():
                    ticket.future.set_exception(error)
