"""Ends a chat template that does not end (security table S-04).

llama.cpp renders templates in a thread that nothing stops but the end of its process. A template asked
for by itself has a deadline (`runner_port.apply_template`, which kills). Of a chat that llama-server
renders and takes apart nothing comes while its template is rendered, but nothing comes either while it
waits for a slot: so, after a while of silence, its template is asked for by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from ollama_distributed.adapters.engines.call import EventParser
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.tokens import EngineEvent
from ollama_distributed.serving.ports import ChatRequest


class RenderWatch:
    """Of one runner; `close` it."""

    def __init__(self, render: Callable[[ChatRequest], Awaitable[object]]) -> None:
        """`render`: renders under a deadline and does what has to be done when it is over."""
        self._render = render
        self._timers: dict[_Listening, asyncio.TimerHandle] = {}
        self._looks: set[asyncio.Task[None]] = set()

    def over(self, parser: EventParser, request: ChatRequest, silence_s: float) -> EventParser:
        """The parser of a chat that is sent now. A chat that is given up is watched on: its template is
        rendered on, too."""
        listening = _Listening(parser, self._heard)
        timer = asyncio.get_running_loop().call_later(silence_s, self._silent, listening, request)
        self._timers[listening] = timer
        return listening

    def close(self) -> None:
        """Idempotent."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _heard(self, listening: _Listening) -> None:
        if (timer := self._timers.pop(listening, None)) is not None:
            timer.cancel()

    def _silent(self, listening: _Listening, request: ChatRequest) -> None:
        del self._timers[listening]
        look = asyncio.get_running_loop().create_task(self._look(request), name="look at a template")
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)

    async def _look(self, request: ChatRequest) -> None:
        # Whoever has the chat is told by its own call.
        with contextlib.suppress(OllamaDistributedError):
            await self._render(request)


class _Listening:
    """A parser that tells of its first record."""

    def __init__(self, parser: EventParser, heard: Callable[[_Listening], None]) -> None:
        self._parser = parser
        self._heard: Callable[[_Listening], None] | None = heard

    def feed(self, data: bytes, /) -> list[EngineEvent]:
        if self._heard is not None:
            self._heard(self)
            self._heard = None
        return self._parser.feed(data)
