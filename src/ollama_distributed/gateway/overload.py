"""What a node gives up, one step after the other, while its own memory runs short. Pure.

Who measures says how much there is (`node/memory.py`); the way of a request only reads flags. First go
connections that are kept for later, then new work, at last what is kept for clients that may come back:
the steps of Envoy's overload manager.
"""

from __future__ import annotations

import enum
from collections import Counter

import msgspec

from ollama_distributed.base.errors import Overloaded


class Step(enum.IntEnum):
    """Each has those before it."""

    NONE = 0
    CLOSING = 1
    """A connection ends with its answer, one without a request at once."""
    REFUSING = 2
    """No new inference, neither for clients nor for other nodes; `/readyz` says so."""
    DROPPING = 3
    """Answers kept for re-attach are gone, and other machines get no new connections."""


BEGINS = {Step.DROPPING: 0.95, Step.REFUSING: 0.90, Step.CLOSING: 0.80}
"""At these shares of the bound. An answer that runs hardly grows; what is refused at 0.9 is what would
have made it 1."""
CALM = 0.05
"""So far below its beginning a step ends: else it would begin and end with every request."""
RETRY_S = 2.0
"""Memory is free again when some answers have ended."""


def step_of(share: float, before: Step) -> Step:
    """Where a node is that uses such a share of its bound, and was at `before`."""
    for step, begins in BEGINS.items():
        if share >= begins - (CALM if before >= step else 0.0):
            return step
    return Step.NONE


class MemoryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of this node's own process, for `/metrics`."""

    used_bytes: int = 0
    bound_bytes: int = 0
    step: Step = Step.NONE
    begun: dict[Step, int] = {}
    """How often each step began."""
    refused: int = 0
    """Requests."""


class Overload:
    """Flags that a request reads; one per node."""

    def __init__(self) -> None:
        self.step = Step.NONE
        self.closing = self.refusing = self.dropping = False
        self._used_bytes = self._bound_bytes = 0
        self._begun: Counter[Step] = Counter()
        self._refused = 0

    def measured(self, used_bytes: int, bound_bytes: int) -> bool:
        """Whether that made it another step."""
        self._used_bytes, self._bound_bytes = used_bytes, bound_bytes
        before, self.step = self.step, step_of(used_bytes / bound_bytes, self.step)
        for step in Step:
            self._begun[step] += before < step <= self.step
        self.closing = self.step >= Step.CLOSING
        self.refusing = self.step >= Step.REFUSING
        self.dropping = self.step >= Step.DROPPING
        return self.step is not before

    @property
    def told(self) -> str:
        """The step's name; empty: none."""
        return self.step.name.lower() if self.closing else ""

    def refuse(self) -> Overloaded:
        """The answer to one more request."""
        self._refused += 1
        return Overloaded(
            "this node is short of memory; try again, or at another node", retry_after_s=RETRY_S
        )

    def figures(self) -> MemoryFigures:
        return MemoryFigures(
            used_bytes=self._used_bytes,
            bound_bytes=self._bound_bytes,
            step=self.step,
            begun={step: self._begun[step] for step in BEGINS},
            refused=self._refused,
        )
