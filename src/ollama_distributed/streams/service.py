"""The live answers of this node: the inference port that every dialect speaks to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, Unavailable
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    InferenceRequest,
    LiveAnswer,
    RerankRequest,
    RerankResult,
    Sink,
)
from ollama_distributed.base.tokens import Written
from ollama_distributed.streams.answer import Answer
from ollama_distributed.streams.failover import Budget
from ollama_distributed.streams.gaps import LOOK_S, READING_LOOKS, Gaps
from ollama_distributed.streams.journal import Journal
from ollama_distributed.streams.kept import CutAndComplete, Kept, same
from ollama_distributed.streams.ports import Source
from ollama_distributed.streams.reattached import Reattached

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_REMEMBERED = 256
"""Models whose gaps are kept; all are forgotten when so many came together."""
PACE_S = 1.0
"""How often `paced` hears: a throttled processor is seen within seconds, and a few tokens are no speed."""
STOPPING = "this node is shutting down; another one goes on"
CUT = "this node is shutting down"


class Paced(Protocol):
    """A replica said so many tokens in answers that were spoken for so long, together."""

    def __call__(self, model: str, replica: str, tokens: int, seconds: float, /) -> None: ...


class Answers:
    """Implements `base.inference.Inference` and `answer.Home`."""

    def __init__(
        self,
        source: Source,
        clock: Clock,
        chance: Callable[[], float] = random.random,
        generated: Callable[[InferenceRequest], Written | None] = lambda _: None,
        paced: Paced = lambda _model, _replica, _tokens, _seconds: None,
        longest_s: float = 0.0,
    ) -> None:
        """`generated`: what this node generated for the same request of another gateway. `paced`: hears
        each second how fast each replica speaks. `longest_s`: that an answer may have a slot; 0: for ever."""
        self.source = source
        self.clock = clock
        self.chance = chance
        self._generated = generated
        self._paced = paced
        self._longest_s = longest_s
        self._looks = 0
        self._spoken: dict[tuple[str, str], tuple[int, int]] = {}
        """Of model and replica: tokens, and looks at answers that spoke, since `paced` heard."""
        self._live: set[Answer] = set()
        self._left = False
        """The node stops."""
        self._begun = anyio.Event()
        """An answer has begun."""
        self._kept: CutAndComplete[Journal] = CutAndComplete()
        self._handed: Kept[Written] = Kept()
        self._budget = Budget()
        self._gaps: dict[str, tuple[Gaps, Gaps]] = {}
        """Of each model: between tokens, and between steps of reading a prompt."""

    def use(self, longest_s: float) -> None:
        """From now on, of answers that run already too."""
        self._longest_s = longest_s

    def open(self, request: InferenceRequest, sink: Sink) -> LiveAnswer:
        if request.resume_at is not None:
            return Reattached(self, request, sink)
        answer = self.answer(request, sink)
        if self._left:
            answer.give_up(Unavailable(STOPPING))
        else:
            answer.begin()
        return answer

    def answer(self, request: InferenceRequest, sink: Sink) -> Answer:
        """One that is to be begun."""
        answer = Answer(request, sink, self)
        if not self._live:
            self._begun.set()
        self._live.add(answer)
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
            if not self._live:
                self._begun = anyio.Event()
                await self._begun.wait()
            await anyio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """One look at every live answer; all that watching costs."""
        for answer in tuple(self._live):
            if self._longest_s and answer.expire(self._longest_s):
                request_id = answer.journal.request.request_id
                log.warning("streams.expired", request_id=request_id, after_s=self._longest_s)
                continue
            model, replica = answer.journal.request.model, answer.replica
            tokens = answer.look(*self._gaps_of(model))
            if tokens is not None and replica is not None:
                before = self._spoken.get((model, replica), (0, 0))
                self._spoken[model, replica] = (before[0] + tokens, before[1] + 1)
        self._looks += 1
        if self._looks * LOOK_S >= PACE_S:
            spoken, self._spoken, self._looks = self._spoken, {}, 0
            for (model, replica), (tokens, looks) in spoken.items():
                self._paced(model, replica, tokens, looks * LOOK_S)

    def _gaps_of(self, model: str) -> tuple[Gaps, Gaps]:
        found = self._gaps.get(model)
        if found is None:
            if len(self._gaps) >= _REMEMBERED:
                self._gaps.clear()
            found = self._gaps[model] = (Gaps(), Gaps(READING_LOOKS))
        return found

    def move(self, away_from: Sequence[str]) -> int:
        """Let answers that these replicas make go on at other nodes, where some can; how many."""
        return sum(answer.move() for answer in tuple(self._live) if answer.replica in away_from)

    # ── re-attach ───────────────────────────────────────────────────────────────────

    def written(self, request: InferenceRequest) -> Written | None:
        """What this node has of the same request's answer. One that is alive ends here: whoever
        asks for it goes on with it."""
        for answer in self._live:
            asked = answer.journal.request
            if asked.request_id == request.request_id and same(asked, request):
                if answer.journal.resumable:
                    answer.give_up(Conflict("the answer was taken up over another connection"))
                break
        now = self.clock.monotonic()
        journal = self._kept.find(request, now)
        own = journal.written() if journal is not None else None
        return own or self._generated(request) or self._handed.find(request, now)

    def forget(self) -> None:
        """Nobody can take up again what ended by now: its memory is needed."""
        self._kept.forget()
        self._handed.forget()

    async def leave(self, hand_over_s: float) -> None:
        """This node stops: who still listens is told to take the answer up at another node, which
        has been given what was said, if that took `hand_over_s` at most; who waits for a first word,
        to ask there. Only answers that cannot be continued go on."""
        self._left = True
        leaving = [answer for answer in self._live if answer.journal.resumable]
        for answer in leaving:
            answer.halt()
        for answer in [one for one in self._live if not (one.sent or one.journal.resumable)]:
            answer.give_up(Unavailable(STOPPING))

        async def hand_over(answer: Answer) -> None:
            if (written := answer.journal.written()) is not None:
                await self.source.hand_over(answer.journal.request, written)

        with anyio.move_on_after(hand_over_s):
            async with anyio.create_task_group() as handing:
                for answer in leaving:
                    handing.start_soon(hand_over, answer)
        for answer in leaving:
            answer.give_up(Unavailable(STOPPING))

    def cut(self) -> None:
        """This node ends now: an answer that still runs ends with an error, and does not look for
        another source. Idempotent."""
        self._left = True
        for answer in tuple(self._live):
            answer.give_up(Unavailable(CUT))

    def handed(self, request: InferenceRequest, written: Written) -> None:
        """By a node that stops."""
        self._handed.keep(request, written, 40 * len(written.ids), self.clock.monotonic())

    # ── for answers ─────────────────────────────────────────────────────────────────

    def turn(self) -> float:
        return self._budget.take(self.clock.monotonic(), len(self._live))

    def over(self, answer: Answer) -> None:
        self._live.discard(answer)
        journal = answer.journal
        if journal.resumable:
            size, now = 40 * len(journal.ids), self.clock.monotonic()
            self._kept.keep(journal.request, journal, size, now, complete=answer.complete)
