"""How much of one answer is kept in memory until it is complete. Pure.

A runner that was taken over, or a server that is no node, may go on for ever; who streams takes what comes
and leaves, but an answer that is sent whole is kept until its end.
"""

from __future__ import annotations

from ollama_distributed.base.errors import EngineError
from ollama_distributed.base.inference import Delta

MOST_BYTES = 256 << 20
"""Two million tokens: more than ten contexts of 128k, which an answer without a limit may have."""
EVENT_BYTES = 128
"""Of a token without its text."""
LOGPROB_BYTES = 2048
"""Of a token's, with twenty others that might have come."""


class AnswerSize:
    """Of one answer."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, delta: Delta) -> None:
        """
        Raises:
            EngineError: it is more than an answer can be.
        """
        self._bytes += EVENT_BYTES + len(delta.text) + len(delta.thinking)
        if delta.logprobs:
            self._bytes += LOGPROB_BYTES * len(delta.logprobs)
        for call in delta.tool_calls:
            self._bytes += EVENT_BYTES + len(call.arguments)
        if self._bytes > MOST_BYTES:
            raise EngineError(f"the answer does not end: it was cut off after {MOST_BYTES >> 20} MiB")
