"""Commands of the node itself, which the base install does not have: `serve`, `join` and `engine`.

They are found by name only when they run, so that everything else starts without the node.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand

from ollama_distributed.cli import output
from ollama_distributed.cli.command_line import BEGINS, wiped
from ollama_distributed.cli.help import PlainCommand

_INSTALL = "Install it with:  pip install 'ollama-distributed[node]'"
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


class PassedOn(TyperCommand):
    """Completed as the command that does the work."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        try:
            found: Any = typer.main.get_command(_loaded(ctx.info_name))
        except ImportError:
            return []  # the node is not installed
        inner = found.make_context(ctx.info_name, [*ctx.args], parent=ctx.parent, resilient_parsing=True)
        if ctx.args and hasattr(found, "commands"):
            name, command, rest = found.resolve_command(inner, [*ctx.args])
            if command is None:
                return []
            inner = command.make_context(name, rest, parent=inner, resilient_parsing=True)
        completed: list[Any] = inner.command.shell_complete(inner, incomplete)
        return completed


def register(app: typer.Typer) -> None:
    app.command(
        "serve", cls=PassedOn, context_settings=_PASSED_ON, add_help_option=False, rich_help_panel="Node"
    )(serve)
    app.command(
        "join", cls=PassedOn, context_settings=_PASSED_ON, add_help_option=False, rich_help_panel="Node"
    )(join)
    app.command(
        "engine", cls=PassedOn, context_settings=_PASSED_ON, add_help_option=False, rich_help_panel="Node"
    )(engine)


def serve(ctx: typer.Context) -> None:
    """Run a node on this machine."""
    _run(ctx)


def join(ctx: typer.Context) -> None:
    """Make this machine part of a cluster, and run its node."""
    for argument in ctx.args:
        if argument.startswith(BEGINS):
            wiped(argument)  # before the node is imported, which takes seconds
    _run(ctx)


def engine(ctx: typer.Context) -> None:
    """Build and test the inference engine for this machine's CPU."""
    _run(ctx)


def _run(ctx: typer.Context) -> None:
    """Hand the rest of the command line to the command that does the work."""
    assert ctx.info_name is not None
    try:
        found = _loaded(ctx.info_name)
    except ImportError as missing:
        if (missing.name or "").startswith("ollama_distributed"):
            raise  # a defect of ours, not a missing extra
        output.error(
            f"this command needs the node, which is not installed ({missing.name} is missing)", _INSTALL
        )
        raise typer.Exit(1) from missing
    given = (
        ["--data-dir", ctx.obj.data_dir] if ctx.obj.data_dir and ctx.info_name in ("serve", "join") else []
    )
    typer.main.get_command(found).main(args=[*given, *ctx.args], prog_name=ctx.info_name, parent=ctx.parent)


def _loaded(name: str) -> typer.Typer:
    """
    Raises:
        ImportError: the node is not installed.
    """
    module = import_module(f"ollama_distributed.cli.{name}")
    if name == "engine":
        group: typer.Typer = module.app
        return group
    single = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    single.command(name, cls=PlainCommand)(getattr(module, name))
    return single
