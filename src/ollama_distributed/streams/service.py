"""The live answers of this node: the inference port that every dialect speaks to."""

from __future__ import annotations

import random
from collections.abc import Callable

import anyio

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Generation,
    InferenceRequest,
    RerankRequest,
    RerankResult,
    Sink,
)
from ollama_distributed.streams.answer import Answer
from ollama_distributed.streams.failover import Budget
from ollama_distributed.streams.gaps import LOOK_S, READING_LOOKS, Gaps
from ollama_distributed.streams.ports import Source

_REMEMBERED = 256
"""Models whose gaps are kept; all are forgotten when so many came together."""


class Answers:
    """Implements `base.inference.Inference` and `answer.Home`."""

    def __init__(
        self,
        source: Source,
        clock: Clock,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.source = source
        self.clock = clock
        self.chance = chance
        self._live: set[Answer] = set()
        self._budget = Budget()
        self._gaps: dict[str, tuple[Gaps, Gaps]] = {}
        """Of each model: between tokens, and between steps of reading a prompt."""

    def open(self, request: InferenceRequest, sink: Sink) -> Generation:
        answer = Answer(request, sink, self)
        self._live.add(answer)
        answer.begin()
        return answer

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        return await self.source.embed(request)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        return await self.source.rerank(request)

    async def count_tokens(self, request: InferenceRequest) -> int:
        return await self.source.count_tokens(request)

    # ── the watch ───────────────────────────────────────────────────────────────────

    async def watch(self) -> None:
        """Until it is cancelled: leave nodes that stalled."""
        while True:
            await anyio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """One look at every live answer; all that watching costs."""
        for answer in tuple(self._live):
            answer.look(*self._gaps_of(answer.journal.request.model))

    def _gaps_of(self, model: str) -> tuple[Gaps, Gaps]:
        found = self._gaps.get(model)
        if found is None:
            if len(self._gaps) >= _REMEMBERED:
                self._gaps.clear()
            found = self._gaps[model] = (Gaps(), Gaps(READING_LOOKS))
        return found

    # ── for answers ─────────────────────────────────────────────────────────────────

    def turn(self) -> float:
        return self._budget.take(self.clock.monotonic(), len(self._live))

    def over(self, answer: Answer) -> None:
        self._live.discard(answer)
