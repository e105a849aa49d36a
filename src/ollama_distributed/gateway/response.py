"""What goes back to a client: one head, then bytes; with the headers that came together until then."""

from __future__ import annotations

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.out import (
    STREAM_HEADERS,
    Out,
    RawHeaders,
    id_headers,
    node_header,
    route_header,
    with_moves,
)

_NOSNIFF = (b"x-content-type-options", b"nosniff")
"""No browser takes what a model or a client wrote for a page or a script."""


class Response:
    """`own`: what this node is called; empty: answers do not say."""

    __slots__ = ("_clock", "_out", "_own", "bytes_out", "first_byte_at", "headers", "moves", "node", "why")

    def __init__(
        self, out: Out, clock: Clock, request_id: RequestId, own: str, *, anthropic: bool = False
    ) -> None:
        self._out = out
        self._clock = clock
        self._own = own
        self.headers: RawHeaders = [_NOSNIFF, *id_headers(request_id, anthropic=anthropic)]
        self.node = ""
        """Another node that answers."""
        self.why: str | None = ""
        """That node answers, as routing says; None: it is not told."""
        self.moves = 0
        """How often the answer went on at another node."""
        self.first_byte_at: float | None = None
        """The head is out since then."""
        self.bytes_out = 0
        """Without heads."""

    @property
    def served_by(self) -> str:
        return self.node or self._own

    def moved(self, node: str) -> None:
        self.node = node
        self.moves += 1
        if self.first_byte_at is None:
            self.headers = with_moves(self.headers, self.moves)

    def whole(self, status: int, content_type: bytes, body: bytes) -> None:
        self.bytes_out = len(body)
        self.first_byte_at = self._clock.monotonic()
        self._out.respond(
            status,
            [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
                *(self._origin() if status == 200 else ()),
                *self.headers,
            ],
            body,
        )

    def write(self, content_type: str, data: bytes) -> None:
        """Of a stream; its head goes before the first."""
        if self.first_byte_at is None:
            self.first_byte_at = self._clock.monotonic()
            kind = (b"content-type", content_type.encode("ascii"))
            self._out.start(200, [kind, *STREAM_HEADERS, *self._origin(), *self.headers])
        self.bytes_out += len(data)
        self._out.write(data)

    def end(self) -> None:
        self._out.end()

    def _origin(self) -> RawHeaders:
        """Who answers, and why that one."""
        why = () if self.why is None else (route_header(self.why),)
        return [*node_header(self.served_by), *why]
