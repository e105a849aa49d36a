"""Commands that move models from and to registries: pull and push."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.bars import bars, follow
from ollama_distributed.cli.completion import model_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.library import PANEL
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.client.wire import Progress

Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="As Ollama's; which registries speak plain http is said in the server's settings.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel=PANEL)(pull)
    app.command(cls=Command, rich_help_panel=PANEL)(push)


def pull(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    insecure: Insecure = False,
) -> None:
    """Fetch a model from its registry; Ctrl-C keeps what came, and the next pull goes on from there.

    \b
    Examples:
      ollama-distributed pull smollm2:135m
      ollama-distributed pull hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
      ollama-distributed pull registry.example:5000/team/model:v1
    """
    session: Session = ctx.obj
    with session.client() as client:
        _show(session, client.models.pull(model, insecure=insecure))


def push(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)],
    insecure: Insecure = False,
) -> None:
    """Send a model to the registry that its name says.

    \b
    Examples:
      ollama-distributed cp mymodel registry.example:5000/team/mymodel
      ollama-distributed push registry.example:5000/team/mymodel
    """
    session: Session = ctx.obj
    with session.client() as client:
        _show(session, client.models.push(model, insecure=insecure))


def _show(session: Session, lines: Iterable[Progress]) -> None:
    match session.output:
        case "table":
            with bars() as progress:
                follow(lines, progress)
        case "json":
            import msgspec

            for line in lines:
                output.write(msgspec.json.encode(line).decode() + "\n")
        case "yaml":
            for line in lines:
                output.write("---\n" + output.structured(line, "yaml"))
