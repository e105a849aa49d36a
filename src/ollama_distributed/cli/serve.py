"""`ollama-distributed serve`: start a node in this terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.node.logs import configure
from ollama_distributed.node.node import run_node
from ollama_distributed.node.settings import read_settings

SWITCH_S = 0.0005
"""How long a worker thread may hold the interpreter while the event loop waits. Python's own
5 ms shows as a gap in every stream while a large body is read (4 MB: 8 ms -> 3-6 ms)."""


def serve(
    listen: Annotated[
        list[str] | None,
        typer.Option(help="HOST:PORT of the API; may be given again. Default: 127.0.0.1:8080 and :11434."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of this node's state. Default: ~/.local/share/ollama-distributed."),
    ] = None,
    models_dir: Annotated[
        Path | None,
        typer.Option(help="Model store; may be an existing ~/.ollama/models. Default: DATA_DIR/models."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; see config/node.yaml.example.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name that people see. Default: the host's name.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, wheel or binary: which llama.cpp runs the models.")
    ] = None,
    require_key: Annotated[
        bool | None, typer.Option("--require-key", help="Ask for a key even from this machine.")
    ] = None,
    debug: Annotated[
        bool | None,
        typer.Option("--debug", help="Debug logs; DEBUGPY_LISTEN=HOST:PORT waits for a debugger there."),
    ] = None,
) -> None:
    """Start a node. It answers the Ollama, OpenAI and Anthropic APIs until Ctrl-C.

    When it is ready it prints one line: ready http://HOST:PORT node=ID

    Examples:

      ollama-distributed serve

      ollama-distributed serve --models-dir ~/.ollama/models

      ollama-distributed serve --listen 127.0.0.1:9000 --data-dir ./node1

    Every setting also works from a file (--config) or the environment; see docs/settings.md.
    """
    try:
        settings = read_settings(
            config,
            listen=listen or None,
            data_dir=data_dir,
            models_dir=models_dir,
            name=name,
            engine=engine,
            require_key=require_key,
            debug=debug,
        )
    except OllamaDistributedError as failure:
        typer.echo(f"Error: {failure.message}", err=True)
        raise typer.Exit(2) from failure
    writer = configure("debug" if settings.debug else settings.log_level, settings.log_format)
    if settings.debug:
        _listen_for_debugger()
    sys.setswitchinterval(SWITCH_S)
    try:
        with asyncio.Runner(debug=settings.debug, loop_factory=_loop_factory()) as runner:
            runner.run(run_node(settings, lambda line: print(line, flush=True)))
    except OllamaDistributedError as failure:
        typer.echo(f"Error: {failure.message}", err=True)
        raise typer.Exit(1) from failure
    finally:
        writer.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _listen_for_debugger() -> None:
    """debugpy on DEBUGPY_LISTEN, when it is set and installed; see CONTRIBUTING.md."""
    where = os.environ.get("DEBUGPY_LISTEN")
    if not where:
        return
    import debugpy  # noqa: T100 - the documented way to debug a running node

    host, _, port = where.rpartition(":")
    debugpy.listen((host or "127.0.0.1", int(port)))  # noqa: T100
