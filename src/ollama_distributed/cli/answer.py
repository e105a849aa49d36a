"""Prints an answer as it comes: thinking apart, words not cut, nothing that a terminal would obey."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TextIO

from ollama_distributed.cli import humanize, output
from ollama_distributed.cli.terminal import Wrapper, clean

if TYPE_CHECKING:
    from ollama_distributed.client.wire import Timings, ToolCall

_DIM = "\x1b[2m"
_PLAIN = "\x1b[0m"


@dataclass
class Look:
    """How answers are shown; the REPL's /set changes it."""

    wrap: bool = True
    hide_thinking: bool = False
    verbose: bool = False


class Piece(NamedTuple):
    """A piece of any kind of answer."""

    text: str
    thinking: str
    tool_calls: Iterable[ToolCall]
    last: Timings | None


class Printed(NamedTuple):
    text: str
    thinking: str


def print_answer(pieces: Iterable[Piece], look: Look, out: TextIO | None = None) -> Printed:
    """Print the pieces; what was said, for the conversation's memory."""
    return Printer(look, out or sys.stdout).all(pieces)


class Printer:
    def __init__(self, look: Look, out: TextIO) -> None:
        self._look = look
        self._out = out
        self._terminal = output.is_terminal(out)
        self._colour = output.colour(out)
        self._wrapper = self._new_wrapper()
        self._thinking = False
        self._said: list[str] = []
        self._thought: list[str] = []

    def all(self, pieces: Iterable[Piece]) -> Printed:
        timings: Timings | None = None
        begun = False
        try:
            for piece in pieces:
                begun = True
                self._think(piece.thinking)
                self._say(piece.text)
                for call in piece.tool_calls:
                    self._call(call)
                timings = piece.last or timings
        finally:
            if begun:  # what was refused has no line to end
                self._end()
        if timings is not None and self._look.verbose:
            sys.stderr.write(timing_lines(timings))
        return Printed("".join(self._said), "".join(self._thought))

    def _new_wrapper(self) -> Wrapper:
        wraps = self._terminal and self._look.wrap
        return Wrapper(shutil.get_terminal_size().columns - 1 if wraps else 0)

    def _put(self, text: str) -> None:
        self._out.write(self._wrapper.feed(clean(text) if self._terminal else text))
        self._out.flush()

    def _think(self, text: str) -> None:
        if not text:
            return
        self._thought.append(text)
        if self._look.hide_thinking:
            return
        if not self._thinking:
            self._thinking = True
            self._put("Thinking...\n")
            self._out.write(_DIM if self._colour else "")
        self._put(text)

    def _stop_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            self._out.write(self._wrapper.finish() + (_PLAIN if self._colour else ""))
            self._wrapper = self._new_wrapper()
            self._put("\n...done thinking.\n\n")

    def _say(self, text: str) -> None:
        if text:
            self._stop_thinking()
            self._said.append(text)
            self._put(text)

    def _call(self, call: ToolCall) -> None:
        import msgspec

        self._stop_thinking()
        arguments = msgspec.json.encode(call.function.arguments).decode()
        self._put(f"{call.function.name}({arguments})\n")

    def _end(self) -> None:
        """Also when it broke: colours off, the cursor on a line of its own."""
        self._out.write(self._wrapper.finish())
        if self._thinking and self._colour:
            self._out.write(_PLAIN)
        self._out.write("\n\n" if self._terminal else "\n")
        self._out.flush()


def timing_lines(timings: Timings) -> str:
    """`--verbose`, as Ollama prints it."""
    rows: list[tuple[str, str]] = [
        ("total duration", humanize.precise(timings.total_duration)),
        ("load duration", humanize.precise(timings.load_duration)),
    ]
    for name, tokens, took_ns in (
        ("prompt eval", timings.prompt_eval_count, timings.prompt_eval_duration),
        ("eval", timings.eval_count, timings.eval_duration),
    ):
        if tokens:
            rows.append((f"{name} count", f"{tokens} token(s)"))
        if took_ns:
            rows.append((f"{name} duration", humanize.precise(took_ns)))
            rows.append((f"{name} rate", f"{tokens / took_ns * 1e9:.2f} tokens/s"))
    return "".join(f"{name + ':':<22}{value}\n" for name, value in rows)
