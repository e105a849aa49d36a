"""A completion that can be nothing but tool calls, as the events of a chat. Pure but for ids."""

from __future__ import annotations

import msgspec

from ollama_distributed.adapters.engines.llamacpp.chat import parse_calls
from ollama_distributed.adapters.engines.llamacpp.protocol import CompletionStream
from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.ids import random_id
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, Tokens


class EnforcedCalls:
    """Gathers the JSON text; the calls come whole, just before the end."""

    def __init__(self) -> None:
        self._stream = CompletionStream()
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
