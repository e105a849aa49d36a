"""Hands a connection's TLS object to the app: uvicorn tells it nothing about certificates."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ollama_distributed.adapters.sockets import tune


class PeerCertificates(HttpToolsProtocol):
    """Mix in before the gateway's limiting protocol. Adds `ollama_distributed.tls`, the
    connection's `ssl.SSLObject`, to each scope's extensions."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tune(transport.get_extra_info("socket"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"ollama_distributed.tls": self.transport.get_extra_info("ssl_object")}
