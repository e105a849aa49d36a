"""`version`: of this program, of the server, and of the engine that runs the models."""

from __future__ import annotations

import typer

from ollama_distributed._version import __version__
from ollama_distributed.cli import output
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel="More")(version)


def version(ctx: typer.Context) -> None:
    """Print the versions of client, server and engine, and the engine's instruction set.

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
        with session.client(retries=0) as client:
            answer = client.version()
        told["server"] = answer.version
        if answer.engine is not None:
            told["engine"] = " ".join(
                filter(None, (answer.engine.name, answer.engine.variant, answer.engine.version))
            )
            told["instruction_set"] = answer.engine.instruction_set
    except ClientError as error:
        problem = error
    told = {name: value for name, value in told.items() if value}
    if session.output == "table":
        rows = (f"{name.replace('_', ' '):16}{clean_line(value)}\n" for name, value in told.items())
        output.write("".join(rows))
    else:
        output.write(output.structured(told, session.output))
    if problem is not None:
        output.note(f"no server: {clean_line(str(problem))}")
