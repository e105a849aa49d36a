"""The streamed answer of llama-server's `/completion` and `/infill` as engine events. Pure.

Checked against llama.cpp b11549 and b11669.
"""

from __future__ import annotations

import json

import msgspec

from ollama_distributed.adapters.engines.framing import event_lines
from ollama_distributed.adapters.engines.llamacpp.protocol import (
    WireError,
    WireLogprob,
    WireProgress,
    WireTimings,
    error_of,
    token_logprob,
)
from ollama_distributed.adapters.engines.llamacpp.vocabulary import Fragments
from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.inference import TokenLogprob
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, Progress, Tokens


class _Chunk(msgspec.Struct):
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str = ""
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    prompt_progress: WireProgress | None = None
    completion_probabilities: list[WireLogprob] | None = None
    timings: WireTimings | None = None
    error: WireError | None = None


class _TokenChunk(msgspec.Struct, gc=False):
    """One token with its text and nothing else; other events are refused or have no text."""

    content: str
    tokens: tuple[int]
    tokens_predicted: int
    stop: bool = False
    completion_probabilities: None = None
    timings: None = None


_chunk = msgspec.json.Decoder(_Chunk)
_token_chunks = msgspec.json.Decoder(_TokenChunk).decode_lines


class CompletionStream:
    """Turns the events of `/completion` and `/infill` into engine events.

    The id of the end-of-text token is never given out: it is no part of the answer, and
    an answer that is continued elsewhere must not go on after it.
    """

    def __init__(
        self, *, fragments: Fragments | None = None, stop_at_tokens: int | None = None, top_logprobs: int = 0
    ) -> None:
        """`stop_at_tokens`: prompt and answer together; at it the answer ends with `length`
        (the context is full and must not be shifted)."""
        self._fragments = fragments
        self._stop_at = stop_at_tokens
        self._top = top_logprobs
        self._predicted = 0
        self._cached = 0
        self._silent: list[int] = []
        """Ids of tokens without text, held until it is known whether the last one is the end."""

    def tokens(self, data: bytes, joins: bool) -> list[Tokens] | None:
        """As `call.ReadTokens` says: the short way of a long answer."""
        lines = event_lines(data)
        if lines is None or self._stop_at is not None or self._silent:
            return None
        try:
            chunks = _token_chunks(lines)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # of another shape
        found: list[Tokens] = []
        predicted = self._predicted
        for chunk in chunks:
            predicted += 1
            if not chunk.content or chunk.stop or chunk.tokens_predicted != predicted:
                return None  # the end, or some are withheld
            found.append(Tokens(chunk.tokens, chunk.content))
        self._predicted = predicted
        if joins and len(found) > 1:
            ids = tuple([chunk.tokens[0] for chunk in chunks])
            return [Tokens(ids, "".join([chunk.content for chunk in chunks]))]
        return found

    def feed(self, data: bytes) -> list[EngineEvent]:
        """The engine events of one server event. After `Done` or `EngineFailed` comes nothing.

        Raises:
            EngineError: it is not what llama-server sends.
        """
        if data == b"[DONE]":
            return []
        try:
            chunk = _chunk.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise EngineError("the engine sent an event that is not its protocol") from exc
        if chunk.error is not None:
            return [EngineFailed(error_of(500, chunk.error))]
        if chunk.prompt_progress is not None:  # its `tokens` is [0] without meaning
            progress = chunk.prompt_progress
            self._cached = progress.cache
            return [Progress(total=progress.total, processed=progress.processed, cached=progress.cache)]
        if chunk.stop:
            return self._ended(chunk)
        if not chunk.tokens:
            return []
        return self._token(chunk)

    def _token(self, chunk: _Chunk) -> list[EngineEvent]:
        missing = chunk.tokens_predicted - self._predicted - len(chunk.tokens)
        self._predicted = chunk.tokens_predicted
        ids = tuple(chunk.tokens)
        if missing > 0 and self._fragments is not None:
            ids = (self._fragments.withheld(missing, chunk.content, ids[0]) or ()) + ids
        logprobs: tuple[TokenLogprob, ...] = ()
        if chunk.completion_probabilities:
            logprobs = tuple(token_logprob(p, self._top) for p in chunk.completion_probabilities)
        if missing > 0 and len(logprobs) == 1:
            # Only the token that completed the character came with a figure: it stands for all of them.
            whole = chunk.content
            logprobs = (msgspec.structs.replace(logprobs[0], token=whole, bytes=whole.encode()),)
        events: list[EngineEvent] = []
        if chunk.content:
            events.append(Tokens((*self._silent, *ids), chunk.content, logprobs))
            self._silent.clear()
        else:
            self._silent.extend(ids)
        if self._stop_at is not None and chunk.tokens_evaluated + self._predicted + 1 >= self._stop_at:
            events.append(
                Done(
                    reason="length",
                    prompt_tokens=chunk.tokens_evaluated,
                    cached_tokens=self._cached,
                    completion_tokens=self._predicted,
                )
            )
        return events

    def _ended(self, chunk: _Chunk) -> list[EngineEvent]:
        if chunk.stop_type == "eos":
            del self._silent[-1:]
        events: list[EngineEvent] = [Tokens(tuple(self._silent), "")] if self._silent else []
        timings = chunk.timings or WireTimings()
        events.append(
            Done(
                reason="length" if chunk.stop_type == "limit" else "stop",
                prompt_tokens=chunk.tokens_evaluated,
                cached_tokens=timings.cache_n,
                completion_tokens=chunk.tokens_predicted,
                prompt_s=(timings.prompt_ms or 0.0) / 1000,
                completion_s=(timings.predicted_ms or 0.0) / 1000,
            )
        )
        return events


class FormatStream:
    """A `CompletionStream` under a `format`: an answer that ended by itself must be JSON.

    The safety net below `check_schema`: a schema that the engine dropped after all is an
    error at the end, not free text that passes for an answer.
    """

    def __init__(self, stream: CompletionStream) -> None:
        self._stream = stream
        self._text: list[str] = []

    def feed(self, data: bytes) -> list[EngineEvent]:
        events = self._stream.feed(data)
        for i, event in enumerate(events):
            if isinstance(event, Tokens):
                self._text.append(event.text)
            elif isinstance(event, Done) and event.reason == "stop" and not _is_json("".join(self._text)):
                events[i] = EngineFailed(
                    EngineError("the engine did not keep the format: its answer is no JSON")
                )
        return events


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_int=str, parse_float=str)  # a number of any length is one
    except json.JSONDecodeError:
        return False
    except RecursionError:
        return True  # too deep to tell
    return True
