"""Requests that wait for a runner.

`Waiting` is what the fleet needs of a queue; `admission.service.Admission` is the node's. `Fifo` is
the simplest that does: first come, first served per model, of a `Serving` that was given no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

from ollama_distributed.base.errors import DeadlineExceeded, OllamaDistributedError, QueueFull
from ollama_distributed.base.inference import Queued
from ollama_distributed.base.queue import Ask, Run
from ollama_distributed.serving.options import Shape
from ollama_distributed.serving.residents import LoadKey, Order, Ticket

BUSY = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's text, two spaces and all: clients match on it."""


class Waiting(Protocol):
    """Who waits for which load; the loads where somebody does are iterated over."""

    @property
    def waiting(self) -> int:
        """Tickets of all loads."""
        ...

    def __contains__(self, key: LoadKey, /) -> bool: ...

    def __iter__(self) -> Iterator[LoadKey]: ...

    def of(self, key: LoadKey) -> tuple[Ticket, ...]: ...

    def questions(self, key: LoadKey) -> int:
        """Of them, those that need no slot."""
        ...

    def first(self, key: LoadKey, before: Order | None = None) -> Ticket | None:
        """Whose turn it is, of those whose order is below `before`. Somebody must wait."""
        ...

    def order(self, key: LoadKey) -> Order:
        """Among the loads: lower is served earlier. Somebody must wait."""
        ...

    def order_of(self, key: LoadKey, ticket: Ticket, /) -> Order: ...

    def join(self, key: LoadKey, ticket: Ticket, /) -> Queued:
        """Where it stands. Another may be refused in its place.

        Raises:
            QueueFull: as many wait as may, or its turn would come too late.
        """
        ...

    def leave(self, key: LoadKey, ticket: Ticket, /) -> bool:
        """Without its turn. False: it was not waiting any more."""
        ...

    def grant(self, key: LoadKey, ticket: Ticket, /) -> None:
        """Its turn has come: it leaves."""
        ...

    def place(self, key: LoadKey, ticket: Ticket, /) -> Queued:
        """Where it stands now. It must wait."""
        ...

    def expired(self, key: LoadKey, ticket: Ticket, error: DeadlineExceeded, /) -> None:
        """It waited for as long as it may: it leaves, and is told."""
        ...

    def began(self, key: LoadKey, ask: Ask, slots: int) -> Run:
        """A request has one of so many slots."""
        ...

    def ended(self, run: Run) -> None:
        """It has given its slot back. Idempotent."""
        ...


class Fifo:
    """Implements `Waiting`."""

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._queues: dict[LoadKey, deque[Ticket]] = {}
        """None of them is empty."""
        self.waiting = 0

    def __contains__(self, key: LoadKey) -> bool:
        return key in self._queues

    def __iter__(self) -> Iterator[LoadKey]:
        return iter(tuple(self._queues))

    def of(self, key: LoadKey) -> tuple[Ticket, ...]:
        return tuple(self._queues.get(key, ()))

    def questions(self, key: LoadKey) -> int:
        return sum(not ticket.slot for ticket in self._queues.get(key, ()))

    def first(self, key: LoadKey, before: Order | None = None) -> Ticket | None:
        first = self._queues[key][0]
        return first if before is None or self.order_of(key, first) < before else None

    def order(self, key: LoadKey) -> Order:
        return self.order_of(key, self._queues[key][0])

    def order_of(self, key: LoadKey, ticket: Ticket) -> Order:  # noqa: ARG002  # `Waiting`'s
        return 0, ticket.number

    def join(self, key: LoadKey, ticket: Ticket) -> Queued:
        if self.waiting >= self._most:
            raise QueueFull(BUSY)
        self._queues.setdefault(key, deque()).append(ticket)
        self.waiting += 1
        return self.place(key, ticket)

    def leave(self, key: LoadKey, ticket: Ticket) -> bool:
        queue = self._queues.get(key)
        if queue is None:
            return False
        try:
            queue.remove(ticket)
        except ValueError:
            return False
        self.waiting -= 1
        if not queue:
            del self._queues[key]
        return True

    def grant(self, key: LoadKey, ticket: Ticket) -> None:
        self.leave(key, ticket)

    def place(self, key: LoadKey, ticket: Ticket) -> Queued:
        return Queued(position=self._queues[key].index(ticket) + 1)

    def expired(self, key: LoadKey, ticket: Ticket, error: DeadlineExceeded) -> None:
        self.leave(key, ticket)
        ticket.refuse(error)

    def began(self, key: LoadKey, ask: Ask, slots: int) -> Run:  # noqa: ARG002  # `Waiting`'s
        return Run(key, ask.key, 0.0, 0.0)

    def ended(self, run: Run) -> None:
        """Nothing is measured."""


def refuse(waiting: Waiting, key: LoadKey, error: OllamaDistributedError, shape: Shape | None = None) -> None:
    """Everybody who waits for this load gets the reason; None: for any shape of the model."""
    for ticket in waiting.of(key):
        if shape is None or ticket.shape == shape:
            waiting.leave(key, ticket)
            ticket.refuse(error)
