"""Chats whose answer llama-server cannot take apart, told as the text that it is. Pure.

llama-server ends a chat with an error as soon as the model does not keep to the format that its template
stands for (llama.cpp issues 25072, 26381, 27025): a model that just talks would be no answer at all. If
nothing but thinking was passed on by then (`FormattedChat` tells), a completion of the same prompt takes its
place (`SpokenChat`).
"""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.adapters.engines.call import EventParser
from ollama_distributed.base.tokens import ChatDelta, EngineEvent, EngineFailed, Progress, Tokens

_UNPARSED = "The model produced output that does not match the expected"
"""How llama-server's message begins (`common/chat.cpp`); it has no code of its own."""


def is_unparsed(event: EngineEvent) -> bool:
    """Whether llama-server gave up on what the model says."""
    return type(event) is EngineFailed and event.error.message.startswith(_UNPARSED)


class FormattedChat:
    """A chat in the model's own format."""

    def __init__(self, stream: EventParser, on_unparsed: Callable[[], None]) -> None:
        """`on_unparsed` is called once; nothing of this stream is passed on from then on."""
        self._stream = stream
        self._on_unparsed = on_unparsed
        self._told = False
        self._over = False

    def feed(self, data: bytes) -> list[EngineEvent]:
        if self._over:
            return []
        events = self._stream.feed(data)
        for event in events:
            if type(event) is ChatDelta:
                self._told = self._told or bool(event.text or event.tool_calls)
            elif not self._told and is_unparsed(event):
                self._over = True
                self._on_unparsed()
                return []
        return events


class SpokenChat:
    """The events of a completion as those of a chat, of which the prompt's were told before."""

    def __init__(self, stream: EventParser) -> None:
        self._stream = stream

    def feed(self, data: bytes) -> list[EngineEvent]:
        return [
            ChatDelta(text=event.text, logprobs=event.logprobs) if type(event) is Tokens else event
            for event in self._stream.feed(data)
            if type(event) is not Progress
        ]
