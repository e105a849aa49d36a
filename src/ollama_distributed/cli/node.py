"""Commands of the node itself, which the base install does not have: `serve`, `join` and `engine`.

They are found by name only when they run, so that everything else starts without the node.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.help import PlainCommand

_INSTALL = "Install it with:  pip install 'ollama-distributed[node]'"
_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    app.command("serve", context_settings=_PASSED_ON, add_help_option=False, rich_help_panel="Node")(serve)
    app.command("join", context_settings=_PASSED_ON, add_help_option=False, rich_help_panel="Node")(join)
    app.command("engine", context_settings=_PASSED_ON, add_help_option=False, rich_help_panel="Node")(engine)


def serve(ctx: typer.Context) -> None:
    """Run a node on this machine."""
    _run(ctx, "ollama_distributed.cli.serve", "serve")


def join(ctx: typer.Context) -> None:
    """Make this machine part of a cluster, and run its node."""
    _run(ctx, "ollama_distributed.cli.join", "join")


def engine(ctx: typer.Context) -> None:
    """Build and test the inference engine for this machine's CPU."""
    _run(ctx, "ollama_distributed.cli.engine", "app")


def _run(ctx: typer.Context, module_name: str, attribute: str) -> None:
    """Hand the rest of the command line to the command in that module."""
    try:
        found: Any = getattr(import_module(module_name), attribute)
    except ImportError as missing:
        if (missing.name or "").startswith("ollama_distributed"):
            raise  # a defect of ours, not a missing extra
        output.error(
            f"this command needs the node, which is not installed ({missing.name} is missing)", _INSTALL
        )
        raise typer.Exit(1) from missing
    if not isinstance(found, typer.Typer):
        single = typer.Typer(
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        single.command(ctx.info_name, cls=PlainCommand)(found)
        found = single
    given = (
        ["--data-dir", ctx.obj.data_dir] if ctx.obj.data_dir and ctx.info_name in ("serve", "join") else []
    )
    typer.main.get_command(found).main(args=[*given, *ctx.args], prog_name=ctx.info_name, parent=ctx.parent)
