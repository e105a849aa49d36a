"""A loopback HTTP server that is told what to answer: for the tests of the SDK and the CLI."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from tests.limits import SOON_S


@dataclass
class Reply:
    status: int = 200
    body: Any = b""
    """bytes, or anything that JSON can hold."""
    headers: dict[str, str] = field(default_factory=dict)
    lines: list[Any] | None = None
    """A stream instead of a body: JSON objects, one a line (bytes are sent as they are)."""
    drop: bool = False
    """Close the connection without ending the body (with nothing to send: without an answer)."""
    hold: Event | None = None
    """Before the end of the body, wait for this."""


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Route = Reply | Callable[[Asked], Reply]


class Double:
    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.routes: dict[tuple[str, str], list[Route]] = {}
        self.connections = 0
        self.hung_up = Event()
        """Set when a client closed its connection before its stream's end."""
        self._sockets: list[socket.socket] = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                double.connections += 1
                double._sockets.append(self.connection)

            def log_message(self, *args: Any) -> None:
                return None

            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length) if length else b""
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, self.path, headers, body)
                double.asked.append(asked)
                self.send(double.reply(asked))

            do_GET = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

            def send(self, reply: Reply) -> None:
                if reply.drop and reply.lines is None and reply.body == b"":
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                try:
                    if reply.lines is not None:
                        self.stream(reply)
                    else:
                        self.whole(reply)
                except OSError:
                    double.hung_up.set()
                    self.close_connection = True

            def whole(self, reply: Reply) -> None:
                data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                self.send_header("content-length", str(len(data) + (100 if reply.drop else 0)))
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = self.close_connection or reply.drop

            def stream(self, reply: Reply) -> None:
                self.send_header("content-type", "application/x-ndjson")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for line in reply.lines or []:
                    data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                    self.wfile.flush()
                if reply.hold is not None:
                    self.watch(reply.hold)
                if reply.drop:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

            def watch(self, hold: Event) -> None:
                """Hold the stream open; note when the client leaves meanwhile."""
                self.connection.settimeout(0.02)
                while not hold.is_set():
                    try:
                        if self.connection.recv(1) == b"":
                            raise ConnectionAbortedError
                    except TimeoutError:
                        continue
                self.connection.settimeout(None)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def on(self, method: str, path: str, *replies: Route) -> None:
        """Answer in turn; the last one for ever."""
        self.routes[(method, path)] = list(replies)

    def reply(self, asked: Asked) -> Reply:
        routes = self.routes.get((asked.method, asked.path))
        if routes is None:
            return Reply(404, {"error": {"code": "not_found", "message": f"no route {asked.path}"}})
        route = routes.pop(0) if len(routes) > 1 else routes[0]
        return route(asked) if callable(route) else route

    def paths(self) -> list[str]:
        return [f"{asked.method} {asked.path}" for asked in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        for connection in self._sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # closed by its handler
        self._server.server_close()
        self._thread.join(SOON_S)
        assert not self._thread.is_alive()


@contextmanager
def server_double() -> Iterator[Double]:
    double = Double()
    try:
        yield double
    finally:
        double.close()


def closed_port_url() -> str:
    """A loopback URL at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
