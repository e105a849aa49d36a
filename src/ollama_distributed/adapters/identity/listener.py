"""Hands a connection's TLS object to the app: uvicorn tells it nothing about certificates."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ollama_distributed.adapters.sockets import tune

TLS = "ollama_distributed.tls"


class PeerCertificates(HttpToolsProtocol):
    """Mix in before the gateway's limiting protocol. Adds `ollama_distributed.tls`, the
    connection's `ssl.SSLObject`, to each scope's extensions."""

    _connection: dict[str, Any] | None = None
    """One dictionary for all requests of the connection: what was read of its certificate once
    holds until it ends, for TLS 1.3 has no second handshake."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tune(transport.get_extra_info("socket"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._connection is None:
            self._connection = {TLS: self.transport.get_extra_info("ssl_object")}
        self.scope["extensions"] = self._connection
