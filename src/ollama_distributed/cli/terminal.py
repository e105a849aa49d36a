"""What may reach a terminal, and how it is wrapped.

Pure. A model's text, a model's name and a server's message are untrusted (OWASP LLM05): an
escape sequence in them could move the cursor, set the clipboard or forge output. Control
characters are shown as pictures instead of sent.
"""

from __future__ import annotations

import unicodedata

TAB_COLUMNS = 8
_PICTURES = 0x2400
"""Unicode's pictures of control characters: U+2400 + code."""
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")
"""Marks that turn the reading direction: text could show other than it is."""


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return character if character in "\n\t" else chr(_PICTURES + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or character in _BIDI or character in "\u2028\u2029":
        return f"\\u{code:04x}"
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    return character


_ORDINARY = frozenset(map(chr, range(0x20, 0x7F))) | frozenset("\n\t")


def clean(text: str) -> str:
    """`text` with nothing in it that a terminal would obey, except line ends and tabs.

    Works piece by piece: a sequence cut in two is harmless in both pieces. A carriage return
    before a line end is dropped.
    """
    if _ORDINARY.issuperset(text):
        return text
    return "".join(map(_shown, text.replace("\r\n", "\n")))


def clean_line(text: str) -> str:
    """As `clean`, for one cell or one message: line ends and tabs become spaces."""
    return " ".join(clean(text).split())


def columns(text: str) -> int:
    """Cells that `text` takes in a terminal: East Asian wide ones two, marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


class Wrapper:
    """Breaks a stream of text at spaces so that no word is cut by the terminal's edge.

    A word is held back until it ends. `width` 0: no wrapping.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""

    def feed(self, text: str) -> str:
        """What may be printed now."""
        if self._width <= 0:
            return text
        out: list[str] = []
        for character in text:
            if character == "\n":
                out.append(self._placed())
                out.append("\n")
                self._column, self._space = 0, ""
            elif character in " \t":
                out.append(self._placed())
                self._space += character
            else:
                self._word += character
                if columns(self._word) >= self._width:
                    out.append(self._placed())  # longer than a line: let the terminal cut it
        return "".join(out)

    def finish(self) -> str:
        return self._placed()

    def _placed(self) -> str:
        """The held word with the space before it, or a line end in its place."""
        if not self._word:
            return ""
        space = self._space
        gap = sum(TAB_COLUMNS if c == "\t" else 1 for c in space)
        wide = columns(self._word)
        if self._column and space and self._column + gap + wide > self._width:
            space, gap = "\n", -self._column
        piece = space + self._word
        self._column += gap + wide
        if self._column > self._width:
            self._column %= self._width  # the terminal broke a word longer than its line
        self._word, self._space = "", ""
        return piece
