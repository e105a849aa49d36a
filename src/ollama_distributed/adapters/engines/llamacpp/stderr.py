"""The last words of a runner: a bounded tail of its stderr, and the reason found in it. Pure."""

from __future__ import annotations

import itertools
import re
import signal

TAIL_BYTES = 65_536
"""Enough for the messages of one load; the tensors of a debug log do not matter."""
MAX_REASON_CHARS = 400

_PREFIX = re.compile(r"^(?:[\d.]+ [DIWE] )?(?:\w+ +)?\w*: ")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_SOURCE = re.compile(r"(?<!\S)\S*/([\w.-]+\.(?:cpp|c|h|hpp|cu|m)):")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_REASONS = (
    "gguf_init_",
    "GGML_ASSERT",
    "GGML_ABORT",
    "error loading model:",
    "out of memory",
    "failed to allocate",
    "unable to allocate",
    "error while handling argument",
    "invalid argument",
    "failed to load",
    "failed to",
    "error:",
    "Error:",
    "couldn't",
    "unable to",
    "what():",
)
"""Most telling first."""


class Tail:
    """Keeps the last `TAIL_BYTES` of what it is fed."""

    def __init__(self, limit: int = TAIL_BYTES) -> None:
        self._limit = limit
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        self._data += data
        # Cut in large steps: a deletion at the front copies the rest.
        if len(self._data) > 2 * self._limit:
            del self._data[: -self._limit]

    def text(self) -> str:
        return self._data[-self._limit :].decode("utf-8", "replace")


def reason(tail: str) -> str:
    """Why it failed, in one line; empty when nothing tells."""
    stripped = (_ANSI.sub("", raw).strip() for raw in tail.splitlines())
    lines = [line for line in stripped if any(c.isalnum() for c in line)]
    for sign in _REASONS:
        for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
            if sign in line:
                return _clean(f"{line} {following}" if line.endswith(":") else line, sign)
    return ""


def _clean(line: str, sign: str) -> str:
    text = line.partition(sign)[2] if sign == "error loading model:" else _PREFIX.sub("", line)
    # Of a line that a model's own words made long, the beginning is enough.
    told = text[: 4 * MAX_REASON_CHARS].strip()
    return _ADDRESS.sub("0x…", _SOURCE.sub(r"\1:", told))[:MAX_REASON_CHARS]


def end_of(returncode: int) -> str:
    """How a process ended, in words."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"
