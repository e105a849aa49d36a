"""Results that are shown once, or again and again with `--watch`.

On a terminal a watch redraws itself; into a pipe it prints a line for whatever changed, so that
`grep` and a log file can follow; with `--output json` or `yaml` each look is one document.
Ctrl-C is how a watch ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ollama_distributed.cli import output, tables
from ollama_distributed.cli.tables import Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from rich.live import Live

    from ollama_distributed.cli.session import Output, Session

PATIENCE_S = 5.0
"""A watch tells after so long that nobody answers, and asks again."""

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Go on and show what changes, until Ctrl-C.")]
Every = Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="How often, with --watch.")]
EVERY_S = 1.0


class View(NamedTuple):
    """One result, in each of its forms."""

    data: Any
    """Structs, lists, dicts: for json and yaml."""
    text: Callable[[Look], str]
    lines: Mapping[str, Sequence[str]]
    """For a watch into a pipe: a thing's name -> what is told when any of it changes."""


def show(session: Session, view: View) -> None:
    if session.output == "table":
        output.write(view.text(tables.look()))
    else:
        output.write(output.structured(view.data, session.output))


def watch(session: Session, ask: Callable[[], View], every_s: float) -> None:
    """Show what `ask` answers now and every `every_s` seconds, until Ctrl-C.

    A server that is away for a while is waited for; what it refuses is raised.
    """
    try:
        if session.output == "table" and output.is_terminal(sys.stdout):
            _redraw(ask, every_s)
        else:
            _print(session.output, ask, every_s)
    except KeyboardInterrupt:
        return


def _asked(ask: Callable[[], View]) -> View | str:
    """The view, or why there is none now."""
    from ollama_distributed.client.errors import ClientError

    try:
        return ask()
    except ClientError as error:
        if not error.retryable:
            raise
        return clean_line(str(error))


def _redraw(ask: Callable[[], View], every_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, soft_wrap=True)
    shown: View | None = None
    answered = time.monotonic()
    with Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        while True:
            found = _asked(ask)
            if isinstance(found, View):
                shown, answered = found, time.monotonic()
                _draw(live, shown.text(tables.look()))
            else:
                seen = shown.text(tables.look()) if shown else ""
                away = f"no answer for {time.monotonic() - answered:.0f} s: {found}"
                _draw(live, seen + tables.painted(away, tables.RED, tables.look()))
            time.sleep(every_s)


def _draw(live: Live, text: str) -> None:
    from rich.text import Text

    live.update(Text.from_ansi(text.rstrip("\n"), no_wrap=True), refresh=True)


def _print(form: Output, ask: Callable[[], View], every_s: float) -> None:
    import msgspec

    told: dict[str, Sequence[str]] = {}
    away = ""
    while True:
        found = _asked(ask)
        if isinstance(found, str):
            if found != away:
                output.note(found)
            away = found
        else:
            away = ""
            match form:
                case "json":
                    output.write(msgspec.json.encode(found.data).decode() + "\n")
                case "yaml":
                    output.write("---\n" + output.structured(found.data, form))
                case "table":
                    _tell_changes(found, told)
        time.sleep(every_s)


def _tell_changes(view: View, told: dict[str, Sequence[str]]) -> None:
    stamp = time.strftime("%H:%M:%S")
    for name, cells in view.lines.items():
        if told.get(name) != cells:
            output.write("  ".join((stamp, clean_line(name), *map(clean_line, cells))) + "\n")
            told[name] = cells
    for name in [name for name in told if name not in view.lines]:
        output.write(f"{stamp}  {clean_line(name)}  gone\n")
        del told[name]
