"""One GET with the standard library alone: the SDK's httpx would double the time of a short command, and
follows no redirects that are meant for a browser."""

from __future__ import annotations

import http.client
import time
from urllib.parse import urlsplit

from ollama_distributed.cli.session import Target
from ollama_distributed.client.answers import error_of
from ollama_distributed.client.attempts import not_reached
from ollama_distributed.client.errors import ConnectionFailed


def ask(target: Target, path: str, *, timeout_s: float, redirects: bool = False) -> bytes:
    """The body of the answer. `redirects`: one that leads elsewhere is fine.

    Raises:
        ClientError: no server, or one that refuses.
    """
    url = urlsplit(target.url)
    assert url.hostname is not None
    connection = (
        http.client.HTTPSConnection(url.hostname, url.port, timeout=timeout_s, context=target.tls())
        if url.scheme == "https"
        else http.client.HTTPConnection(url.hostname, url.port, timeout=timeout_s)
    )
    try:
        key = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        connection.request("GET", url.path + path, headers=key)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise ConnectionFailed(not_reached(target.url, str(exc))) from exc
    finally:
        connection.close()
    if response.status >= (400 if redirects else 300):
        headers = {name.lower(): value for name, value in response.getheaders()}
        raise error_of(response.status, headers, body, now=time.time())
    return body
