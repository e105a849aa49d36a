"""What OpenAI-compatible servers answer with, as engine events. Pure.

Sources: as `openai_wire.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from ollama_distributed.adapters.engines.framing import event_lines
from ollama_distributed.adapters.engines.remote.openai_wire import error_of
from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.inference import TokenLogprob, ToolCall, TopLogprob
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Tokens


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolDelta(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolDelta] | None = None


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None


class _Entry(_Top):
    top_logprobs: list[_Top] = []


class _Logprobs(msgspec.Struct):
    content: list[_Entry] | None = None
    """Of a chat."""
    tokens: list[str] | None = None
    """Of a completion, with the three below."""
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    """Of an answer that comes whole."""
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: _Cached | None = None


class _Error(msgspec.Struct):
    message: str = ""
    type: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


class _TextDelta(msgspec.Struct, gc=False):
    content: str
    reasoning_content: None = None
    reasoning: None = None
    tool_calls: tuple[()] | None = None


class _TextChoice(msgspec.Struct, gc=False):
    text: str = ""
    token_ids: tuple[int, ...] | None = None
    delta: _TextDelta | None = None
    message: None = None
    finish_reason: None = None
    logprobs: None = None


class _TextChunk(msgspec.Struct, gc=False):
    """Text of one choice and nothing else; other events are refused or have no text."""

    choices: tuple[_TextChoice]
    usage: None = None
    error: None = None


_chunk = msgspec.json.Decoder(_Chunk)
_text_chunks = msgspec.json.Decoder(_TextChunk).decode_lines


class OpenAIStream:
    """Turns the events of `/v1/completions` and `/v1/chat/completions` into engine events."""

    def __init__(self) -> None:
        self._reason = ""
        self._usage = _Usage()

    def tokens(self, data: bytes, joins: bool) -> Sequence[Tokens | ChatDelta] | None:
        """As `call.ReadTokens` says: the short way of a long answer."""
        lines = event_lines(data)
        if lines is None:
            return None
        try:
            choices = [chunk.choices[0] for chunk in _text_chunks(lines)]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # of another shape
        joined = None
        if joins and len(choices) > 1:
            joined = _tokens(choices) if choices[0].delta is None else _chat_text(choices)
        return _each(choices) if joined is None else [joined]

    def feed(self, data: bytes) -> list[EngineEvent]:
        """Raises `EngineError` for an event that is not the API's."""
        if data == b"[DONE]":
            return [self._done()] if self._reason else []
        try:
            chunk = _chunk.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise EngineError("the engine sent an event that is not its protocol") from exc
        if chunk.error is not None:
            message = chunk.error if isinstance(chunk.error, str) else chunk.error.message
            return [EngineFailed(error_of(500, message))]
        if chunk.usage is not None:
            self._usage = chunk.usage
        events: list[EngineEvent] = []
        for choice in chunk.choices:
            if choice.finish_reason:
                self._reason = choice.finish_reason
            if (delta := choice.delta or choice.message) is not None:
                if (said := _chat_delta(choice, delta)) is not None:
                    events.append(said)
            elif choice.text or choice.token_ids:
                events.append(Tokens(tuple(choice.token_ids or ()), choice.text, _logprobs(choice.logprobs)))
        return events

    def _done(self) -> Done:
        reasons: dict[str, Literal["stop", "length", "tool_calls"]] = {
            "length": "length",
            "tool_calls": "tool_calls",
            "function_call": "tool_calls",
        }
        details = self._usage.prompt_tokens_details
        return Done(
            reason=reasons.get(self._reason, "stop"),
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            completion_tokens=self._usage.completion_tokens or 0,
        )


class OpenAIAnswer(OpenAIStream):
    """Turns a chat completion that comes whole into engine events."""

    def feed(self, data: bytes) -> list[EngineEvent]:
        events = super().feed(data)
        if self._reason:
            events.append(self._done())
        return events


def _each(choices: list[_TextChoice]) -> list[Tokens | ChatDelta] | None:
    """None: not all of them have text or ids."""
    found: list[Tokens | ChatDelta] = []
    for choice in choices:
        if choice.delta is not None and choice.delta.content:
            found.append(ChatDelta(text=choice.delta.content))
        elif choice.delta is None and (choice.text or choice.token_ids):
            found.append(Tokens(choice.token_ids or (), choice.text))
        else:
            return None
    return found


def _tokens(choices: list[_TextChoice]) -> Tokens | None:
    """None: not all of them have ids; of those without the events are counted."""
    ids: list[int] = []
    texts: list[str] = []
    for choice in choices:
        if choice.delta is not None or not choice.token_ids:
            return None
        ids += choice.token_ids
        texts.append(choice.text)
    return Tokens(tuple(ids), "".join(texts))


def _chat_text(choices: list[_TextChoice]) -> ChatDelta | None:
    """None: not all of them have some."""
    texts: list[str] = []
    for choice in choices:
        if choice.delta is None or not choice.delta.content:
            return None
        texts.append(choice.delta.content)
    return ChatDelta(text="".join(texts), pieces=len(texts))


def _chat_delta(choice: _Choice, delta: _Delta) -> ChatDelta | None:
    """None: it says nothing."""
    if not (delta.reasoning_content or delta.reasoning or delta.tool_calls or choice.logprobs):
        return ChatDelta(text=delta.content) if delta.content else None
    event = ChatDelta(
        text=delta.content or "",
        thinking=delta.reasoning_content or delta.reasoning or "",
        tool_calls=tuple(
            ToolCall(
                id=call.id or "",
                name=call.function.name or "",
                arguments=call.function.arguments or "",
                index=call.index,
            )
            for call in delta.tool_calls or ()
        ),
        logprobs=_logprobs(choice.logprobs),
    )
    return None if event == ChatDelta() else event


def _logprobs(wire: _Logprobs | None) -> tuple[TokenLogprob, ...]:
    if wire is None:
        return ()
    if wire.content is not None:
        return tuple(
            TokenLogprob(
                e.token,
                e.logprob,
                _bytes(e),
                tuple(TopLogprob(t.token, t.logprob, _bytes(t)) for t in e.top_logprobs),
            )
            for e in wire.content
        )
    tops = wire.top_logprobs or []
    return tuple(
        TokenLogprob(
            token,
            logprob or 0.0,
            token.encode(),
            tuple(
                TopLogprob(t, p, t.encode()) for t, p in ((tops[i] if i < len(tops) else None) or {}).items()
            ),
        )
        for i, (token, logprob) in enumerate(zip(wire.tokens or (), wire.token_logprobs or (), strict=False))
    )


def _bytes(entry: _Top) -> bytes:
    return bytes(entry.bytes) if entry.bytes is not None else entry.token.encode()
