"""Clusters on the local network by mDNS and DNS-SD (RFC 6762, 6763).

What is announced is public and proves nothing: a joiner believes only the CA whose hash its
token holds, so a liar on the network can waste a joiner's time and no more.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec
import structlog
from zeroconf import BadTypeInNameException, Error, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ollama_distributed.base.errors import Unavailable

SERVICE = "_ollama-dist._tcp.local."
"""RFC 6335 5.1: at most 15 characters."""
BROWSE_S = 2.0
"""Answers come within 120 ms of a question (RFC 6762 6); asked again after 1 s."""
INFO_MS = 1500
MAX_FOUND = 256
"""A network full of liars must not fill a terminal."""

log = structlog.get_logger("discovery.mdns")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A node that says it belongs to a cluster."""

    cluster: str
    node: str
    name: str
    version: str
    ca_sha256: str
    addresses: tuple[str, ...]
    """`HOST:PORT` of its cluster listener."""


@asynccontextmanager
async def announced(node: Found) -> AsyncIterator[None]:
    """Say on the network that `node` is here, while inside.

    Raises:
        Unavailable: this machine has no network that mDNS works on.
    """
    addresses, port = await _numeric(node.addresses)
    facts = {
        "cluster": node.cluster,
        "node": node.node,
        "name": node.name[:63],
        "version": node.version,
        "ca": node.ca_sha256,
    }
    info = AsyncServiceInfo(
        SERVICE,
        f"{node.node}.{SERVICE}",
        port=port,
        addresses=[ipaddress.ip_address(address).packed for address in addresses],
        properties=facts,
        server=f"{node.node}.local.",
    )
    try:
        zeroconf = AsyncZeroconf()
    except OSError as failure:
        raise Unavailable(f"mDNS cannot be used here: {failure.strerror}") from failure
    try:
        await (await zeroconf.async_register_service(info, allow_name_change=True))
        yield
    except (Error, OSError) as failure:
        raise Unavailable(f"mDNS cannot be used here: {failure}") from failure
    finally:
        with anyio.CancelScope(shield=True):
            await zeroconf.async_unregister_all_services()
            await zeroconf.async_close()


async def browse(wait_s: float = BROWSE_S) -> list[Found]:
    """Who announces a cluster on the networks of this machine, sorted by cluster and name.

    Raises:
        Unavailable: this machine has no network that mDNS works on.
    """
    names: dict[str, None] = {}

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        del zeroconf, service_type
        if state_change is not ServiceStateChange.Removed and len(names) < MAX_FOUND:
            names[name] = None

    try:
        zeroconf = AsyncZeroconf()
    except OSError as failure:
        raise Unavailable(f"mDNS cannot be used here: {failure.strerror}") from failure
    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[changed])
        await anyio.sleep(wait_s)
        found = [await _read(zeroconf, name) for name in names]
        await browser.async_cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await zeroconf.async_close()
    return sorted(
        (one for one in found if one is not None), key=lambda one: (one.cluster, one.name, one.node)
    )


async def _read(zeroconf: AsyncZeroconf, name: str) -> Found | None:
    try:
        info = AsyncServiceInfo(SERVICE, name)
    except BadTypeInNameException:
        return None
    if not await info.async_request(zeroconf.zeroconf, INFO_MS):
        return None
    facts = {key: value or "" for key, value in info.decoded_properties.items()}
    return read_facts(facts, info.parsed_scoped_addresses(), info.port or 0)


def read_facts(facts: Mapping[str, str], addresses: Sequence[str], port: int) -> Found | None:
    """What an announcement says; None where it is not one of ours. Nothing in it is to be
    trusted, not even that it is printable."""
    if not facts.get("cluster") or not facts.get("node") or not 0 < port < 65536:
        return None
    clean = {key: "".join(c for c in value if c.isprintable())[:128] for key, value in facts.items()}
    hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in addresses)
    return Found(
        cluster=clean["cluster"],
        node=clean["node"],
        name=clean.get("name") or clean["node"],
        version=clean.get("version", ""),
        ca_sha256=clean.get("ca", ""),
        addresses=tuple(hosts),
    )


async def _numeric(addresses: Sequence[str]) -> tuple[list[str], int]:
    """The numeric hosts behind `HOST:PORT`s, and the port that they share."""
    hosts: list[str] = []
    port = 0
    for address in addresses:
        host, _, number = address.rpartition(":")
        port = port or int(number)
        try:
            hosts.append(str(ipaddress.ip_address(host.strip("[]"))))
        except ValueError:
            try:
                hosts += [str(entry[4][0]) for entry in await anyio.getaddrinfo(host, None)]
            except OSError as failure:
                log.warning("mdns.unknown_host", host=host, reason=failure.strerror)
    return list(dict.fromkeys(hosts)), port
