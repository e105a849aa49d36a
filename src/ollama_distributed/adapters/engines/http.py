"""HTTP/1.1 client for engines: callbacks, UNIX sockets, TCP or TLS.

Lean on purpose. llama-server breaks up to a fifth of the requests that reuse a connection
after a stream (DESIGN.md, trap 4), so a request says `Connection: close` unless its `Route` has
connections that are kept (`kept.py`); to a UNIX socket a new one is made at once (`dial.py`). Callbacks
instead of async iterators save a task switch per chunk of the answer.

    exchange = request(UnixAddress("/run/x.sock"), "POST", "/completion", body=b"{}",
                       on_head=..., on_body=..., on_end=..., on_error=...)
    exchange.cancel()                                  # closes the connection

It knows nothing of what the bodies mean. RFC 9112.
"""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.adapters.engines.addresses import Address as Address
from ollama_distributed.adapters.engines.addresses import Headers as Headers
from ollama_distributed.adapters.engines.addresses import TcpAddress as TcpAddress
from ollama_distributed.adapters.engines.addresses import UnixAddress as UnixAddress
from ollama_distributed.adapters.engines.dial import Ahead
from ollama_distributed.adapters.engines.exchange import Exchange as Exchange
from ollama_distributed.adapters.engines.kept import Kept
from ollama_distributed.base.errors import OllamaDistributedError

CONNECT_DEADLINE_S = 5.0


class Route:
    """Where requests of one kind go. Their head is made once."""

    __slots__ = ("_address", "_ahead", "_body", "_head", "_kept")

    def __init__(
        self,
        address: Address,
        method: str,
        path: str,
        headers: Headers | None = None,
        *,
        body: bool = True,
        kept: Kept | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """`body`: there may be one. `kept`: connections that may be used again. `ahead`: opens some for
        these requests."""
        if not path.startswith("/") or not (method + path).isascii() or any(c <= " " for c in method + path):
            raise ValueError("method or path is not safe to send")
        host = "localhost" if isinstance(address, UnixAddress) else f"{address.host}:{address.port}"
        fields = {"host": host, "accept-encoding": "identity"}
        if kept is None:
            fields["connection"] = "close"
        if body:
            fields["content-type"] = "application/json"
        for name, value in (headers or {}).items():
            if any(c in "\r\n\0" for c in name + value):
                raise ValueError(f"header {name!r} holds a control character")
            fields[name.lower()] = value
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in fields.items())
        self._head = head.encode("latin-1")
        self._body = body
        self._address = address
        self._kept = kept
        self._ahead = ahead

    def send(
        self,
        body: bytes = b"",
        *,
        on_body: Callable[[bytes], None],
        on_end: Callable[[], None],
        on_error: Callable[[OllamaDistributedError], None],
        on_head: Callable[[int, Headers], None] | None = None,
        connect_deadline_s: float = CONNECT_DEADLINE_S,
        idle_deadline_s: float | None = None,
    ) -> Exchange:
        """As `request`."""
        sized = b"%bcontent-length: %d\r\n\r\n%b"
        return Exchange(
            self._address,
            sized % (self._head, len(body), body) if self._body else self._head + b"\r\n",
            on_head=on_head,
            on_body=on_body,
            on_end=on_end,
            on_error=on_error,
            connect_deadline_s=connect_deadline_s,
            idle_deadline_s=idle_deadline_s,
            kept=self._kept,
            ahead=self._ahead,
        )


def request(
    address: Address,
    method: str,
    path: str,
    *,
    on_body: Callable[[bytes], None],
    on_end: Callable[[], None],
    on_error: Callable[[OllamaDistributedError], None],
    on_head: Callable[[int, Headers], None] | None = None,
    headers: Headers | None = None,
    body: bytes = b"",
    connect_deadline_s: float = CONNECT_DEADLINE_S,
    idle_deadline_s: float | None = None,
) -> Exchange:
    """Send a request on a connection of its own; the answer comes to the callbacks, on the running
    loop.

    Errors: `Unavailable` (no connection), `RunnerDied` (closed half-way),
    `DeadlineExceeded` (silent for `idle_deadline_s` while not paused), `EngineError` (not
    HTTP). A status of 400 or more is no error here: it comes to `on_head`.
    """
    has_body = bool(body) or method in ("POST", "PUT", "PATCH")
    return Route(address, method, path, headers, body=has_body).send(
        body,
        on_head=on_head,
        on_body=on_body,
        on_end=on_end,
        on_error=on_error,
        connect_deadline_s=connect_deadline_s,
        idle_deadline_s=idle_deadline_s,
    )
