"""Connections for the HTTP client: to addresses that were checked, and to no others."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from ipaddress import ip_address

import httpcore

from ollama_distributed.adapters.egress.addresses import Address
from ollama_distributed.adapters.egress.urls import literal
from ollama_distributed.base.errors import Forbidden, Unavailable

Resolver = Callable[[str], Awaitable[Sequence[Address]]]
"""All addresses of a name, best first."""

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
                return await self._inner.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        assert failure is not None
        raise failure

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)
