"""Tool calls that the caller demands (`tool_choice`), as the events of a chat. Pure but for ids.

llama-server does not enforce `tool_choice` (DESIGN.md, trap 8). The model is first asked in
its own format, in which it calls best (`WantedCalls`); as soon as it talks instead, a
completion that can be nothing but calls takes its place (`EnforcedCalls`).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ollama_distributed.adapters.engines.llamacpp.chat import ChatStream, parse_calls
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.adapters.engines.llamacpp.unparsed import is_unparsed
from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.ids import random_id
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Tokens


class WantedCalls:
    """A chat that should call: passes on reasoning and calls, and tells when it talks instead."""

    def __init__(self, on_refused: Callable[[], None]) -> None:
        """`on_refused` is called once; nothing of this stream is passed on from then on."""
        self._stream = ChatStream()
        self._on_refused = on_refused
        self._called = False
        self._refused = False

    def feed(self, data: bytes) -> list[EngineEvent]:
        if self._refused:
            return []
        events: list[EngineEvent] = []
        for event in self._stream.feed(data):
            match event:
                case ChatDelta(tool_calls=calls) if calls:
                    self._called = True
                case ChatDelta(text=text) if text and not self._called:
                    event = msgspec.structs.replace(event, text="")
                    if text.strip():
                        return self._refuse(events)
                case Done() if not self._called:
                    return self._refuse(events)
                case EngineFailed() if is_unparsed(event) and not self._called:
                    return self._refuse(events)
                case _:
                    pass
            events.append(event)
        return events

    def _refuse(self, events: list[EngineEvent]) -> list[EngineEvent]:
        self._refused = True
        self._on_refused()
        return events


class EnforcedCalls:
    """Gathers the JSON text; the calls come whole, just before the end."""

    def __init__(self, *, stop_at_tokens: int | None = None) -> None:
        self._stream = CompletionStream(stop_at_tokens=stop_at_tokens)
        self._text: list[str] = []

    def feed(self, data: bytes) -> list[EngineEvent]:
        """As the other streams. Calls cut off by the token limit are dropped: `length` says so.

        Raises:
            EngineError: the model ended without whole calls.
        """
        events: list[EngineEvent] = []
        for event in self._stream.feed(data):
            match event:
                case Tokens():
                    self._text.append(event.text)
                case Done():
                    events += self._end(event)
                case _:
                    events.append(event)
        return events

    def _end(self, done: Done) -> list[EngineEvent]:
        try:
            calls = parse_calls("".join(self._text), lambda: f"call_{random_id(24)}")
        except EngineError:
            if done.reason == "length":
                return [done]
            raise
        return [ChatDelta(tool_calls=calls), msgspec.structs.replace(done, reason="tool_calls")]
