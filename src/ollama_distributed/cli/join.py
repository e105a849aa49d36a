"""`ollama-distributed join`: this machine becomes part of a cluster."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated

import typer

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.cli import output, start
from ollama_distributed.cli.command_line import token_of
from ollama_distributed.cli.session import Session
from ollama_distributed.cluster.identity.tokens import PREFIX, parse_token
from ollama_distributed.node import data_dir as folders
from ollama_distributed.node.settings import Settings

_MAKE_ONE = "On a server of the cluster run:  ollama-distributed cluster token create"


def join(
    ctx: typer.Context,
    token: Annotated[
        str | None,
        typer.Argument(metavar="TOKEN", help="From `cluster token create`; - reads it from stdin."),
    ] = None,
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
    debug: start.Debug = None,
) -> None:
    """Join a cluster with a token, and run as a node of it until Ctrl-C.

    The token comes from a server of the cluster (cluster token create), holds its
    addresses, and works once, for ten minutes. When the node is ready it prints
    one line: ready http://HOST:PORT node=ID. Later starts need `serve` only.

    Where a node runs on this data folder already, that node joins and goes on.

    Without a TOKEN this looks for clusters on the local network, asks which one
    is meant, and then for its token: the network alone lets nobody in.

    A token on the command line is overwritten at once where the system lets us, but
    others on this machine may have seen it, and the shell remembers it. `join -` reads
    it from stdin, or asks for it.

    \b
    Examples:
      ollama-distributed join - < token.txt
      ollama-distributed join - --name gpu2 --label zone=b
      ollama-distributed join odj_server.ab12…
      ollama-distributed join
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
        debug=debug,
    )
    try:
        text = token_of(token) if token else _asked()
        parse_token(text)  # a cut token is told before anything is loaded
        if folders.in_use(settings.data_dir):
            _join_running(ctx, settings, text)
            return
    except OllamaDistributedError as failure:
        typer.echo(f"Error: {failure.message}", err=True)
        raise typer.Exit(1) from failure
    start.run(settings, text)


def _join_running(ctx: typer.Context, settings: Settings, token: str) -> None:
    """Let the node that runs on this folder join."""
    root = ctx.find_root().obj
    session = root if isinstance(root, Session) else Session()
    session.data_dir = str(settings.data_dir)
    with session.client(retries=0, timeout_s=60.0) as client:
        joined = client.cluster.join(token)
    output.note(f"the node that runs here joined cluster {joined.cluster}")


def _asked() -> str:
    """The token, typed in after a choice among the clusters that were found.

    Raises:
        typer.Exit: nobody is there to answer.
    """
    from ollama_distributed.adapters.discovery.mdns import browse

    typer.echo("Looking for clusters on the local network …", err=True)
    nodes = asyncio.run(browse())
    clusters = sorted({node.cluster for node in nodes})
    for number, cluster in enumerate(clusters, start=1):
        here = [node for node in nodes if node.cluster == cluster]
        typer.echo(f"  {number}. cluster {cluster}", err=True)
        for node in here:
            typer.echo(f"       {node.name}  {', '.join(node.addresses)}  version {node.version}", err=True)
    if not clusters:
        typer.echo(
            "None was found. mDNS stays inside one network, and a cluster announces itself only once it "
            f"has made a token.\n{_MAKE_ONE}\nthen here:                        "
            "ollama-distributed join -",
            err=True,
        )
        raise typer.Exit(1)
    if not output.is_terminal(sys.stdin):
        typer.echo(f"A token is needed to join.\n{_MAKE_ONE}", err=True)
        raise typer.Exit(2)
    chosen = clusters[0]
    if len(clusters) > 1:
        number = 0
        while not 1 <= number <= len(clusters):
            number = typer.prompt(f"Which one (1-{len(clusters)})", type=int, err=True)
        chosen = clusters[number - 1]
    pins = {node.ca_sha256 for node in nodes if node.cluster == chosen}
    typer.echo(f"To join {chosen} a token is needed.\n{_MAKE_ONE}", err=True)
    while True:
        text: str = typer.prompt(f"Token ({PREFIX}…)", hide_input=True, err=True).strip()
        try:
            if parse_token(text).ca_sha256 in pins:
                return text
            typer.echo("That token is of another cluster.", err=True)
        except OllamaDistributedError as failure:
            typer.echo(failure.message, err=True)
