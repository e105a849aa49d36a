"""Hands a connection's TLS object to the app: uvicorn tells it nothing about certificates."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ollama_distributed.adapters.sockets import LIFELINE, SERVER_UNHEARD_S, Lifeline, tune

TLS = "ollama_distributed.tls"


class PeerCertificates(HttpToolsProtocol):
    """Mix in before the gateway's limiting protocol. Adds to each scope's extensions `TLS`, the
    connection's `ssl.SSLObject`, and its `LIFELINE`."""

    _connection: dict[str, Any] | None = None
    """One dictionary for all requests of the connection: what was read of its certificate once
    holds until it ends, for TLS 1.3 has no second handshake."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._lifeline = Lifeline()
        tune(transport.get_extra_info("socket"), SERVER_UNHEARD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lifeline.cut()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # makes the scope; the app runs after this callback
        if self._connection is None:
            self._connection = {TLS: self.transport.get_extra_info("ssl_object"), LIFELINE: self._lifeline}
        self.scope["extensions"] = self._connection
