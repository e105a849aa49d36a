"""`ScriptedInference`: an `Inference` that says what it is told, for tests and benchmarks.

It needs no model and no engine: events come at once, or (with `hold`) when the test emits
them, and it remembers what was asked of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Event,
    InferenceRequest,
    RerankRequest,
    RerankResult,
    Sink,
    Usage,
)


class ScriptedGeneration:
    """One running answer; the test emits its events."""

    def __init__(self, request: InferenceRequest, sink: Sink) -> None:
        self.request = request
        self.cancelled = 0
        self.spent = Usage()
        """What a test says that was had of it."""
        self.paused = False
        self.pauses = 0
        self._sink = sink

    def emit(self, *events: Event) -> None:
        for event in events:
            self._sink(event)

    def cancel(self) -> None:
        self.cancelled += 1

    def used(self) -> Usage:
        return self.spent

    def pause(self) -> None:
        self.paused = True
        self.pauses += 1

    def resume(self) -> None:
        self.paused = False


class ScriptedInference:
    """Answers every request with the same events.

    `hold`: say nothing until the test calls `emit` on a generation. `error`: what `embed`,
    `rerank` and `count_tokens` raise.
    """

    def __init__(
        self,
        events: Iterable[Event] = (),
        *,
        hold: bool = False,
        embedded: EmbedResult | None = None,
        ranked: RerankResult | None = None,
        tokens: int = 0,
        error: OllamaDistributedError | None = None,
    ) -> None:
        self._events = tuple(events)
        self._hold = hold
        self._embedded = embedded or EmbedResult(vectors=())
        self._ranked = ranked or RerankResult(scores=())
        self._tokens = tokens
        self._error = error
        self.requests: list[InferenceRequest | EmbedRequest | RerankRequest] = []
        self.generations: list[ScriptedGeneration] = []

    def open(self, request: InferenceRequest, sink: Sink) -> ScriptedGeneration:
        generation = ScriptedGeneration(request, sink)
        self.requests.append(request)
        self.generations.append(generation)
        if not self._hold:
            generation.emit(*self._events)
        return generation

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        self.requests.append(request)
        self._refuse()
        return self._embedded

    async def rerank(self, request: RerankRequest) -> RerankResult:
        self.requests.append(request)
        self._refuse()
        return self._ranked

    async def count_tokens(self, request: InferenceRequest) -> int:
        self.requests.append(request)
        self._refuse()
        return self._tokens

    def _refuse(self) -> None:
        if self._error is not None:
            raise self._error
