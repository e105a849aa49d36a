"""What both clients share below the calls: settings of a connection, httpx's errors in our words.

httpx is imported on first use: it costs more than all of the SDK.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_distributed._version import __version__
from ollama_distributed.base import events
from ollama_distributed.base.priority import Priority
from ollama_distributed.client import address
from ollama_distributed.client.attempts import Failure, Servers

if TYPE_CHECKING:
    import ssl

    import httpx

TIMEOUT_S = 600.0
"""Longest silence of a server that works: a large model may load for minutes before its first
byte. A server that is gone is noticed by `CONNECT_TIMEOUT_S` or by its closed connection."""
CONNECT_TIMEOUT_S = 5.0
CLOSE_S = 1.0
"""For a WebSocket's server to say goodbye."""
MOST_MESSAGE_BYTES = 16 * 1024 * 1024
"""Of a WebSocket: a node with thousands of queued models stays far below."""
ERROR_BODY_BYTES = 1024 * 1024
"""Most of an error's body that is read."""
BLOB_CHUNK_BYTES = 1024 * 1024
"""Pieces in which a file is hashed and sent: large enough that Python's share is small."""


class Settings:
    """The arguments that `Client` and `SyncClient` take, checked."""

    def __init__(
        self,
        base_url: str | Sequence[str] | None,
        api_key: str | None,
        timeout: float,
        retries: int,
        verify: bool | str | Path | ssl.SSLContext,
        priority: Priority | None = None,
    ) -> None:
        if timeout <= 0:
            raise ValueError("timeout: give seconds above 0")
        if retries < 0:
            raise ValueError("retries: give 0 or more")
        self.servers = Servers(address.base_urls(base_url, os.environ))
        key = address.api_key(api_key, os.environ)
        self.timeout_s = timeout
        self.retries = retries
        self._verify = verify
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self._headers = {
            "accept": "application/json, application/x-ndjson",
            "user-agent": f"ollama-distributed/{__version__} python/{python}",
        }
        if key is not None:
            self._headers["authorization"] = f"Bearer {key}"
        if priority is not None:
            self._headers["x-ollama-priority"] = priority

    def httpx_arguments(self, url: str, *, keep_alive: bool) -> dict[str, Any]:
        """For `httpx.Client` and its async twin, for one base URL.

        Redirects are not followed: they would carry prompts and the key to another server.
        Loopback never goes through a proxy that the environment names.
        """
        import httpx

        return {
            "base_url": url,
            "headers": self._headers,
            "timeout": httpx.Timeout(self.timeout_s, connect=min(CONNECT_TIMEOUT_S, self.timeout_s)),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0),
            "follow_redirects": False,
            "trust_env": not address.is_loopback(url),
            "verify": self._tls(url),
        }

    def socket_arguments(self, url: str) -> dict[str, Any]:
        """For `websockets.sync.client.connect` and its async twin; as `httpx_arguments`."""
        return {
            "uri": "ws" + url.removeprefix("http") + events.PATH,
            "additional_headers": self._headers,
            "user_agent_header": None,
            "compression": None,
            "proxy": None if address.is_loopback(url) else True,
            "ssl": self._context(url),
            "open_timeout": min(CONNECT_TIMEOUT_S, self.timeout_s),
            "close_timeout": CLOSE_S,
            "max_size": MOST_MESSAGE_BYTES,
        }

    def _context(self, url: str) -> ssl.SSLContext | None:
        if not url.startswith("https://"):
            return None
        import httpx

        verify = self._tls(url)
        return httpx.create_ssl_context(verify) if isinstance(verify, bool) else verify

    def _tls(self, url: str) -> bool | ssl.SSLContext:
        if not url.startswith("https://"):
            return False  # nothing to verify, and reading the system's authorities takes 20 ms
        if isinstance(self._verify, str | Path):
            import ssl

            return ssl.create_default_context(cafile=str(self._verify))
        return self._verify


def failure_of(error: httpx.HTTPError, *, answer_began: bool) -> Failure:
    """A transport's error in the words of `attempts`."""
    import httpx

    text = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError):
        return Failure(stage="connect", text=text)
    return Failure(
        stage="answering" if answer_began else "unanswered",
        text=text,
        timed_out=isinstance(error, httpx.TimeoutException),
    )


def file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(BLOB_CHUNK_BYTES):
            yield chunk


def bytes_chunks(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), BLOB_CHUNK_BYTES):
        yield data[start : start + BLOB_CHUNK_BYTES]


def digest_of(chunks: Iterator[bytes]) -> str:
    """`sha256:<hex>`, the name of a blob."""
    sha256 = hashlib.sha256()
    for chunk in chunks:
        sha256.update(chunk)
    return f"sha256:{sha256.hexdigest()}"
