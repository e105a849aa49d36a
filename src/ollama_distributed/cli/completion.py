"""`completion`: shell completion for bash, zsh and fish; names of models come from the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.group import LAST_PANEL, Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.client.sync import SyncClient

_PROGRAM = "ollama-distributed"
_VARIABLE = "_OLLAMA_DISTRIBUTED_COMPLETE"
SHELLS = ("bash", "zsh", "fish")
_BASH = f"""\
_ollama_distributed_completion() {{
    local IFS=$' \\t\\n' line="${{COMP_LINE:0:$COMP_POINT}}" words cur
    read -ra words <<< "$line"
    [[ "$line" == *[[:space:]] ]] && words+=("''")
    cur="${{words[-1]}}"
    IFS=$'\\n'
    COMPREPLY=( $( env COMP_WORDS="${{words[*]}}" COMP_CWORD=$(( ${{#words[@]}} - 1 )) \\
                   {_VARIABLE}=complete_bash "$1" ) )
    [[ "$cur" == *:* ]] && COMPREPLY=( "${{COMPREPLY[@]#"${{cur%"${{cur##*:}}"}}"}}" )
    return 0
}}
complete -o default -F _ollama_distributed_completion {_PROGRAM}
"""
"""Ours for bash, whose words end at a colon: `smollm2:13` would never become `smollm2:135m`."""
_PATIENCE_S = 1.0
"""Someone waits with a finger on the tab key."""


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel=LAST_PANEL)(completion)


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

    script = (
        _BASH
        if shell == "bash"
        else scripts.get_completion_script(prog_name=_PROGRAM, complete_var=_VARIABLE, shell=shell) + "\n"
    )
    if not install:
        output.write(script)
        return
    _, path = scripts.install(shell=shell, prog_name=_PROGRAM, complete_var=_VARIABLE)
    if shell == "bash":
        path.write_text(script)
    output.note(f"written to {path}; it works in new terminals")


def model_names(ctx: typer.Context) -> list[str]:
    """Names of the server's models; none when there is no server within a moment."""
    return _names(ctx, loaded=False)


def loaded_names(ctx: typer.Context) -> list[str]:
    """Names of the models in memory."""
    return _names(ctx, loaded=True)


def node_names(ctx: typer.Context) -> list[str]:
    """Names of the cluster's nodes."""
    return _asked(ctx, lambda client: [node.name for node in client.nodes.list()])


def policy_names(ctx: typer.Context) -> list[str]:
    return _asked(ctx, lambda client: [policy.name for policy in client.policies.list()])


def user_names(ctx: typer.Context) -> list[str]:
    return _asked(ctx, lambda client: [user.name for user in client.users.list()])


def key_ids(ctx: typer.Context) -> list[str]:
    return _asked(ctx, lambda client: [key.id for key in client.keys.list()])


def set_names(ctx: typer.Context) -> list[str]:
    """Names of the settings that the cluster sets."""
    return _asked(ctx, lambda client: list(client.config.get().values))


def _names(ctx: typer.Context, *, loaded: bool) -> list[str]:
    def ask(client: SyncClient) -> list[str]:
        found = client.models.loaded() if loaded else client.models.list()
        return [model.name for model in found]

    return _asked(ctx, ask)


def _asked(ctx: typer.Context, ask: Callable[[SyncClient], list[str]]) -> list[str]:
    from ollama_distributed.client.errors import ClientError

    asked = ctx.find_root().params
    session = Session(host=asked.get("host"), api_key=asked.get("api_key"), data_dir=asked.get("data_dir"))
    try:
        with session.client(retries=0, timeout_s=_PATIENCE_S) as client:
            return ask(client)
    except (ClientError, Problem):
        return []  # a key press must never print an error
