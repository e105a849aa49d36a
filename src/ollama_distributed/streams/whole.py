"""An answer that is sent whole: kept in memory until it is complete, here or by who waits for it.

A runner that was taken over, or a server that is no node, may go on for ever. Who streams takes what comes
and leaves; of what is kept there is a bound.
"""

from __future__ import annotations

from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.inference import Delta, Event, Sink

MOST_BYTES = 256 << 20
"""Two million tokens: more than ten contexts of 128k, which an answer without a limit may have."""
EVENT_BYTES = 128
"""Of a token without its text."""
LOGPROB_BYTES = 2048
"""Of a token's, with twenty others that might have come."""


class Whole:
    """On the way to `out`. `held`: what waits here, as it may still begin again (R2)."""

    __slots__ = ("_bytes", "_out", "held", "holds")

    def __init__(self, out: Sink) -> None:
        self._out = out
        self._bytes = 0
        self.held: list[Event] = []
        self.holds = False

    def begin(self, *, holds: bool) -> None:
        """From its first token, perhaps again. Once held, it is held until its end."""
        self._bytes = 0
        if holds:
            self.held.clear()
            self.holds = True

    def hear(self, event: Event) -> None:
        """
        Raises:
            EngineError: it is more than an answer can be.
        """
        if type(event) is Delta:
            size = self._bytes + EVENT_BYTES + len(event.text) + len(event.thinking)
            if event.logprobs or event.tool_calls:
                size += LOGPROB_BYTES * len(event.logprobs)
                size += sum(EVENT_BYTES + len(call.arguments) for call in event.tool_calls)
            self._bytes = size
            if size > MOST_BYTES:
                raise EngineError(f"the answer does not end: it was cut off after {MOST_BYTES >> 20} MiB")
        if self.holds:
            self.held.append(event)
        else:
            self._out(event)
