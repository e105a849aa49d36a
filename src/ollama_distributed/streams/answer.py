"""One answer between a source of tokens and a dialect's sink.

It decodes, counts, measures, ends at stop sequences, turns every failure into one last event,
and goes on with another source when its own is lost (`failover.py` decides): the decoder's
state and the ids of all tokens are here, never at the source (migration rules R1 and R3).
Called on the event loop, without tasks of its own.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Internal, OllamaDistributedError, RunnerDied, Unavailable
from ollama_distributed.base.inference import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Generation,
    InferenceRequest,
    Moved,
    Opened,
    Sink,
    Usage,
)
from ollama_distributed.base.tokens import (
    ChatDelta,
    Done,
    EngineFailed,
    Left,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    Tokens,
)
from ollama_distributed.streams.decoder import Decoder, DecoderRules
from ollama_distributed.streams.failover import Stand, wait_before
from ollama_distributed.streams.gaps import Gaps
from ollama_distributed.streams.journal import Journal
from ollama_distributed.streams.ports import Source

log = structlog.get_logger(__name__)

MOST_STALLS = 3
"""Of one answer: a model that is slow everywhere is not moved round and round."""
ASK_AGAIN_LOOKS = 4
"""A stalled answer that has nowhere to go looks for a place once a second."""


class Home(Protocol):
    """What an answer needs of the node's `Answers`."""

    clock: Clock
    source: Source

    def turn(self) -> float:
        """Seconds until one more continuation may begin."""
        ...

    def chance(self) -> float:
        """0..1"""
        ...

    def over(self, answer: Answer) -> None:
        """Its last event is out, or it was cancelled."""
        ...


class Answer:
    """Implements `Generation`."""

    __slots__ = (
        "_asked",
        "_cached_tokens",
        "_clock",
        "_continued",
        "_deaths",
        "_decoder",
        "_first_s",
        "_generation",
        "_held",
        "_home",
        "_left",
        "_load_s",
        "_lost_s",
        "_moves",
        "_node",
        "_opened",
        "_out",
        "_over",
        "_paused",
        "_prepared_s",
        "_prompt_tokens",
        "_quiet",
        "_replica",
        "_sent",
        "_signs",
        "_sink",
        "_stalls",
        "_speaks",
        "_started_s",
        "_timer",
        "_told",
        "_tries",
        "_why",
        "journal",
    )

    def __init__(self, request: InferenceRequest, sink: Sink, home: Home) -> None:
        self.journal = Journal(request)
        self._home = home
        self._clock = home.clock
        self._out = self._sink = sink
        """Where events go; `_sink` is a list while the answer may still begin again (`_held`)."""
        self._held: list[Event] = []
        self._decoder = Decoder(DecoderRules())
        self._generation: Generation | None = None
        self._started_s = self._clock.monotonic()
        self._load_s = 0.0
        self._prepared_s = 0.0
        self._first_s = 0.0
        """When the first token came; 0: not yet."""
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._node = ""
        self._replica: str | None = None
        """Of the source that is at work; None: it has not said."""
        self._opened = False
        self._sent = False
        """The client has a part of it."""
        self._paused = False
        self._over = False
        self._asked = 0
        """Sources asked so far: a number for the one at work."""
        self._tries = 0
        self._moves = 0
        self._deaths = 0
        self._stalls = 0
        self._continued = 0
        """Tokens that came from sources before the one at work."""
        self._left: tuple[Left, ...] = ()
        self._lost_s = 0.0
        self._why: OllamaDistributedError = Unavailable()
        """How its last source was lost."""
        self._timer: asyncio.TimerHandle | None = None
        self._signs = 0
        """Signs of life that were no token."""
        self._told = 0
        """Signs and tokens at the watch's last look."""
        self._quiet = 0
        """Its looks since the last of them."""
        self._speaks = False
        """At its last look tokens had begun to come: it has less time than one that reads."""

    def begin(self) -> None:
        self._ask(None)

    def _ask(self, resume: Resume | None) -> None:
        self._timer = None
        self._asked += 1
        this = self._asked
        try:
            generation = self._home.source.start(self.journal.request, self.hear, resume)
        except Exception as exc:
            self._defect(exc)
            return
        if self._over or self._asked != this:
            # It ended, was cancelled or was lost before the source had returned the handle.
            generation.cancel()
            return
        self._generation = generation
        if self._paused:
            generation.pause()

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if not self._over:
            self._close()
            self._stop_source()

    def pause(self) -> None:
        self._paused = True
        if self._generation is not None and not self._over:
            self._generation.pause()

    def resume(self) -> None:
        self._paused = False
        if self._generation is not None and not self._over:
            self._generation.resume()

    # ── events of the source ────────────────────────────────────────────────────────

    def hear(self, event: SourceEvent) -> None:
        """Take one event. A defect, here or in the client's sink, ends this answer only."""
        if self._over:
            return
        try:
            # Tokens first: nearly all events are.
            if type(event) is Tokens:
                self._tokens(event)
            else:
                self._other(event)
        except Exception as exc:
            self._defect(exc)

    def _tokens(self, event: Tokens) -> None:
        if self._tries or not self._first_s:
            self._first_token()
        self.journal.emitted(event.ids, event.text)
        delta = self._decoder.feed(event)
        if delta is not None and not self._over:
            self._sink(delta)
        if self._decoder.stopped is not None and not self._over:
            self._stop_source()
            self._finish("stop", self._usage(None))

    def _other(self, event: SourceEvent) -> None:
        match event:
            case ChatDelta():
                self._chat_delta(event)
            case Prepared():
                self._prepare(event)
            case Progress(total, _, cached):
                self._signs += 1
                if not self._continued:
                    self._prompt_tokens, self._cached_tokens = total, cached
                    self._open()
            case Done():
                self._done(event)
            case Skipped():
                self._skip(event)
            case EngineFailed(error):
                self._lost(error)
            case Tokens():
                self._tokens(event)

    def _prepare(self, event: Prepared) -> None:
        """The decoder's rules; comes again from each source, and from one while no token came."""
        self._replica = event.replica
        if self._continued:
            if (event.after, event.model_digest) != (self._continued, self.journal.model_digest):
                # It would say again what was said: a version that does not know how to continue.
                self._stop_source()
                self._lost(Unavailable("a node did not go on where the answer was"))
                return
            self._node = event.node
            return
        self._decoder = Decoder(
            DecoderRules(
                stop=event.stop,
                thinking_tags=event.thinking_tags,
                starts_in_thinking=event.starts_in_thinking,
            )
        )
        self._load_s = event.load_s
        self._node = event.node
        self._prepared_s = self._clock.monotonic()
        self.journal.opened(event)
        if self.journal.request.whole and not event.resumable:
            # Until it is complete nobody sees it, and so it may begin again (R2).
            self._held.clear()
            self._sink = self._held.append

    def _chat_delta(self, event: ChatDelta) -> None:
        """Already taken apart by the engine; only stop sequences are ours."""
        if self._tries or not self._first_s:
            self._first_token()
        self._signs += 1
        self.journal.emitted((), "chat")
        text, logprobs = event.text, event.logprobs
        if event.text or event.logprobs:
            decoded = self._decoder.feed(Tokens((), event.text, event.logprobs))
            text, logprobs = (decoded.text, decoded.logprobs) if decoded is not None else ("", ())
        if (text or logprobs or event.thinking or event.tool_calls) and not self._over:
            self._sink(
                Delta(text=text, thinking=event.thinking, tool_calls=event.tool_calls, logprobs=logprobs)
            )
        if self._decoder.stopped is not None and not self._over:
            self._stop_source()
            self._finish("stop", self._usage(None))

    def _done(self, event: Done) -> None:
        if self._tries:
            self._went_on()
        self._open()
        rest = self._decoder.finish()
        if rest is not None and not self._over:
            self._sink(rest)
        if not self._over:
            self._finish(event.reason, self._usage(event))

    def _skip(self, event: Skipped) -> None:
        self._opened = True
        self._sink(Opened(node=event.node))
        if self._over:
            return
        total_s = self._clock.monotonic() - self._started_s
        self._end(
            Finished(
                reason=event.reason,
                usage=Usage(load_s=event.load_s, total_s=total_s),
                rendered=event.rendered,
                rendered_images=event.rendered_images,
            )
        )

    # ── another source ──────────────────────────────────────────────────────────────

    def _lost(self, error: OllamaDistributedError, *, stalled: bool = False) -> None:
        """Go on elsewhere, or end."""
        self._generation = None
        self._asked += 1
        now = self._clock.monotonic()
        if not self._tries:
            self._lost_s, self._why = now, error
        wait_s = wait_before(error, self._stand(now, stalled=stalled), self._home.chance())
        if wait_s is None:
            # What the client lost, rather than why nobody else took it.
            self._end(Failed(self._why if self._tries else error))
            return
        log.warning(
            "streams.lost",
            request_id=self.journal.request.request_id,
            node=self._replica,
            tokens=len(self.journal.ids),
            code=error.code,
            reason=error.message,
            tries=self._tries,
        )
        self._deaths += isinstance(error, RunnerDied)
        if self._replica is not None:
            self._left = (*(Left(one.replica) for one in self._left), Left(self._replica, stalled))
            self._replica = None
        self._quiet, self._speaks = 0, False
        self._tries += 1
        resume = self.journal.resume(self._left, self._deaths)
        self._continued = len(resume.ids)
        if not resume.ids:
            self._first_s = 0.0
        wait_s = max(wait_s, self._home.turn())
        if wait_s:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._ask, resume)
        else:
            self._ask(resume)

    def _stand(self, now: float, *, stalled: bool) -> Stand:
        return Stand(
            began=self._first_s > 0.0 or stalled,
            sent=self._sent,
            resumable=self.journal.resumable,
            moves=self._moves,
            tries=self._tries,
            deaths=self._deaths,
            lost_s=now - self._lost_s if self._tries else 0.0,
        )

    def _went_on(self) -> None:
        """The first sign of a new source that it does."""
        self._tries = 0
        self._moves += 1
        log.info(
            "streams.went_on",
            request_id=self.journal.request.request_id,
            node=self._replica,
            tokens=self._continued,
            took_s=round(self._clock.monotonic() - self._lost_s, 3),
        )
        if self._opened and not self._over:
            self._sink(Moved(node=self._node))

    # ── the watch ───────────────────────────────────────────────────────────────────

    def look(self, speaking: Gaps, reading: Gaps) -> None:
        """Every `LOOK_S`: leave a source that stalled. A client that reads slowly is no stall."""
        told = self._signs + self._decoder.completion_tokens
        passed, self._told = told - self._told, told
        if self._over or self._paused or self._generation is None or not (told or self._continued):
            self._quiet = 0
            return
        gaps = speaking if self._speaks else reading
        if passed > 0:
            gaps.passed(passed, self._quiet)
            self._quiet = 0
            self._speaks = self._first_s > 0.0 and not self._tries
            return
        self._quiet += 1
        late = self._quiet - gaps.limit
        if late >= 0 and late % ASK_AGAIN_LOOKS == 0 and self._stalls < MOST_STALLS:
            self._leave(gaps)

    def _leave(self, gaps: Gaps) -> None:
        error = Unavailable("the node that answered said nothing any more")
        now = self._clock.monotonic()
        if self._replica is None or wait_before(error, self._stand(now, stalled=True)) is None:
            return
        left = (*self._left, Left(self._replica, stalled=True))
        if not self._home.source.elsewhere(self.journal.request, self.journal.resume(left, self._deaths)):
            return
        gaps.passed(1, self._quiet)
        self._stalls += 1
        self._stop_source()
        self._lost(error, stalled=True)

    # ── the parts of an end ─────────────────────────────────────────────────────────

    def _first_token(self) -> None:
        if self._tries:
            self._went_on()
        if not self._first_s:
            self._first_s = self._clock.monotonic()
            self._sent = self._sink is self._out
        self._open()

    def _open(self) -> None:
        if not self._opened and not self._over:
            self._opened = True
            prompt_tokens = self._prompt_tokens or len(self.journal.prompt_ids)
            self._out(Opened(prompt_tokens=prompt_tokens, node=self._node))

    def _usage(self, done: Done | None) -> Usage:
        """The engine's counts and times where it says them, else what was seen from here."""
        now = self._clock.monotonic()
        seen, before = self._decoder, self._continued
        first = self._first_s or now
        prompt_tokens = self._prompt_tokens or len(self.journal.prompt_ids)
        completion_tokens, cached_tokens = seen.completion_tokens, self._cached_tokens
        prompt_s, completion_s = first - (self._prepared_s or self._started_s), now - first
        if done is not None and before:
            # To this source a part of the answer was prompt.
            prompt_tokens = prompt_tokens or max(done.prompt_tokens - before, 0)
            completion_tokens = before + done.completion_tokens
        elif done is not None:
            prompt_tokens = done.prompt_tokens or prompt_tokens
            cached_tokens = done.cached_tokens or cached_tokens
            completion_tokens = done.completion_tokens or completion_tokens
            prompt_s, completion_s = done.prompt_s or prompt_s, done.completion_s or completion_s
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            reasoning_tokens=seen.reasoning_tokens,
            total_s=now - self._started_s,
            load_s=self._load_s,
            prompt_s=prompt_s,
            completion_s=completion_s,
        )

    def _finish(self, reason: FinishReason, usage: Usage) -> None:
        context: tuple[int, ...] = ()
        journal = self.journal
        if journal.request.want_context and journal.prompt_ids and journal.complete:
            context = (*journal.prompt_ids, *journal.ids)
        held, self._sink = self._held, self._out
        for event in held:
            if not self._over:
                self._out(event)
        self._end(
            Finished(
                reason=reason,
                usage=usage,
                stop_sequence=self._decoder.stopped,
                context=context,
                moves=self._moves,
            )
        )

    def _end(self, event: Event) -> None:
        if not self._over:
            self._close()
            self._out(event)

    def _close(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._home.over(self)

    def _stop_source(self) -> None:
        if self._generation is not None:
            self._generation.cancel()

    def _defect(self, exc: Exception) -> None:
        """Ours, not the caller's: the log has it whole, the client is told where to look."""
        over = self._over
        self._close()
        if isinstance(exc, OllamaDistributedError):
            error = exc
        else:
            request_id = self.journal.request.request_id
            log.error("streams.defect", request_id=request_id, exc_info=exc)
            error = Internal(f"internal error; the node's log has it under request {request_id}")
        self._stop_source()
        if not over:
            try:
                self._out(Failed(error))
            except Exception:
                log.exception("streams.sink_defect", request_id=self.journal.request.request_id)
