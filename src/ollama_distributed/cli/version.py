"""`version`: of this program, of the server, and of the engine that runs the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ollama_distributed._version import __version__
from ollama_distributed.cli import output
from ollama_distributed.cli.group import LAST_PANEL, Command
from ollama_distributed.cli.session import Session, Target
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.client.wire import Version

_PATIENCE_S = 5.0


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel=LAST_PANEL)(version)


def version(ctx: typer.Context) -> None:
    """Print the versions of client, server and engine, the engine's instruction set and its sandbox.

    \b
    Examples:
      ollama-distributed version
      ollama-distributed version --output json
    """
    from ollama_distributed.client.errors import ClientError

    session: Session = ctx.obj
    told = {"client": __version__}
    problem: ClientError | None = None
    try:
        answer = _server_version(session.target())
        told["server"] = answer.version
        if answer.engine is not None:
            told["engine"] = " ".join(
                filter(None, (answer.engine.name, answer.engine.variant, answer.engine.version))
            )
            told["instruction_set"] = answer.engine.instruction_set
            told["sandbox"] = answer.engine.sandbox
    except ClientError as error:
        problem = error
    told = {name: value for name, value in told.items() if value}
    if session.output == "table":
        rows = (f"{name.replace('_', ' '):15}  {clean_line(value)}\n" for name, value in told.items())
        output.write("".join(rows))
    else:
        output.write(output.structured(told, session.output))
    if problem is not None:
        output.note(f"no server: {clean_line(str(problem))}")


def _server_version(target: Target) -> Version:
    """
    Raises:
        ClientError: no server, or one that refuses.
    """
    from ollama_distributed.cli.asking import ask
    from ollama_distributed.client import calls

    call = calls.version()
    return call.decode(ask(target, call.path, timeout_s=_PATIENCE_S))
