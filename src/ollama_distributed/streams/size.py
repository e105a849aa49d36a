"""How much of one answer is kept in memory until it is complete. Pure.

A runner that was taken over, or a server that is no node, may go on for ever; who streams takes what comes
and leaves, but an answer that is sent whole is kept until its end.
"""

from __future__ import annotations

from ollama_distributed.base.inference import Delta

MOST_BYTES = 256 << 20
"""Two million tokens: more than ten contexts of 128k, which an answer without a limit may have."""
EVENT_BYTES = 128
"""Of a token without its text."""
LOGPROB_BYTES = 2048
"""Of a token's, with twenty others that might have come."""


def more_bytes_of(delta: Delta) -> int:
    """About what it takes beside its text."""
    calls = sum(EVENT_BYTES + len(call.arguments) for call in delta.tool_calls)
    return LOGPROB_BYTES * len(delta.logprobs) + calls
