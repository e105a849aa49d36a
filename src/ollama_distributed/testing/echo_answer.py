"""One running answer of the echo engine, and the events it emits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.inference import Sampling, TokenLogprob, ToolCall, TopLogprob
from ollama_distributed.serving.ports import (
    ChatDelta,
    Done,
    EngineEvent,
    EngineFailed,
    EngineSink,
    LoadPlan,
    Progress,
    Tokens,
)
from ollama_distributed.testing import echo_text

_BURST = 64
"""Tokens per turn of the loop at unlimited speed: other tasks wait 0.1 ms at most."""
_LOGPROB = -0.25
"""Of every chosen token; alternatives lie one lower each."""


class Host(Protocol):
    """The runner, as its answers see it."""

    @property
    def plan(self) -> LoadPlan: ...

    def release(self, answer: EchoAnswer) -> None:
        """The answer ended: its slot is free."""
        ...

    def check_fits(self, prompt_tokens: int) -> None: ...

    def kill(self, reason: str) -> None: ...

    def token_limit(self) -> int | None:
        """The runner dies when an answer has so many tokens."""
        ...

    def speed(self) -> float:
        """Tokens a second; 0: as fast as the loop turns."""
        ...

    def pace(self) -> float:
        """By how much the next answer is faster; 1: not."""
        ...


class EchoAnswer:
    """A running answer: emits at its speed until text, limit, cancel or death ends it."""

    def __init__(
        self,
        host: Host,
        sink: EngineSink,
        *,
        events: Iterator[EngineEvent],
        sampling: Sampling,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        shift: bool = True,
        reason: Literal["stop", "tool_calls"] = "stop",
        failed: OllamaDistributedError | None = None,
    ) -> None:
        self._host = host
        self._sink = sink
        self._events = events
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens
        self._reason = reason
        self._failed = failed
        limits = [n for n in (sampling.num_predict,) if n is not None and n >= 0]
        if not shift:
            limits.append(max(0, host.plan.context_tokens - prompt_tokens))
        self._limit = min(limits, default=None)
        self._pace = host.pace()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._begun = False
        self._begun_at = 0.0
        self._first_at = 0.0
        self._paced_from = 0.0
        self._paced = 0
        self._emitted = 0
        self._paused = False
        self._over = False

    # ── Generation ──────────────────────────────────────────────────────────────────

    def cancel(self) -> None:
        if not self._over:
            self._finish()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._pace_from_now()
            if self._timer is None and self._begun and not self._over:
                self._timer = self._loop.call_soon(self._turn)

    # ── driven by the runner ────────────────────────────────────────────────────────

    def begin(self) -> None:
        """A slot is there. Nothing is emitted before the caller's own turn of the loop ends."""
        self._begun, self._begun_at = True, self._loop.time()
        self._timer = self._loop.call_soon(self._read_prompt)

    def end(self, event: EngineEvent, *, later: bool = False) -> None:
        """Emit the last event, unless one came already."""
        if self._over:
            return
        if later:
            self._timer = self._loop.call_soon(self.end, event)
            return
        self._finish()
        self._sink(event)

    # ── turns of the loop ───────────────────────────────────────────────────────────

    def _read_prompt(self) -> None:
        self._timer = None
        try:
            if self._failed is not None:
                raise self._failed
            self._host.check_fits(self._prompt_tokens)
        except OllamaDistributedError as exc:
            self.end(EngineFailed(exc))
            return
        total, cached = self._prompt_tokens, self._cached_tokens
        self._sink(Progress(total=total, processed=total, cached=cached))
        self._first_at = self._loop.time()
        self._pace_from_now()
        if not self._over:
            self._turn()

    def _pace_from_now(self) -> None:
        self._paced_from, self._paced = self._loop.time(), self._emitted

    def _turn(self) -> None:
        self._timer = None
        if self._halted():
            return
        speed, fail_after = self._host.speed() * self._pace, self._host.token_limit()
        due = _BURST
        if speed:
            elapsed = self._loop.time() - self._paced_from
            due = min(_BURST, self._paced + int(elapsed * speed + 1e-6) - self._emitted)
        for _ in range(due):
            if fail_after is not None and self._emitted >= fail_after:
                self._host.kill(f"the echo runner is set to die after {fail_after} tokens")
                return
            if self._limit is not None and self._emitted >= self._limit:
                self.end(self._done("length"))
                return
            event = next(self._events, None)
            if event is None:
                self.end(self._done(self._reason))
                return
            self._emitted += 1
            self._sink(event)
            if self._halted():
                return
        self._schedule(speed)

    def _schedule(self, speed: float) -> None:
        if self._timer is not None:
            return  # the sink paused and resumed within the turn
        if speed:
            at = self._paced_from + (self._emitted - self._paced + 1) / speed
            self._timer = self._loop.call_at(at, self._turn)
        else:
            self._timer = self._loop.call_soon(self._turn)

    def _halted(self) -> bool:
        """The sink may have cancelled or paused the answer while it took an event."""
        return self._over or self._paused

    def _done(self, reason: Literal["stop", "length", "tool_calls"]) -> Done:
        return Done(
            reason=reason,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._emitted,
            prompt_s=self._first_at - self._begun_at,
            completion_s=self._loop.time() - self._first_at,
        )

    def _finish(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._host.release(self)


# ── events ──────────────────────────────────────────────────────────────────────────


def token_events(answer: bytes, top_logprobs: int | None) -> Iterator[Tokens]:
    """Bytes where a token is not whole characters: whoever goes on after it cannot know its start."""
    for chunk in echo_text.chunks(answer):
        logprobs = () if top_logprobs is None else (_logprob(chunk, top_logprobs),)
        ids = (echo_text.token_id(chunk),)
        try:
            yield Tokens(ids, chunk.decode(), logprobs)
        except UnicodeDecodeError:
            yield Tokens(ids, "", logprobs, chunk)


def _whole_text(data: bytes) -> tuple[str, bytes]:
    """The text that is complete, and the bytes of a character that is not."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as exc:
        if exc.end == len(data):
            return data[: exc.start].decode(), data[exc.start :]
        return data.decode(errors="replace"), b""


def _logprob(chunk: bytes, top: int) -> TokenLogprob:
    text = chunk.decode(errors="replace")
    alternatives = [TopLogprob(text, _LOGPROB, chunk)]
    for i in range(1, top):
        other = b"%d" % i
        alternatives.append(TopLogprob(other.decode(), _LOGPROB - i, other))
    return TokenLogprob(text, _LOGPROB, chunk, tuple(alternatives[:top]))


def text_events(answer: str) -> Iterator[ChatDelta]:
    pending = b""
    for chunk in echo_text.chunks(answer.encode()):
        text, pending = _whole_text(pending + chunk)
        yield ChatDelta(text=text)


def call_events(calls: Sequence[ToolCall]) -> Iterator[ChatDelta]:
    """First the call with its name and no arguments, then the arguments in fragments."""
    for call in calls:
        yield ChatDelta(tool_calls=(msgspec.structs.replace(call, arguments=""),))
        for delta in text_events(call.arguments):
            if delta.text:
                fragment = msgspec.structs.replace(call, arguments=delta.text)
                yield ChatDelta(tool_calls=(fragment,))
