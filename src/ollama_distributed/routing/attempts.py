"""One generation over the nodes of a plan: the next one when a node refuses it.

Only `Prepared` and `Progress` may have come before: nothing of the answer is out then, and
the next node's own `Prepared` starts the decoder afresh. In step with its caller, without
tasks of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import structlog

from ollama_distributed.base.errors import Internal, OllamaDistributedError, QueueFull
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import Generation, Queued
from ollama_distributed.base.paced import Paced
from ollama_distributed.base.tokens import (
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Skipped,
    SourceEvent,
    SourceSink,
    Tokens,
)
from ollama_distributed.routing.caches import Caches, Trip
from ollama_distributed.routing.plan import ELSEWHERE, most_telling

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Begin = Callable[[NodeId, SourceSink], Generation]
Noted = Callable[[NodeId, OllamaDistributedError | None], None]
"""A node answers (None), or how it failed; `health.py` is told."""


def _nobody(_node: NodeId, _error: OllamaDistributedError | None) -> None:
    """Where only one node can be asked."""


def _taken(_node: NodeId) -> None:
    """Where nobody wants to know."""


class Attempts(Paced[Generation]):
    """Implements `Generation`."""

    __slots__ = (
        "_begin",
        "_errors",
        "_left",
        "_name_of",
        "_node",
        "_noted",
        "_over",
        "_request_id",
        "_sink",
        "_spoke",
        "_taken",
        "_trip",
        "_try",
    )

    def __init__(
        self,
        order: Sequence[NodeId],
        begin: Begin,
        sink: SourceSink,
        request_id: RequestId,
        name_of: Callable[[NodeId], str] = str,
        noted: Noted = _nobody,
        trip: Trip | None = None,
        full: QueueFull | None = None,
        taken: Callable[[NodeId], None] = _taken,
    ) -> None:
        """`full`: what a node said lately that is therefore not asked. `taken`: a node has a place for it,
        or its turn came there."""
        super().__init__()
        self._begin = begin
        self._sink = sink
        self._request_id = request_id
        self._name_of = name_of
        self._noted = noted
        self._taken = taken
        self._trip = trip or Trip(Caches(), "")
        self._left = list(order)
        self._errors: list[OllamaDistributedError] = [] if full is None else [full]
        self._node = order[0]
        self._try = 0
        self._spoke = False
        self._over = False
        self._next()

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._trip.over()
            generation, self._generation = self._generation, None
            if generation is not None:
                generation.cancel()

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _next(self) -> None:
        self._node = self._left.pop(0)
        self._try = this = self._try + 1
        self._trip.to(self._node, again=this > 1)

        def hear(event: SourceEvent) -> None:
            if self._try == this and not self._over:
                self._hear(event)

        try:
            generation = self._begin(self._node, hear)
        except OllamaDistributedError as error:
            self._refused(error)
            return
        except Exception:
            log.exception("routing.defect", request_id=self._request_id, node=self._node)
            self._end(Internal("internal error; the node's log has it under the request id"))
            return
        if self._over:
            generation.cancel()
        elif self._try == this:  # else it was refused at once, and the next has begun
            self._stand_before(generation)

    def _hear(self, event: SourceEvent) -> None:
        kind = type(event)
        if kind is Tokens:
            if not self._spoke:
                self._spoke = True
                self._trip.spoke()
                self._noted(self._node, None)
        elif kind is EngineFailed:
            assert isinstance(event, EngineFailed)
            self._refused(event.error)
            return
        elif isinstance(event, Prepared):
            self._taken(self._node)
            event = msgspec.structs.replace(
                event, node=self._name_of(self._node), replica=self._node, route=self._trip.reason
            )
        elif isinstance(event, Queued):
            self._taken(self._node)
            event = msgspec.structs.replace(event, node=self._name_of(self._node))
        elif isinstance(event, Skipped):
            self._spoke = True
            self._generation = None  # it holds this: the collector, which comes seldom, has nothing to do
            event = msgspec.structs.replace(event, node=self._name_of(self._node))
            self._trip.over()
        elif isinstance(event, Progress):
            self._trip.reads(event)
        elif isinstance(event, Done):
            if not self._spoke:
                self._trip.spoke()
            self._spoke = True
            self._generation = None
            self._trip.done(event)
            self._trip.over()
        elif not self._spoke:
            self._spoke = True
            self._trip.spoke()
        self._sink(event)

    def _refused(self, error: OllamaDistributedError) -> None:
        self._generation = None
        self._noted(self._node, error)
        if self._spoke or not isinstance(error, ELSEWHERE):
            self._end(error)
            return
        self._errors.append(error)
        # Under a flood everybody is full, and a line for each would cost more than the refusal.
        say = log.debug if isinstance(error, QueueFull) else log.warning
        say(
            "routing.refused",
            request_id=self._request_id,
            node=self._node,
            reason=error.message,
            left=len(self._left),
        )
        if self._left:
            self._next()
        else:
            self._end(most_telling(self._errors))

    def _end(self, error: OllamaDistributedError) -> None:
        self._over = True
        self._trip.over()
        self._sink(EngineFailed(error))
