"""Events to Ollama's bytes: NDJSON lines or one object.

The parts of a line that never change are made once per call; a streamed delta costs one
JSON string and a join (about 1 µs). Zero counts and durations are left out, not sent as 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ollama_distributed.base.errors import EngineError, OllamaDistributedError
from ollama_distributed.base.inference import (
    Delta,
    EmbedResult,
    Event,
    Failed,
    Finished,
    Opened,
    Queued,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from ollama_distributed.gateway.dialects.answer import Answer, Call, ToolCalls

NDJSON = "application/x-ndjson"
JSON = "application/json; charset=utf-8"

_encode = msgspec.json.Encoder().encode


class ErrorLine(Protocol):
    """The last line of a stream that failed, in the shape of the API that was called."""

    def __call__(self, error: OllamaDistributedError, /) -> bytes: ...


class Shape(msgspec.Struct, frozen=True):
    """What `generate` and `chat` have different: where text, thinking and calls stand."""

    chat: bool

    def delta(self, text: str, thinking: str, calls: list[dict[str, Any]]) -> bytes:
        """The members between `created_at` and `done`."""
        if self.chat:
            return b'"message":' + message(text, thinking, calls)
        if thinking:
            return b'"response":' + _encode(text) + b',"thinking":' + _encode(thinking)
        return b'"response":' + _encode(text)


GENERATE = Shape(chat=False)
CHAT = Shape(chat=True)


def message(text: str, thinking: str, calls: list[dict[str, Any]], role: bytes = b"assistant") -> bytes:
    parts = [b'{"role":"', role, b'","content":', _encode(text)]
    if thinking:
        parts += (b',"thinking":', _encode(thinking))
    if calls:
        parts += (b',"tool_calls":', _encode(calls))
    parts.append(b"}")
    return b"".join(parts)


_second = (-1, b"")


def timestamp(epoch_s: float) -> bytes:
    """RFC 3339 in UTC with microseconds. Formats the date once per second."""
    global _second
    whole = int(epoch_s)
    cached = _second
    if cached[0] != whole:
        cached = (whole, time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(whole)).encode())
        _second = cached
    return cached[1] + b"%06dZ" % int((epoch_s - whole) * 1e6)


class LineStream:
    """One NDJSON line for each delta and a last one with the counts."""

    content_type = NDJSON

    def __init__(
        self,
        shape: Shape,
        *,
        model: str,
        request_id: str,
        wall: Callable[[], float],
        error_line: ErrorLine,
    ) -> None:
        self._head = b'{"model":' + _encode(model) + b',"created_at":"'
        self._middle = b'","message":{"role":"assistant","content":' if shape.chat else b'","response":'
        self._tail = b'},"done":false}\n' if shape.chat else b',"done":false}\n'
        self._shape = shape
        self._wall = wall
        self._error_line = error_line
        self._calls = ToolCalls(request_id)

    def feed(self, index: int, event: Event) -> bytes:  # noqa: ARG002 - one answer only
        if type(event) is Delta:
            if event.thinking or event.tool_calls or event.logprobs:
                return self._rich(event)
            return b"".join(
                (self._head, timestamp(self._wall()), self._middle, _encode(event.text), self._tail)
            )
        if type(event) is Finished:
            return self._last(event)
        if type(event) is Failed:
            return self._error_line(event.error) + b"\n"
        if type(event) is Queued:
            return self._waits(event)
        assert type(event) is Opened
        return b""

    def _waits(self, place: Queued) -> bytes:
        """A line without text, for who asked to be told."""
        body = self._shape.delta("", "", []) + b',"done":false,"queue":'
        told = {"position": place.position, "eta_s": None if place.eta_s is None else round(place.eta_s, 1)}
        return self._head + timestamp(self._wall()) + b'",' + body + _encode(told) + b"}\n"

    def _rich(self, delta: Delta) -> bytes:
        for fragment in delta.tool_calls:
            self._calls.add(fragment)
        if not (delta.text or delta.thinking or delta.logprobs):
            return b""  # fragments of a tool call: it is sent as a whole
        return self._line(delta.text, delta.thinking, [], delta.logprobs)

    def _line(
        self, text: str, thinking: str, calls: list[dict[str, Any]], logprobs: tuple[TokenLogprob, ...] = ()
    ) -> bytes:
        body = self._shape.delta(text, thinking, calls)
        if calls and not self._shape.chat:
            body += b',"done":false,"tool_calls":' + _encode(calls)
        else:
            body += b',"done":false'
        if logprobs:
            body += b',"logprobs":' + _encode(rows(logprobs))
        return self._head + timestamp(self._wall()) + b'",' + body + b"}\n"

    def _last(self, finished: Finished) -> bytes:
        calls = whole_calls(self._calls.calls, cut=finished.reason == "length")
        lines = self._line("", "", calls) if calls else b""
        return b"".join(
            (
                lines,
                self._head,
                timestamp(self._wall()),
                b'",',
                self._shape.delta("", "", []),
                done(finished),
                b"}\n",
            )
        )


class Whole:
    """One object with the whole answer; also the answer to loading, unloading and rendering."""

    content_type = JSON

    def __init__(
        self,
        shape: Shape,
        *,
        model: str,
        request_id: str,
        wall: Callable[[], float],
        render_only: bool = False,
    ) -> None:
        self._shape = shape
        self._model = model
        self._wall = wall
        self._answer = Answer(request_id)
        self._render_only = render_only

    def feed(self, index: int, event: Event) -> bytes:  # noqa: ARG002 - one answer only
        if type(event) is Delta:
            self._answer.add(event)
            return b""
        if type(event) is not Finished:
            return b""  # Opened; a failure never comes here, for nothing was written yet
        head = b'{"model":' + _encode(self._model) + b',"created_at":"' + timestamp(self._wall()) + b'",'
        if self._render_only:
            return head + self._rendered(event) + b"}"
        answer = self._answer
        calls = whole_calls(answer.calls, cut=event.reason == "length")
        parts = [head, self._shape.delta(answer.text, answer.thinking, calls), done(event)]
        if calls and not self._shape.chat:
            parts += (b',"tool_calls":', _encode(calls))
        if answer.logprobs:
            parts += (b',"logprobs":', _encode(rows(tuple(answer.logprobs))))
        parts.append(b"}")
        return b"".join(parts)

    def _rendered(self, finished: Finished) -> bytes:
        info: dict[str, Any] = {"rendered_template": finished.rendered or ""}
        if finished.rendered_images:
            info["image_count"] = finished.rendered_images
        empty = b'"message":' + message("", "", [], role=b"") if self._shape.chat else b'"response":""'
        return empty + b',"done":false,"_debug_info":' + _encode(info)


_DONE_REASON = {"tool_calls": "stop"}
"""Ollama has no reason of its own for tool calls."""


def done(finished: Finished) -> bytes:
    """`,"done":true` and what follows it."""
    reason = _DONE_REASON.get(finished.reason, finished.reason)
    parts = [b',"done":true,"done_reason":"', reason.encode("ascii"), b'"']
    if finished.reason in ("load", "unload"):
        return b"".join(parts)  # nothing was counted: Ollama sends no figures here
    if finished.context:
        parts += (b',"context":', _encode(finished.context))
    for name, value in counts(finished.usage):
        if value or (name is _CACHED and finished.usage.prompt_tokens):
            parts.append(b',"%b":%d' % (name, value))
    if finished.moves:
        parts.append(b',"failovers":%d' % finished.moves)  # ours; a stream's headers were gone by then
    return b"".join(parts)


_CACHED = b"prompt_eval_cached_count"
"""How much of the prompt the slot had kept (Ollama since 0.33.3, which tells 0 too)."""


def counts(usage: Usage) -> tuple[tuple[bytes, int], ...]:
    """Ollama's names; durations in nanoseconds."""
    return (
        (b"total_duration", round(usage.total_s * 1e9)),
        (b"load_duration", round(usage.load_s * 1e9)),
        (b"prompt_eval_count", usage.prompt_tokens),
        (_CACHED, usage.cached_tokens),
        (b"prompt_eval_duration", round(usage.prompt_s * 1e9)),
        (b"eval_count", usage.completion_tokens),
        (b"eval_duration", round(usage.completion_s * 1e9)),
    )


def whole_calls(calls: list[Call], *, cut: bool) -> list[dict[str, Any]]:
    """Complete tool calls; their arguments are objects. Of an answer that was `cut` by the
    token limit the last call is left out where it is not whole; `done_reason` says why.

    Raises:
        EngineError: the model wrote arguments that are not a JSON object.
    """
    found = []
    for call in calls:
        try:
            arguments = _object(call.name, call.arguments)
        except EngineError:
            if cut and call is calls[-1]:
                break
            raise
        function = {"index": call.place, "name": call.name, "arguments": arguments}
        found.append({"id": call.id, "function": function})
    return found


def _object(name: str, text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise EngineError(f"the model called {name!r} with arguments that are not a JSON object") from exc


def rows(logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    found = []
    for one in logprobs:
        row = _row(one)
        if one.top:
            row["top_logprobs"] = [_row(other) for other in one.top]
        found.append(row)
    return found


def _row(one: TokenLogprob | TopLogprob) -> dict[str, Any]:
    row: dict[str, Any] = {"token": one.token, "logprob": one.logprob}
    if one.bytes:
        row["bytes"] = list(one.bytes)
    return row


def embed_answer(model: str, result: EmbedResult) -> bytes:
    # Vector by vector: in a thread, one call for all would hold the event loop.
    vectors = b",".join(map(_encode, result.vectors))
    parts = [b'{"model":', _encode(model), b',"embeddings":[', vectors, b"]"]
    for name, value in counts(result.usage)[:3]:
        if value:
            parts.append(b',"%b":%d' % (name, value))
    parts.append(b"}")
    return b"".join(parts)


def embeddings_answer(result: EmbedResult) -> bytes:
    vector = result.vectors[0] if result.vectors else ()
    return b'{"embedding":' + _encode(vector) + b"}"
