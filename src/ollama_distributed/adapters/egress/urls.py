"""URLs of requests that go out, read strictly. Pure.

What is allowed here is far less than what RFC 3986 allows: two programs that read one URL
differently are how checks are passed by (row H of the security table). Whoever connects uses
these parts, and no parser reads the text again.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import quote, urlencode, urljoin

import msgspec

from ollama_distributed.adapters.egress.addresses import Address
from ollama_distributed.base.errors import Forbidden

_URL = re.compile(r"(https?)://([^/?#\\@]+)(/[^?#\\]*)?(\?[^#]*)?(?:#.*)?\Z", re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
_MAX_URL = 8192
"""Signed URLs of object stores have 500 to 2,000 characters."""
_DEFAULT_PORTS = {"https": 443, "http": 80}


class Url(msgspec.Struct, frozen=True):
    """Where a request goes. Made by `parse_url` and `resolve` only."""

    scheme: str
    host: str
    """A DNS name in lower case, or an address as `ipaddress` writes it (IPv6 without brackets)."""
    port: int
    target: str
    """Path and query, as they are sent."""

    @property
    def address(self) -> Address | None:
        """The host, when it is an address and no name."""
        return literal(self.host)

    @property
    def origin(self) -> tuple[str, str, int]:
        return (self.scheme, self.host, self.port)

    @property
    def site(self) -> str:
        """`host`, or `host:port` where the port is not the scheme's own; as in a model's name."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.site}{self.target}"

    @property
    def without_query(self) -> str:
        """For logs and messages: queries may hold signatures."""
        return f"{self.scheme}://{self.site}{self.target.partition('?')[0]}"

    def with_query(self, *pairs: tuple[str, str]) -> Url:
        """The same with more of a query."""
        more = urlencode(pairs)
        joint = "" if not more else "&" if "?" in self.target else "?"
        return msgspec.structs.replace(self, target=self.target + joint + more)


def parse_url(text: str) -> Url:
    """Read an absolute URL.

    Raises:
        Forbidden: it is not http or https, names a user, or is written in a way that others may
            read differently.
    """
    if len(text) > _MAX_URL or not text.isascii() or not text.isprintable() or " " in text:
        raise Forbidden("the address is too long or holds characters that no address needs")
    match = _URL.match(text)
    if match is None:
        raise Forbidden(f"{text[:200]!r} is no plain http or https address")
    scheme = match[1].lower()
    host, port = parse_host(match[2], _DEFAULT_PORTS[scheme])
    return Url(scheme, host, port, (match[3] or "/") + (match[4] or ""))


def parse_host(text: str, default_port: int) -> tuple[str, int]:
    """Read `name`, `name:port`, `1.2.3.4:port` or `[v6]:port`.

    Raises:
        Forbidden: it is none of these. Addresses in other spellings (octal, one number, short
            forms) and names with a final dot are none.
    """
    refused = Forbidden(f"{text[:200]!r} is no host name")
    if not text.isascii():
        raise refused
    lower = text.lower()
    if lower.startswith("["):
        inside, bracket, rest = lower[1:].partition("]")
        if not bracket or "%" in inside:
            raise refused
        host = _v6(inside)
        if host is None:
            raise refused
        colon, port_text = rest[:1], rest[1:]
        if rest and colon != ":":
            raise refused
    else:
        host, colon, port_text = lower.partition(":")
        if not _is_name(host):
            raise refused
    if not colon:
        return host, default_port
    if not _PORT.match(port_text) or int(port_text) > 65535:
        raise refused
    return host, int(port_text)


def resolve(base: Url, location: str) -> Url:
    """The absolute URL that a `Location` header means (RFC 9110 10.2.2).

    Raises:
        Forbidden: as `parse_url`.
    """
    if "\\" in location or not location.isprintable():
        raise Forbidden("a redirect leads to an address that is not written plainly")
    return parse_url(urljoin(str(base), location.strip()))


def path_url(base: Url, *parts: str) -> Url:
    """`base`'s site with a path of these parts, each escaped."""
    return msgspec.structs.replace(base, target="/" + "/".join(quote(part, safe=":+") for part in parts))


def literal(host: str) -> Address | None:
    try:
        return IPv6Address(host) if ":" in host else IPv4Address(host)
    except ValueError:
        return None


def _v6(text: str) -> str | None:
    try:
        return IPv6Address(text).compressed
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    """A DNS name or a plain IPv4 address. A last label of digits is an address to some resolvers."""
    if len(host) > 253:
        return False
    labels = host.split(".")
    if not all(_LABEL.match(label) for label in labels):
        return False
    last = labels[-1]
    if last.isdigit() or re.match(r"0x[0-9a-f]*\Z", last):
        return isinstance(literal(host), IPv4Address)
    return True
