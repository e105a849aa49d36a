"""`ollama-distributed serve`: start a node in this terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ollama_distributed.cli import start


def serve(
    listen: start.Listen = None,
    data_dir: start.DataDir = None,
    models_dir: start.ModelsDir = None,
    config: start.ConfigFile = None,
    name: start.Name = None,
    cluster_listen: start.ClusterListen = None,
    advertise: start.Advertise = None,
    label: start.Label = None,
    engine: start.EngineChoice = None,
    require_key: start.RequireKey = None,
    join_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For services: join with the token in this file, unless there is no such file or the node "
            "is in a cluster with others already.",
        ),
    ] = None,
    preload: start.PreloadModels = None,
    debug: start.Debug = None,
) -> None:
    """Start a node. It answers the Ollama, OpenAI and Anthropic APIs until Ctrl-C.

    When it is ready it prints one line: ready http://HOST:PORT node=ID

    A fresh node is a cluster of one. To add machines, make a token on it
    (cluster token create) and run `join -` on them; a node that joined is
    started again with `serve` like any other.

    \b
    Examples:
      ollama-distributed serve
      ollama-distributed serve --models-dir ~/.ollama/models
      ollama-distributed serve --listen 127.0.0.1:9000 --data-dir ./node1
      ollama-distributed serve --advertise gpu1.lan --label zone=a
      ollama-distributed serve --preload llama3.2 --preload smollm2:135m
      ollama-distributed serve --listen 127.0.0.1:8080 --listen 0.0.0.0:8443

    Loopback is plain HTTP; any other address has TLS and asks everyone for a key.
    Every setting also works from a file (--config) or the environment; see docs/settings.md.
    """
    settings = start.settings_of(
        config,
        listen=listen,
        data_dir=data_dir,
        models_dir=models_dir,
        name=name,
        cluster_listen=cluster_listen,
        advertise=advertise,
        labels=label,
        engine=engine,
        require_key=require_key,
        preload=preload,
        debug=debug,
    )
    start.run(settings, _token(join_file), if_alone=True)


def _token(file: Path | None) -> str | None:
    if file is None or not file.exists():
        return None
    try:
        return file.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeError) as failure:
        typer.echo(f"Error: the join token in {file} cannot be read: {failure}", err=True)
        raise typer.Exit(2) from failure
