"""Connections for the HTTP client: to addresses that were checked, and to no others."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import Any

import httpcore

from ollama_distributed.adapters.egress.addresses import Address
from ollama_distributed.adapters.egress.urls import literal
from ollama_distributed.base.errors import Forbidden, Unavailable

Resolver = Callable[[str], Awaitable[Sequence[Address]]]
"""All addresses of a name, best first."""

READ_BYTES = 256 << 10
"""At once from a socket. httpcore asks for 64 KiB, which costs a third more CPU on long bodies."""
_MAX_ADDRESSES = 16
"""Tried for one connection; a name with more is strange."""


async def look_up(host: str) -> Sequence[Address]:
    """Ask the machine's resolver.

    Raises:
        Unavailable: it does not know the name.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise Unavailable(f"the name {host} cannot be looked up: {exc.strerror or exc}") from exc
    return list(dict.fromkeys(ip_address(address[0]) for *_, address in found))


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Looks a name up once, checks every address that it has, and connects to one of those."""

    def __init__(self, allowed: Callable[[Address], bool], resolver: Resolver = look_up) -> None:
        self._allowed = allowed
        self._resolver = resolver
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """
        Raises:
            Forbidden: one of its addresses is not allowed. One is enough: who mixes public and
                private addresses under a name plays with us.
        """
        fixed = literal(host)
        addresses = [fixed] if fixed is not None else list(await self._resolver(host))[:_MAX_ADDRESSES]
        if not addresses:
            raise Unavailable(f"the name {host} has no address")
        for address in addresses:
            if not self._allowed(address):
                raise Forbidden(
                    f"{host} leads to {address}, which is no public address; refused (a registry of your "
                    "own network needs `private: true` under `registries` in the settings)"
                )
        failure: Exception | None = None
        for address in addresses:
            try:
                return _Stream(
                    await self._inner.connect_tcp(str(address), port, timeout, local_address, socket_options)
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        assert failure is not None
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that reads in larger pieces than it is asked for, which its reader can take."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  # as above
        return await self._inner.read(max(max_bytes, READ_BYTES), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  # as above
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # as above
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
