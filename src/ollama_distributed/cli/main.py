"""`ollama-distributed`: the program. Builds the commands; their work is imported when they run.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ollama_distributed._version import __version__
from ollama_distributed.cli.group import Group, output_of
from ollama_distributed.cli.help import GLOBAL_PANEL
from ollama_distributed.cli.session import Session

COMPLETE_VARIABLE = "_OLLAMA_DISTRIBUTED_COMPLETE"
"""Set by the shells' completion scripts."""

app = typer.Typer(
    name="ollama-distributed",
    cls=Group,
    help="Run models on one machine or many, behind one endpoint.\n\n\b\n"
    "Examples:\n"
    "  ollama-distributed serve\n"
    "  ollama-distributed pull smollm2:135m\n"
    "  ollama-distributed import model.gguf --name mymodel\n"
    '  ollama-distributed run mymodel "Why is the sky blue?"\n'
    "  ollama-distributed list --output json\n"
    "  ollama-distributed cluster status --watch",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ollama-distributed {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The server: host, host:port or URL. Default: OLLAMA_HOST, else this machine's node.",
            rich_help_panel=GLOBAL_PANEL,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="table|json|yaml",
            help="How results are printed.",
            rich_help_panel=GLOBAL_PANEL,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Default: OLLAMA_API_KEY, else the admin's key of this machine's node.",
            rich_help_panel=GLOBAL_PANEL,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The node's data folder, in which its admin.json is found. "
            "Default: OLLAMA_DISTRIBUTED_DATA_DIR, else ~/.local/share/ollama-distributed.",
            rich_help_panel=GLOBAL_PANEL,
        ),
    ] = None,
    version: Annotated[  # noqa: ARG001 - its callback acts
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    ctx.obj = Session(host=host, api_key=api_key, data_dir=data_dir)
    if output is not None:
        ctx.obj.output = output_of(output)


def _register() -> None:
    from ollama_distributed.cli import (
        audit,
        batch,
        cluster,
        completion,
        config,
        create,
        events,
        inference,
        keys,
        library,
        login,
        model,
        node,
        nodes,
        policies,
        queue,
        registry,
        route,
        usage,
        users,
        version,
    )

    for module in (
        node,
        inference,
        library,
        model,
        registry,
        create,
        batch,
        cluster,
        nodes,
        queue,
        events,
        config,
        keys,
        policies,
        users,
        login,
        route,
        usage,
        audit,
        version,
        completion,
    ):
        module.register(app)


_register()


def main() -> None:
    # httpx also brings a command line of its own, which imports rich, click and pygments: 0.2 s of
    # this program's start. It treats that part as optional, so in this process it is not there.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # None: not there
    if COMPLETE_VARIABLE in os.environ:
        from typer._completion_classes import completion_init

        completion_init()
    app(prog_name="ollama-distributed")


if __name__ == "__main__":
    main()
