"""Tables for people: colour, bars, and as many columns as the terminal is wide.

Pure but for `look()`. Where nobody looks (a pipe, a file) there is neither colour nor bars.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ollama_distributed.cli import output
from ollama_distributed.cli.terminal import clean_line, columns

BOLD, DIM, RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN = "1", "2", "31", "32", "33", "34", "35", "36"
"""SGR codes (ECMA-48 8.3.117): the eight colours that every terminal's theme sets."""
_GAP = "  "
_BAR_CELLS = 8
_BUSY, _FULL = 0.7, 0.9
"""Shares from which a bar is yellow, then red."""


class Look(NamedTuple):
    """What the reader can see."""

    colour: bool = False
    bars: bool = False
    """It is a terminal that shows block characters."""
    width: int | None = None
    """Columns; None: nobody looks."""


def look() -> Look:
    """Of stdout."""
    if not output.is_terminal(sys.stdout):
        return Look()
    blocks = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" and os.environ.get(
        "TERM"
    ) not in ("dumb", "linux")
    return Look(output.colour(sys.stdout), blocks, shutil.get_terminal_size().columns)


class Cell(NamedTuple):
    text: str
    style: str = ""


class Column(NamedTuple):
    """A column of a table over rows of one kind."""

    title: str
    cells: Sequence[Cell]
    rank: int = 0
    """What does not fit is left out, the highest rank first; 0 never."""


def table(wanted: Sequence[Column], look: Look) -> str:
    """Left-aligned columns without lines."""
    shown = [*wanted]
    widths = [_width(column) for column in shown]
    while look.width is not None and sum(widths) + len(_GAP) * (len(shown) - 1) > look.width:
        worst = max(range(len(shown)), key=lambda n: shown[n].rank)
        if shown[worst].rank == 0:
            break
        del shown[worst], widths[worst]
    head = [Cell(column.title, DIM) for column in shown]
    rows = [head, *([column.cells[n] for column in shown] for n in range(len(shown[0].cells)))]
    return "".join(_line(row, widths, look) + "\n" for row in rows)


def _width(column: Column) -> int:
    return max(columns(clean_line(text)) for text in (column.title, *(cell.text for cell in column.cells)))


def _line(row: Sequence[Cell], widths: Sequence[int], look: Look) -> str:
    cells = []
    for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
        text = clean_line(cell.text)
        gap = "" if number == len(row) - 1 else " " * (width - columns(text))
        cells.append(painted(text, cell.style, look) + gap)
    return _GAP.join(cells).rstrip()


def painted(text: str, style: str, look: Look) -> str:
    return f"\x1b[{style}m{text}\x1b[0m" if look.colour and style and text else text


def share(value: float | None, look: Look, *, stale: bool = False) -> Cell:
    """A share of 0..1 as a bar and percent; `stale`: it is old."""
    if value is None:
        return Cell("-", DIM)
    value = min(max(value, 0.0), 1.0)
    text = f"{value:4.0%}"
    if look.bars:
        full = round(value * _BAR_CELLS)
        text = "█" * full + "░" * (_BAR_CELLS - full) + " " + text
    style = DIM if stale else RED if value >= _FULL else YELLOW if value >= _BUSY else GREEN
    return Cell(text, style)


def facts(rows: Iterable[tuple[str, Cell]], look: Look) -> str:
    """Names and values, one a line, longer ones below each other; rows without a value are left out."""
    kept = [(name, cell) for name, cell in rows if cell.text]
    width = max((len(name) for name, _ in kept), default=0)
    indent = "\n" + " " * (width + len(_GAP))
    return "".join(
        f"{painted(name.ljust(width), DIM, look)}{_GAP}"
        f"{indent.join(painted(line, cell.style, look) for line in _lines(cell.text, width, look))}\n"
        for name, cell in kept
    )


def _lines(text: str, name_columns: int, look: Look) -> list[str]:
    """The value of a fact in as many lines as it takes; a word is never cut."""
    text = clean_line(text)
    if look.width is None:
        return [text]
    room = max(look.width - name_columns - len(_GAP), 20)
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)


def note(mark: str, text: str, style: str, look: Look) -> str:
    """A sentence under a table, wrapped at the terminal's edge; `mark` stands before it."""
    text = clean_line(text)
    if look.width is None:
        lines = [mark + text]
    else:
        lines = textwrap.wrap(
            text, max(look.width, 20), initial_indent=mark, subsequent_indent=" " * len(mark)
        )
    return "".join(painted(line, style, look) + "\n" for line in lines)
