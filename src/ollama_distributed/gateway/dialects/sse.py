"""Server-sent events (WHATWG HTML 9.2) with JSON in them.

On the hot path a chunk is constant bytes around one JSON string, so `json_text` is all
that runs per token.
"""

from __future__ import annotations

from typing import Any

import msgspec

CONTENT_TYPE = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def json_text(text: str) -> bytes:
    """`text` as a JSON string that is safe inside one SSE line.

    U+0085, U+2028 and U+2029 are legal in JSON, but line readers such as
    `str.splitlines` break there: they are escaped.
    """
    try:
        encoded = _encode(text)
    except UnicodeEncodeError:  # half of a surrogate pair: an engine's fault, never the client's
        encoded = _encode(text.encode("utf-8", "replace").decode())
    if text.isascii():
        return encoded
    return _escape_lines(encoded)


def _escape_lines(encoded: bytes) -> bytes:
    if b"\xe2\x80" in encoded:
        encoded = encoded.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    if b"\xc2\x85" in encoded:
        encoded = encoded.replace(b"\xc2\x85", b"\\u0085")
    return encoded


def json_value(value: Any) -> bytes:
    """Any value as JSON that is safe inside one SSE line. Not for every token: `json_text` is."""
    encoded = _encode(value)
    return encoded if encoded.isascii() else _escape_lines(encoded)


def comment(text: str) -> bytes:
    """A line for people; every client leaves it out."""
    return b": " + text.encode() + b"\n\n"


def sse_event(name: str, value: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + json_value(value) + b"\n\n"
