"""Refuses regular expressions of JSON schemas that llama.cpp's llguidance cannot compile. Pure.

It takes Rust's syntax without anchors inside a text, word boundaries, look-around and
back-references; for anything else the wheel drops the whole schema without a word.
Source: tried on llama.cpp b11549; docs.rs/regex (syntax).
"""

from __future__ import annotations

import re

from ollama_distributed.base.errors import Invalid

_ESCAPES = re.compile(
    r"\\(?:[dDwWsSnrtfv]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[pP](?:\{\^?[\w=]+\}|[A-Z])|[^\w<>\s])", re.ASCII
)
_PROPERTY = re.compile(r"\\[pP](?:\{\^?[\w=]+\}|[A-Z])")
_REPEAT = re.compile(r"\{\d+(?:,\d*)?\}")
_GROUP = re.compile(r"\(\?(?:P?<[A-Za-z_]\w*>|(?:[ims]+(?:-[ims]+)?|-[ims]+)?:)|\((?!\?)", re.ASCII)
_FLAGS = re.compile(r"\(\?[ims]+\)")


def check_pattern(pattern: object) -> None:
    """Raises:
    Invalid: the engine would ignore a schema with it.
    """
    if not isinstance(pattern, str):
        raise Invalid(f"format: pattern must be a string, not {str(pattern)[:40]!r}")
    if reason := _Walk(pattern).reason():
        raise Invalid(f"format: the pattern {pattern[:80]!r} has {reason}, which the engine cannot keep")
    python = _PROPERTY.sub(r"\\w", pattern).replace(r"\z", r"\Z")
    python = re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", python)
    try:
        re.compile(python)
    except (re.error, RecursionError, OverflowError) as exc:
        raise Invalid(f"format: the pattern {pattern[:80]!r} does not compile: {exc}") from exc


class _Walk:
    """One walk over a pattern, up to the first thing that cannot be kept."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._start = True
        """Nothing was matched before: `^` may stand here."""
        self._ended = False
        """Behind `$`: nothing may be matched any more."""
        self._groups = [(True, False)]
        """Of the text and each open group: `_start` where it begins; whether a branch ended."""

    def reason(self) -> str:
        while self._at < len(self._text):
            if found := self._step():
                return found
        return ""

    def _step(self) -> str:
        match self._text[self._at]:
            case "^":
                return self._begin(1)
            case "$":
                self._ended = True
                self._at += 1
            case "\\":
                return self._escape()
            case "[":
                return self._class() or self._matched()
            case "(":
                return self._open()
            case ")":
                _, ended = self._groups.pop() if len(self._groups) > 1 else self._groups[0]
                self._ended |= ended
                self._start = False
                self._at += 1
            case "|":
                start, ended = self._groups[-1]
                self._groups[-1] = (start, ended or self._ended)
                self._start, self._ended = start, False
                self._at += 1
            case "*" | "+" | "?":
                self._at += 1
            case "{":
                found = _REPEAT.match(self._text, self._at)
                if not found:
                    return "a bare { (write \\{)"
                self._at = found.end()
            case _:
                self._at += 1
                return self._matched()
        return ""

    def _begin(self, length: int) -> str:
        self._at += length
        return "" if self._start else "^ inside"

    def _matched(self) -> str:
        self._start = False
        return "something behind $" if self._ended else ""

    def _escape(self) -> str:
        escape = self._text[self._at : self._at + 2]
        if escape == r"\A":
            return self._begin(2)
        if escape == r"\z":
            self._ended = True
            self._at += 2
            return ""
        found = _ESCAPES.match(self._text, self._at)
        if not found:
            return escape
        self._at = found.end()
        return self._matched()

    def _open(self) -> str:
        if flags := _FLAGS.match(self._text, self._at):
            self._at = flags.end()
            return ""
        found = _GROUP.match(self._text, self._at)
        if not found:
            return self._text[self._at : self._at + 4].rstrip()
        self._groups.append((self._start, False))
        self._at = found.end()
        return "something behind $" if self._ended else ""

    def _class(self) -> str:
        self._at += 1
        if self._text.startswith("^", self._at):
            self._at += 1
        if self._text.startswith("]", self._at):
            return "a class that begins with ] (write \\])"
        while self._at < len(self._text):
            two = self._text[self._at : self._at + 2]
            if two[0] == "]":
                self._at += 1
                return ""
            if two[0] == "[":
                return "a bare [ in a class (write \\[)"
            if two in ("&&", "--", "~~"):
                return f"{two} in a class"
            if two[0] == "\\":
                found = _ESCAPES.match(self._text, self._at)
                if not found:
                    return f"{two} in a class"
                self._at = found.end()
            else:
                self._at += 1
        return "a class without its end"
