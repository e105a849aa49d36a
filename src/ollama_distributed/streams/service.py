"""Makes answers of generated tokens: the inference port that every dialect speaks to.

An `Answer` sits between a source of tokens and a dialect's sink: it decodes, counts,
measures, ends at stop sequences and turns every failure into one last event. Called on the
event loop, without tasks of its own.
"""

from __future__ import annotations

import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Internal, OllamaDistributedError
from ollama_distributed.base.inference import (
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    Failed,
    Finished,
    FinishReason,
    Generation,
    InferenceRequest,
    Opened,
    RerankRequest,
    RerankResult,
    Sink,
    Usage,
)
from ollama_distributed.base.tokens import (
    ChatDelta,
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Skipped,
    SourceEvent,
    Tokens,
)
from ollama_distributed.streams.decoder import Decoder, DecoderRules
from ollama_distributed.streams.journal import Journal
from ollama_distributed.streams.ports import Source

log = structlog.get_logger(__name__)


class Answers:
    """Implements `base.inference.Inference`."""

    def __init__(self, source: Source, clock: Clock) -> None:
        self._source = source
        self._clock = clock

    def open(self, request: InferenceRequest, sink: Sink) -> Generation:
        answer = Answer(request, sink, self._clock)
        answer.begin(self._source)
        return answer

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        return await self._source.embed(request)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        return await self._source.rerank(request)

    async def count_tokens(self, request: InferenceRequest) -> int:
        return await self._source.count_tokens(request)


class Answer:
    """One answer on its way to a client. Implements `Generation`."""

    __slots__ = (
        "_cached_tokens",
        "_clock",
        "_decoder",
        "_first_s",
        "_generation",
        "_load_s",
        "_node",
        "_opened",
        "_over",
        "_prepared_s",
        "_prompt_ids",
        "_prompt_tokens",
        "_sink",
        "_started_s",
        "journal",
    )

    def __init__(self, request: InferenceRequest, sink: Sink, clock: Clock) -> None:
        self.journal = Journal(request)
        self._sink = sink
        self._clock = clock
        self._decoder = Decoder(DecoderRules())
        self._generation: Generation | None = None
        self._started_s = clock.monotonic()
        self._load_s = 0.0
        self._prepared_s = 0.0
        self._first_s = 0.0
        """When the first token came; 0: not yet."""
        self._prompt_ids: tuple[int, ...] = ()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._node = ""
        self._opened = False
        self._over = False

    def begin(self, source: Source) -> None:
        try:
            self._generation = source.start(self.journal.request, self.hear)
        except Exception as exc:
            self._defect(exc)
            return
        if self._over:
            # It ended, or was cancelled, before the source had returned the handle.
            self._generation.cancel()

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._stop_source()

    def pause(self) -> None:
        if self._generation is not None and not self._over:
            self._generation.pause()

    def resume(self) -> None:
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
        if not self._first_s:
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
                self._prompt_tokens, self._cached_tokens = total, cached
                self._open()
            case Done():
                self._open()
                rest = self._decoder.finish()
                if rest is not None and not self._over:
                    self._sink(rest)
                if not self._over:
                    self._finish(event.reason, self._usage(event))
            case Skipped():
                self._skip(event)
            case EngineFailed(error):
                self._end(Failed(error))
            case Tokens():
                self._tokens(event)

    def _prepare(self, event: Prepared) -> None:
        """The decoder's rules; comes again only while no token came."""
        rules = DecoderRules(
            stop=event.stop,
            thinking_tags=event.thinking_tags,
            starts_in_thinking=event.starts_in_thinking,
        )
        self._decoder = Decoder(rules)
        self._load_s = event.load_s
        self._prompt_ids = event.prompt_ids
        self._node = event.node
        self._prepared_s = self._clock.monotonic()
        self.journal.opened(model_digest=event.model_digest, resumable=event.resumable)

    def _chat_delta(self, event: ChatDelta) -> None:
        """Already taken apart by the engine; only stop sequences are ours."""
        if not self._first_s:
            self._first_token()
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

    # ── the parts of an end ─────────────────────────────────────────────────────────

    def _first_token(self) -> None:
        self._first_s = self._clock.monotonic()
        self._open()

    def _open(self) -> None:
        if not self._opened:
            self._opened = True
            self._sink(Opened(prompt_tokens=self._prompt_tokens or len(self._prompt_ids), node=self._node))

    def _usage(self, done: Done | None) -> Usage:
        """The engine's counts and times where it says them, else what was seen from here."""
        now = self._clock.monotonic()
        seen = self._decoder
        first = self._first_s or now
        prompt_tokens = self._prompt_tokens or len(self._prompt_ids)
        completion_tokens, cached_tokens = seen.completion_tokens, self._cached_tokens
        prompt_s, completion_s = first - (self._prepared_s or self._started_s), now - first
        if done is not None:
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
        if self.journal.request.want_context and self._prompt_ids and self.journal.complete:
            context = (*self._prompt_ids, *self.journal.ids)
        self._end(Finished(reason=reason, usage=usage, stop_sequence=self._decoder.stopped, context=context))

    def _end(self, event: Event) -> None:
        if not self._over:
            self._over = True
            self._sink(event)

    def _stop_source(self) -> None:
        if self._generation is not None:
            self._generation.cancel()

    def _defect(self, exc: Exception) -> None:
        """Ours, not the caller's: the log has it whole, the client is told where to look."""
        over, self._over = self._over, True
        if isinstance(exc, OllamaDistributedError):
            error = exc
        else:
            request_id = self.journal.request.request_id
            log.error("streams.defect", request_id=request_id, exc_info=exc)
            error = Internal(f"internal error; the node's log has it under request {request_id}")
        self._stop_source()
        if not over:
            try:
                self._sink(Failed(error))
            except Exception:
                log.exception("streams.sink_defect", request_id=self.journal.request.request_id)
