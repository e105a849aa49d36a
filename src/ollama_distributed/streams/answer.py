"""One answer between a source of tokens and a dialect's sink.

It decodes, counts, measures, ends at stop sequences, turns every failure into one last event,
and goes on with another source when its own is lost (`sourcing.py`): the decoder's state and the
ids of all tokens are here, never at the source (migration rules R1 and R3). Called on the event
loop, without tasks of its own.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import structlog

from ollama_distributed.base.errors import (
    DeadlineExceeded,
    EngineError,
    Internal,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.base.inference import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    InferenceRequest,
    Moved,
    Opened,
    Queued,
    Sink,
    Usage,
)
from ollama_distributed.base.tokens import (
    ChatDelta,
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    Tokens,
    Written,
    counted,
    plausible,
)
from ollama_distributed.streams import sourcing
from ollama_distributed.streams.account import Account
from ollama_distributed.streams.decoder import Decoder, DecoderRules
from ollama_distributed.streams.gaps import Gaps
from ollama_distributed.streams.journal import Journal
from ollama_distributed.streams.sourcing import DRAINS, STALLED, Next, Sourcing
from ollama_distributed.streams.whole import Whole

log = structlog.get_logger(__name__)


_IDLE = Decoder(DecoderRules())
"""Of answers that were told nothing to decode yet. It is never fed."""


def most_said(wanted: int) -> int:
    """Tokens after which a source that was asked for `wanted` is cut off. A grammar after thoughts makes
    two answers of one, and some servers send a token in pieces."""
    return 4 * wanted + 256


class Home(sourcing.Home, Protocol):
    """What an answer needs of the node's `Answers`."""

    def over(self, answer: Answer) -> None:
        """Its last event is out, or it was cancelled."""
        ...


class Answer:
    """Implements `Generation`."""

    __slots__ = (
        "_account",
        "_clock",
        "_decoder",
        "_ended_at",
        "_home",
        "_new",
        "_node",
        "_opened",
        "_out",
        "_over",
        "_route",
        "_signs",
        "_sink",
        "_sources",
        "_whole",
        "_written",
        "journal",
        "sent",
    )

    def __init__(self, request: InferenceRequest, sink: Sink, home: Home) -> None:
        self.journal = Journal(request)
        self._home = home
        self._clock = home.clock
        self._out = self._sink = sink
        """`_sink` is that of `_whole`, where there is one."""
        self._whole: Whole | None = None
        self._decoder = _IDLE
        self._account = Account(self._clock.monotonic())
        self._sources = Sourcing(home, self.journal)
        self._new = True
        """The source at work has said no word yet."""
        self._signs = 0
        """Of life, that were no tokens."""
        self._node = self._route = ""
        self._opened = False
        self.sent = False
        """The client has a part of it."""
        self._over = False
        self._ended_at = 0.0
        self._written: Written | None = None
        """What is taken up, until a source goes on with it."""

    def begin(self) -> None:
        self._ask(None)

    def take_up(self, written: Written) -> None:
        """Begin with what was said already, and go on where it ended."""
        self._decode_by(written.prepared)
        self.journal.take(written)
        self._account.had = len(written.ids)
        self._account.prepared_s = self._clock.monotonic()
        self._account.prompt_tokens = written.done.prompt_tokens if written.done is not None else 0
        if written.done is not None:
            self._catch_up(written)
            self.hear(written.done)
        elif written.ids:
            self._written = written
            self._account.before = len(written.ids)
            self._account.first_s = self._account.prepared_s
            self._ask(self.journal.resume())
        else:
            self._ask(None)

    def _catch_up(self, written: Written) -> None:
        self._written = None
        self._account.first_s = self._clock.monotonic()
        self.sent = True
        self._open()
        delta = self._decoder.feed(Tokens(written.ids, "", (), written.said))
        if delta is not None and not self._over:
            self._sink(delta)
        if self._decoder.stopped is not None and not self._over:
            self._finish("stop", None)

    def _ask(self, resume: Resume | None) -> None:
        try:
            self._sources.ask(resume, self.hear)
        except Exception as exc:
            self._defect(exc)

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if not self._over:
            self._close()

    def halt(self) -> None:
        """Take no more tokens; its last event is still to come."""
        self._sources.stop()

    def used(self) -> Usage:
        now = self._ended_at or self._clock.monotonic()
        return self._account.spent(self._account.usage(now, self._decoder, self.journal.done))

    @property
    def replica(self) -> str | None:
        """That makes it now; None: not known, or there is none."""
        return self._sources.replica

    def move(self) -> bool:
        """Leave the source, which drains, for another one, if there is one; whether it does."""
        if self._over or not self._sources.can_move(sent=self.sent):
            return False
        self._sources.stop()
        self._lost(Unavailable(DRAINS), leaves=True)
        return True

    @property
    def complete(self) -> bool:
        """All of it was said, though perhaps not heard."""
        return self.journal.done is not None or self._decoder.stopped is not None

    def give_up(self, error: OllamaDistributedError) -> None:
        """End it with an error: somebody else takes it up."""
        self._end(Failed(error))

    def pause(self) -> None:
        self._sources.pause()

    def resume(self) -> None:
        self._sources.resume()

    # ── events of the source ────────────────────────────────────────────────────────

    def hear(self, event: SourceEvent) -> None:
        """Take one event. A defect, here or in the client's sink, ends this answer only."""
        if self._over:
            return
        try:
            # Tokens first: nearly all events are.
            if type(event) is not Tokens:
                self._other(event)
                return
            if self._new:
                self._first_word()
            self.journal.emitted(event)
            decoder = self._decoder
            delta = decoder.feed(event)
            if delta is not None and not self._over:
                self._sink(delta)
            if decoder.stopped is not None and not self._over:
                self._finish("stop", None)
        except Exception as exc:
            self._defect(exc)

    def _other(self, event: SourceEvent) -> None:
        match event:
            case ChatDelta():
                self._chat_delta(event)
            case Prepared():
                self._prepare(event)
            case Progress(total, _, cached):
                self._signs += 1
                if not self._account.before:
                    self._account.prompt_tokens = counted(total)
                    self._account.cached_tokens = min(counted(cached), self._account.prompt_tokens)
                    self._open()
            case Done():
                self._sources.ended()
                self._done(event)
            case Skipped():
                self._sources.ended()
                self._skip(event)
            case Queued():
                if not self._opened:
                    self._out(event)
            case EngineFailed(error):
                self._lost(error)
            case Tokens():
                self.hear(event)

    def _prepare(self, event: Prepared) -> None:
        """Comes from each source, and again from one while no token came."""
        self._node, self._route, self._sources.replica = event.node, event.route, event.replica
        before = self._account.before
        if before and (event.after, event.model_digest) != (before, self.journal.model_digest):
            # It would say again what was said: a version that does not know how to continue.
            self._sources.stop()
            self._lost(Unavailable("a node did not go on where the answer was"))
            return
        if before:
            if self._written is not None:
                self._catch_up(self._written)
            return
        self._decode_by(event)
        self._account.load_s, self._account.wait_s = event.load_s, event.wait_s
        self._account.prepared_s = self._clock.monotonic()
        self.journal.opened(event)
        if self.journal.request.whole:
            if self._whole is None:
                self._whole = Whole(self._out)
                self._sink = self._whole.hear
            self._whole.begin(holds=not event.resumable)

    def _decode_by(self, prepared: Prepared) -> None:
        rules = DecoderRules(
            stop=prepared.stop,
            thinking_tags=prepared.thinking_tags,
            starts_in_thinking=prepared.starts_in_thinking,
        )
        self._decoder = Decoder(rules)

    def _chat_delta(self, event: ChatDelta) -> None:
        """Already taken apart by the engine; only stop sequences are ours."""
        if self._new:
            self._first_word()
        self._signs += 1
        self.journal.broken()
        text, logprobs = event.text, event.logprobs
        if event.text or event.logprobs:
            decoded = self._decoder.feed(Tokens((), event.text, event.logprobs))
            self._decoder.completion_tokens += event.pieces - 1
            text, logprobs = (decoded.text, decoded.logprobs) if decoded is not None else ("", ())
        if (text or logprobs or event.thinking or event.tool_calls) and not self._over:
            self._sink(
                Delta(text=text, thinking=event.thinking, tool_calls=event.tool_calls, logprobs=logprobs)
            )
        if self._decoder.stopped is not None and not self._over:
            self._finish("stop", None)

    def _done(self, event: Done) -> None:
        if self._sources.searching:
            self._went_on()
        event = plausible(event)
        self.journal.done = event
        self._say_rest(event.reason, event)

    def _say_rest(self, reason: FinishReason, done: Done | None) -> None:
        self._open()
        rest = self._decoder.finish()
        if rest is not None and not self._over:
            self._sink(rest)
        if not self._over:
            self._finish(reason, done)

    def _skip(self, event: Skipped) -> None:
        self._opened = True
        self._out(Opened(node=event.node))
        if self._over:
            return
        self._end(self._account.skipped(event, self._clock.monotonic()))

    def _first_word(self) -> None:
        """Of the source at work."""
        self._new = False
        if self._decoder is _IDLE:
            self._decoder = Decoder(DecoderRules())
        if self._sources.searching:
            self._went_on()
        if not self._account.first_s:
            self._account.first_s = self._clock.monotonic()
            self.sent = self._whole is None or not self._whole.holds
        self._open()

    def _open(self) -> None:
        if not self._opened and not self._over:
            self._opened = True
            prompt_tokens = self._account.prompt_tokens or len(self.journal.prompt_ids)
            self._out(Opened(prompt_tokens=prompt_tokens, node=self._node, route=self._route))

    # ── another source ──────────────────────────────────────────────────────────────

    def _lost(self, error: OllamaDistributedError, *, stalled: bool = False, leaves: bool = False) -> None:
        """Go on elsewhere, or end. `leaves`: it was the answer that left."""
        account = self._account
        began = account.first_s > 0.0 or stalled or leaves
        step = self._sources.lost(error, began=began, sent=self.sent, stalled=stalled)
        if not isinstance(step, Next):
            self._end(Failed(step))
            return
        self._new = True
        account.before = len(step.resume.ids)
        if not step.resume.ids:
            account.first_s = 0.0
        self._sources.go_on(step, self._ask)

    def _went_on(self) -> None:
        self._sources.went_on(self._account.before)
        if self._opened and not self._over:
            self._out(Moved(node=self._node))

    def look(self, speaking: Gaps, reading: Gaps) -> int | None:
        """Every `LOOK_S`: leave a source that stalled, or that does not end where it was told to. Tokens
        since the look before, if it speaks."""
        wanted = self.journal.request.sampling.num_predict
        if wanted is not None and wanted >= 0 and self._decoder.completion_tokens > most_said(wanted):
            self._end(Failed(EngineError(f"the engine went on after {wanted} tokens; it was cut off")))
            return None
        told = self._signs + self._decoder.completion_tokens
        if self._sources.stalled(told, speaking, reading, speaks=not self._new, sent=self.sent):
            self._lost(Unavailable(STALLED), stalled=True)
        return self._sources.spoken

    def expire(self, longest_s: float) -> bool:
        """Every `LOOK_S`: end it if a source has been at work for so long; whether it did. What was said
        is then the answer, as if it had reached its length: an error would have clients ask again."""
        account = self._account
        if not account.prepared_s or self._clock.monotonic() - account.prepared_s < longest_s:
            return False
        self._sources.stop()
        if not account.first_s:
            self._end(Failed(DeadlineExceeded(f"the model said no word within {longest_s:g} s")))
            return True
        self.journal.done = account.done(self._decoder)
        try:
            self._say_rest("length", None)
        except Exception as exc:
            self._defect(exc)
        return True

    # ── the end ─────────────────────────────────────────────────────────────────────

    def _finish(self, reason: FinishReason, done: Done | None) -> None:
        journal = self.journal
        usage = self._account.usage(self._clock.monotonic(), self._decoder, done)
        if not usage.prompt_tokens:
            usage = msgspec.structs.replace(usage, prompt_tokens=len(journal.prompt_ids))
        for event in self._whole.held if self._whole is not None else ():
            if not self._over:
                self._out(event)
        self._end(
            Finished(
                reason=reason,
                usage=usage,
                stop_sequence=self._decoder.stopped,
                context=journal.context,
                moves=self._sources.moves,
                spent=self._account.spent(usage) if self._account.had is not None else None,
            )
        )

    def _end(self, event: Event) -> None:
        if not self._over:
            self._close()
            self._out(event)

    def _close(self) -> None:
        self._over, self._ended_at = True, self._clock.monotonic()
        self._sources.stop()
        self._home.over(self)

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
        if not over:
            try:
                self._out(Failed(error))
            except Exception:
                log.exception("streams.sink_defect", request_id=self.journal.request.request_id)
