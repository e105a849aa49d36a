"""Where the cluster's listeners bind, and what other machines are told of it."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Sequence

import msgspec
import psutil

from ollama_distributed.adapters.sockets import listen
from ollama_distributed.base.errors import Conflict, Invalid

_EVERYWHERE = frozenset({"0.0.0.0", "::", "*", ""})  # noqa: S104  compared, not bound
LOOPBACK = "127.0.0.1"
MAX_HOSTS = 4
"""Told to others; a machine with more interfaces names the right ones with `advertise`."""


class ListenOn(msgspec.Struct, frozen=True):
    """`cluster_listen`, parsed."""

    host: str
    port: int
    """0: the default one, or a free one where it is taken."""

    @property
    def everywhere(self) -> bool:
        return self.host in _EVERYWHERE


def parse_listen(text: str) -> ListenOn:
    """`HOST`, `HOST:PORT`, `:PORT`, `[IPv6]:PORT`.

    Raises:
        Invalid: none of these.
    """
    rest = text.strip()
    host, colon, port = rest.rpartition(":")
    if rest.endswith("]") or not colon or (":" in host and not host.startswith("[")):
        host, port = rest, ""
    if port and (not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536):
        raise Invalid(f"--cluster-listen {text}: write HOST or HOST:PORT, e.g. 192.0.2.7:7443")
    host = host.strip("[]")
    return ListenOn("0.0.0.0" if host in ("", "*") else host, int(port or 0))  # noqa: S104  # asked for


def advertised(chosen: Sequence[str], listen: ListenOn) -> tuple[str, ...]:
    """The hosts that others are told, best first."""
    if chosen:
        return tuple(host.strip("[]") for host in chosen)
    if not listen.everywhere:
        return (listen.host,)
    return tuple(interface_addresses(ipv6=listen.host == "::"))[:MAX_HOSTS] or (LOOPBACK,)


def interface_addresses(*, ipv6: bool = False) -> list[str]:
    """This machine's own addresses that others may reach; the one with the default route first."""
    families = (socket.AF_INET, socket.AF_INET6) if ipv6 else (socket.AF_INET,)
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, None] = dict.fromkeys(filter(None, [_outward()]))
    for name, entries in sorted(psutil.net_if_addrs().items()):
        for entry in entries:
            if name not in up or entry.family not in families:
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if not address.is_loopback and not address.is_link_local:
                found[str(address)] = None
    return list(found)


def _outward() -> str:
    """Where packets for elsewhere would come from; none is sent. Empty: there is no such route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: a documentation address
        except OSError:
            return ""
        host: str = probe.getsockname()[0]
        return "" if ipaddress.ip_address(host).is_loopback else host


def bind(host: str, candidates: Sequence[int], *, chosen: bool) -> socket.socket:
    """A listening socket on the first port of `candidates` that is free, else on any free one.

    Raises:
        Conflict: the port was `chosen` by a person and is taken.
        Invalid: this machine does not have the address.
    """
    ports = list(dict.fromkeys(port for port in candidates if port)) or [0]
    for port in ports if chosen else [*ports, 0]:
        try:
            return listen(host, port)
        except OSError as failure:
            if failure.errno != errno.EADDRINUSE:
                raise Invalid(
                    f"--cluster-listen {host}: this address cannot be used: {failure.strerror}"
                ) from failure
    raise Conflict(
        f"port {ports[0]} on {host} is taken by another program; stop it, or choose another with "
        "--cluster-listen HOST:PORT"
    )


def host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
