"""Decides when a reasoning model's thoughts are over and a grammar may begin (pure).

A grammar holds from its first token, so under one from the start a model could not reason.
As in Ollama, the thoughts come without it; at the closing tag the answer is generated
again from there, with it. Source: Ollama `server/routes.go`, structured outputs.
"""

from __future__ import annotations

from typing import Literal

Verdict = Literal["unclear", "reasons", "closed", "answers"]
"""Not enough text yet; inside the thoughts; they ended in this text; there are none."""


class Reasoning:
    """Watches the text of one answer."""

    __slots__ = ("_closing", "_inside", "_opening", "_searched", "text", "tokens")

    def __init__(self, tags: tuple[str, str], *, inside: bool) -> None:
        self._opening, self._closing = tags
        self._inside = inside
        self._searched = 0
        self.text = ""
        """All that came; after `closed`, up to the end of the closing tag."""
        self.tokens = 0
        """Counted by who feeds."""

    def feed(self, text: str) -> tuple[Verdict, int]:
        """The verdict, and how many characters of `text` belong to the thoughts."""
        before = len(self.text)
        self.text += text
        if not self._inside:
            begun = self.text.lstrip()
            if not begun.startswith(self._opening):
                return ("unclear" if self._opening.startswith(begun) else "answers"), 0
            self._inside = True
            self._searched = len(self.text) - len(begun) + len(self._opening)
        at = self.text.find(self._closing, self._searched)
        if at < 0:
            # The closing tag may have begun: search again from where it could.
            self._searched = max(self._searched, len(self.text) - len(self._closing) + 1)
            return "reasons", len(text)
        self.text = self.text[: at + len(self._closing)]
        return "closed", len(self.text) - before
