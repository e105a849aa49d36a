"""`ollama-distributed serve`: start a node in this terminal."""

from __future__ import annotations

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
    debug: start.Debug = None,
) -> None:
    """Start a node. It answers the Ollama, OpenAI and Anthropic APIs until Ctrl-C.

    When it is ready it prints one line: ready http://HOST:PORT node=ID

    A fresh node is a cluster of one. To add machines, make a token on it
    (cluster token create) and run `join TOKEN` on them; a node that joined is
    started again with `serve` like any other.

    Examples:

      ollama-distributed serve

      ollama-distributed serve --models-dir ~/.ollama/models

      ollama-distributed serve --listen 127.0.0.1:9000 --data-dir ./node1

      ollama-distributed serve --advertise gpu1.lan --label zone=a

    Every setting also works from a file (--config) or the environment; see docs/settings.md.
    """
    start.run(
        start.settings_of(
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
    )
