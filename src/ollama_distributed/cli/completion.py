"""`completion`: shell completion for bash, zsh and fish; names of models come from the server."""

from __future__ import annotations

from typing import Annotated

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session

_PROGRAM = "ollama-distributed"
_VARIABLE = "_OLLAMA_DISTRIBUTED_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
_PATIENCE_S = 1.0
"""Someone waits with a finger on the tab key."""


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel="More")(completion)


def _shells() -> list[str]:
    return list(SHELLS)


def completion(
    shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", autocompletion=_shells)],
    install: Annotated[bool, typer.Option("--install", help="Write it into the shell's settings.")] = False,
) -> None:
    """Print (or install) the completion of commands, options and model names.

    \b
    Examples:
      ollama-distributed completion bash --install
      source <(ollama-distributed completion zsh)
    """
    if shell not in SHELLS:
        raise typer.BadParameter("choose bash, zsh or fish", param_hint="SHELL")
    from typer import _completion_shared as scripts

    if install:
        _, path = scripts.install(shell=shell, prog_name=_PROGRAM, complete_var=_VARIABLE)
        output.note(f"written to {path}; it works in new terminals")
    else:
        output.write(
            scripts.get_completion_script(prog_name=_PROGRAM, complete_var=_VARIABLE, shell=shell) + "\n"
        )


def model_names(ctx: typer.Context) -> list[str]:
    """Names of the server's models; none when there is no server within a moment."""
    return _names(ctx, loaded=False)


def loaded_names(ctx: typer.Context) -> list[str]:
    """Names of the models in memory."""
    return _names(ctx, loaded=True)


def _names(ctx: typer.Context, *, loaded: bool) -> list[str]:
    from ollama_distributed.client.errors import ClientError

    asked = ctx.find_root().params
    session = Session(host=asked.get("host"), api_key=asked.get("api_key"), data_dir=asked.get("data_dir"))
    try:
        with session.client(retries=0, timeout_s=_PATIENCE_S) as client:
            found = client.models.loaded() if loaded else client.models.list()
            return [model.name for model in found]
    except (ClientError, Problem):
        return []  # a key press must never print an error
