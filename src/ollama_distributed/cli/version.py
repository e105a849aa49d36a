"""`version`: of this program, of the server, and of the engine that runs the models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from ollama_distributed._version import __version__
from ollama_distributed.cli import output
from ollama_distributed.cli.group import LAST_PANEL, Command
from ollama_distributed.cli.session import Session, Target
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.client.wire import Version

_PATIENCE_S = 5.0


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel=LAST_PANEL)(version)


def version(ctx: typer.Context) -> None:
    """Print the versions of client, server and engine, the engine's instruction set and its sandbox.

    \b
    Examples:
      ollama-distributed version
      ollama-distributed version --output json
    """
    from ollama_distributed.client.errors import ClientError

    session: Session = ctx.obj
    told = {"client": __version__}
    problem: ClientError | None = None
    try:
        answer = _server_version(session.target())
        told["server"] = answer.version
        if answer.engine is not None:
            told["engine"] = " ".join(
                filter(None, (answer.engine.name, answer.engine.variant, answer.engine.version))
            )
            told["instruction_set"] = answer.engine.instruction_set
            told["sandbox"] = answer.engine.sandbox
    except ClientError as error:
        problem = error
    told = {name: value for name, value in told.items() if value}
    if session.output == "table":
        rows = (f"{name.replace('_', ' '):15}  {clean_line(value)}\n" for name, value in told.items())
        output.write("".join(rows))
    else:
        output.write(output.structured(told, session.output))
    if problem is not None:
        output.note(f"no server: {clean_line(str(problem))}")


def _server_version(target: Target) -> Version:
    """Asked with the standard library alone: the SDK's httpx would double this command's time.

    Raises:
        ClientError: no server, or one that refuses.
    """
    import http.client

    from ollama_distributed.client import calls
    from ollama_distributed.client.answers import error_of
    from ollama_distributed.client.errors import ConnectionFailed

    call = calls.version()
    url = urlsplit(target.url)
    assert url.hostname is not None
    connection = (
        http.client.HTTPSConnection(url.hostname, url.port, timeout=_PATIENCE_S, context=target.tls())
        if url.scheme == "https"
        else http.client.HTTPConnection(url.hostname, url.port, timeout=_PATIENCE_S)
    )
    try:
        key = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        connection.request(call.method, url.path + call.path, headers=key)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise ConnectionFailed(f"no server answers at {target.url} ({exc})") from exc
    finally:
        connection.close()
    if response.status >= 300:
        headers = {name.lower(): value for name, value in response.getheaders()}
        raise error_of(response.status, headers, body, now=time.time())
    return call.decode(body)
