"""The sockets of the API: parse and bind.

Loopback is plain HTTP, and a caller there may need no key. Any other address has TLS and asks
everyone for a key, whatever the settings say: an open port without both is how most exposed
inference servers were taken (`reference/security.md`, row F).
"""

from __future__ import annotations

import errno
import ipaddress
import resource
import socket

import msgspec
import structlog

from ollama_distributed.adapters.sockets import listen
from ollama_distributed.base.errors import Conflict, Invalid

log = structlog.get_logger("node.listeners")

MOST_FILES = 65_536
"""Ten times what all connections, models and runners of a node take."""


def allow_files() -> int:
    """Let this process open as many files and sockets as it may, and return how many. A shell gives 1,024,
    for programs that call select(2): a stranger with so many slow connections would take all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


class Address(msgspec.Struct, frozen=True):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def secure(self) -> bool:
        """Reached with TLS: other machines can get there."""
        return not is_loopback(self.host)

    @property
    def url(self) -> str:
        return f"https://{self}" if self.secure else f"http://{self}"


def parse_address(text: str) -> Address:
    """`HOST:PORT`, `[::1]:PORT`, `:PORT` (loopback) or `HOST` (our default port).

    Raises:
        Invalid: not an address, or a port alone: that could be meant for this machine or for all.
    """
    host, _, port = text.strip().rpartition(":")
    if text.strip().endswith("]") or (not host and not text.strip().startswith(":")):
        host, port = text.strip(), "8080"
    if text.strip().isdigit():
        raise Invalid(f"--listen {text}: write HOST:PORT, e.g. 127.0.0.1:{text.strip()}")
    host = host.strip("[]") or "127.0.0.1"
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise Invalid(f"--listen {text}: write HOST:PORT, e.g. 127.0.0.1:8080")
    return Address(host, int(port))


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        Conflict: somebody else listens there.
        Invalid: this machine does not have the address.
    """
    try:
        return listen(address.host, address.port)
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            raise Conflict(
                f"{address} is taken by another program; stop it, or choose another with --listen HOST:PORT"
            ) from failure
        raise Invalid(f"{address} cannot be used: {failure.strerror}") from failure


def bind_all(texts: list[str], *, chosen: bool) -> list[socket.socket]:
    """Bind every address. `chosen`: the user named them, so each must work.

    Of the defaults, the first moves to a free port when it is taken and the others are left
    out; the log says so.
    """
    listeners: list[socket.socket] = []
    try:
        for number, address in enumerate(map(parse_address, texts)):
            try:
                listeners.append(bind(address))
            except Conflict:
                if chosen:
                    raise
                if number == 0:
                    listeners.append(bind(Address(address.host, 0)))
                    log.warning("listener.moved", wanted=str(address), took=str(bound(listeners[-1])))
                else:
                    log.warning("listener.left_out", address=str(address), reason="taken by another program")
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def bound(listener: socket.socket) -> Address:
    host, port = listener.getsockname()[:2]
    return Address(host, port)
