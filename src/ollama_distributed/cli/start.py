"""What `serve` and `join` share: the options of a node, and running one in this terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.cli import output
from ollama_distributed.node.logs import configure
from ollama_distributed.node.node import run_node
from ollama_distributed.node.settings import PREFIX, Settings, read_settings
from ollama_distributed.node.settings_errors import unknown_variables

SWITCH_S = 0.0005
"""How long a worker thread may hold the interpreter while the event loop waits. Python's own
5 ms shows as a gap in every stream while a large body is read (4 MB: 8 ms -> 3-6 ms)."""

Listen = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Address of the API; may be given again. Default: 127.0.0.1:8080 and :11434.",
    ),
]
ClusterListen = Annotated[
    str | None,
    typer.Option(
        metavar="HOST[:PORT]",
        help="Where other machines of the cluster connect, once there is a cluster. Default: all "
        "interfaces, port 7443 (a free one if it is taken).",
    ),
]
Advertise = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST",
        help="Address or name under which other machines reach this one; may be given again.",
    ),
]
Label = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Label of this node; may be given again.")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of this node's state. Default: ~/.local/share/ollama-distributed."
    ),
]
ModelsDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Model store; may be an existing ~/.ollama/models. Default: DATA_DIR/models."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file of settings; see config/node.yaml.example."),
]
Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name that people see. Default: the host's name.")
]
EngineChoice = Annotated[
    str | None, typer.Option(metavar="auto|wheel|binary", help="Which llama.cpp runs the models.")
]
RequireKey = Annotated[
    bool | None, typer.Option("--require-key", help="Ask for a key even from this machine.")
]
PreloadModels = Annotated[
    list[str] | None,
    typer.Option(
        "--preload",
        metavar="MODEL",
        help="Load it when the node has started, fetched if need be; may be given again.",
    ),
]
Debug = Annotated[
    bool | None,
    typer.Option("--debug", help="Debug logs; DEBUGPY_LISTEN=HOST:PORT waits for a debugger there."),
]


def settings_of(config: Path | None, **flags: Any) -> Settings:
    """The node's settings; a wrong one ends the program with exit code 2."""
    for line in unknown_variables(os.environ, PREFIX, Settings.model_fields):
        output.note(line)
    try:
        return read_settings(config, **{name: value for name, value in flags.items() if value != []})
    except OllamaDistributedError as failure:
        typer.echo(f"Error: {failure.message}", err=True)
        raise typer.Exit(2) from failure


def run(settings: Settings, token: str | None = None, *, if_alone: bool = False) -> None:
    """Run a node until it is told to stop. `token`: join with it first; `if_alone`: unless it is
    in a cluster with others already."""
    writer = configure("debug" if settings.debug else settings.log_level, settings.log_format)
    if settings.debug:
        _listen_for_debugger()
    sys.setswitchinterval(SWITCH_S)
    try:
        with asyncio.Runner(debug=settings.debug, loop_factory=_loop_factory()) as runner:
            runner.run(
                run_node(settings, lambda line: print(line, flush=True), token=token, if_alone=if_alone)
            )
    except OllamaDistributedError as failure:
        typer.echo(f"Error: {failure.message}", err=True)
        raise typer.Exit(1) from failure
    finally:
        writer.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    from ollama_distributed.node.loop import NodeLoop

    return NodeLoop


def _listen_for_debugger() -> None:
    """debugpy on DEBUGPY_LISTEN, when it is set and installed; see CONTRIBUTING.md."""
    where = os.environ.get("DEBUGPY_LISTEN")
    if not where:
        return
    import debugpy  # noqa: T100 - the documented way to debug a running node

    host, _, port = where.rpartition(":")
    debugpy.listen((host or "127.0.0.1", int(port)))  # noqa: T100 - as above
