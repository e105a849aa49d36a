"""Prints results: data to stdout (table, JSON or YAML), everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ollama_distributed.cli.terminal import clean_line, columns

if TYPE_CHECKING:
    from rich.console import Console

    from ollama_distributed.cli.session import Output

_GAP = "    "
"""Between columns, as Ollama's tables have it."""


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def colour(stream: TextIO) -> bool:
    """https://no-color.org: a variable that is set and not empty turns colour off."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour(stream) else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns without lines: readable, and easy for `awk`."""
    cells = [[clean_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(columns(row[n]) for row in cells) for n in range(len(header))]
    lines = (
        _GAP.join(
            cell + " " * (width - columns(cell)) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines) + "\n"


def structured(data: Any, output: Output) -> str:
    """`data` (structs, lists, dicts) as JSON or YAML."""
    import msgspec

    if output == "yaml":
        import yaml

        return yaml.safe_dump(msgspec.to_builtins(data), sort_keys=False, allow_unicode=True)
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n"


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for the person at the terminal, beside the data."""
    print(text, file=sys.stderr, flush=True)


def error(message: str, hint: str = "") -> None:
    """What went wrong, and what to do next."""
    note(f"{styled('Error:', '1;31', sys.stderr)} {clean_line(message)}")
    if hint:
        note(hint)


def progress_console() -> Console:
    """A rich console on stderr, plain when stderr is no terminal."""
    from rich.console import Console

    return Console(stderr=True, no_color=not colour(sys.stderr), highlight=False, markup=False)
