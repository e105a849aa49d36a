"""Which Host and Origin headers are this node's own: DNS rebinding, CSRF and CORS.

A page that a browser loaded from elsewhere must reach nothing here, on any bind: not by a
name that it points at this machine (Host), not by its own origin (Origin, Sec-Fetch-Site),
not by a request type that browsers send without asking first (415). Programs send none of
these headers and pass. There is no `*`: an origin is named, or it is not allowed.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Iterable, Mapping

from ollama_distributed.base.errors import Forbidden, ForeignHost, Invalid, UnsupportedMedia

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?(?::\d{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^/:?#\s]*)(?::(\d{1,5}|\*))?/?", re.ASCII)
_APP_SCHEMES = frozenset({"app", "tauri", "vscode-file", "vscode-webview"})
"""Desktop shells that show our API; no web page can send them (Ollama allows the same)."""
_SAFE = frozenset({"GET", "HEAD"})
_SEEN_MOST = 256
"""Verdicts kept; a client that invents names only empties the cache."""


@functools.lru_cache(maxsize=1024)
def is_loopback(name: str) -> bool:
    """Whether a host name or address, without port or brackets, is this machine itself."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Lower-case name or address of a Host header, without port and brackets; "" if malformed."""
    match = _HOST.fullmatch(header.lower())
    return match[1].strip("[]") if match else ""


class SitePolicy:
    """Which names and origins belong to this node.

    `hosts`: names and addresses beside loopback under which clients may call (the bind
    address, configured public names). `origins`: web origins that may call from a browser,
    as `https://name[:port]`, port `*` for any.

    Raises:
        Invalid: an entry is no host, `*` or not an origin.
    """

    def __init__(self, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self._hosts = frozenset(_configured_host(host) for host in hosts if host)
        self._origins = frozenset(_configured(origin) for origin in origins if origin)
        self._seen: dict[str, bool] = {}

    def check_host(self, headers: Mapping[str, str], host_fields: int = 1) -> bool:
        """Whether the request's Host is loopback.

        Raises:
            Invalid: no Host, or several.
            ForeignHost: a name that is not ours.
        """
        header = headers.get("host")
        if header is None or host_fields != 1:
            raise Invalid("the request needs exactly one Host header")
        loopback = self._seen.get(header)
        if loopback is None:
            loopback = self._decide_host(header)
            if len(self._seen) >= _SEEN_MOST:
                self._seen.clear()
            self._seen[header] = loopback
        return loopback

    def _decide_host(self, header: str) -> bool:
        name = host_name(header)
        if is_loopback(name):
            return True
        if name and name in self._hosts:
            return False
        raise ForeignHost("this Host is not a name of this node; add it to the allowed hosts if it should be")

    def check_browser(self, method: str, headers: Mapping[str, str]) -> str | None:
        """The origin to allow in the answer (CORS), or None where none asked.

        Raises:
            Forbidden: a foreign origin, or a request that a foreign page caused.
        """
        origin = headers.get("origin")
        if origin is not None:
            if not self.allows_origin(origin, headers.get("host", "")):
                raise Forbidden("requests from this web origin are not allowed; see the setting for origins")
            return origin
        if headers.get("sec-fetch-site") == "cross-site" and not _is_navigation(method, headers):
            raise Forbidden("requests that another site caused are not allowed")
        return None

    def allows_origin(self, origin: str, host: str) -> bool:
        match = _ORIGIN.fullmatch(origin.lower())
        if match is None:
            return False
        scheme, name, port = match.groups()
        if scheme in _APP_SCHEMES:
            return True
        if scheme in ("http", "https"):
            own = f"{name}:{port}" if port else name
            if own == host.lower() or is_loopback(name.strip("[]")):
                return True
        return (scheme, name, port) in self._origins or (scheme, name, "*") in self._origins


def is_own_origin(origin: str, host: str) -> bool:
    """Whether a page of exactly this server asks: the same name and port as in the Host header."""
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None or match[1] not in ("http", "https"):
        return False
    return (f"{match[2]}:{match[3]}" if match[3] else match[2]) == host.lower()


def check_encoding(headers: Mapping[str, str]) -> None:
    """Refuses a compressed body: it may be a bomb, and JSON of this size needs none.

    Raises:
        UnsupportedMedia: 415.
    """
    encoding = headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMedia("compressed request bodies are not accepted; send the body as it is")


def check_type(headers: Mapping[str, str]) -> None:
    """Refuses from a browser the body types that it sends without a preflight.

    Ollama takes any Content-Type, and `curl -d '{…}'` sends a form type: so a program may
    send what it likes, while a browser (it cannot leave out these headers) must say JSON.

    Raises:
        UnsupportedMedia: 415.
    """
    if "origin" in headers or "sec-fetch-site" in headers:
        kind = headers.get("content-type", "").split(";", 1)[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise UnsupportedMedia("from a browser the Content-Type must be application/json")


def _is_navigation(method: str, headers: Mapping[str, str]) -> bool:
    """A person followed a link; it changes nothing and the other page cannot read the answer."""
    return method in _SAFE and headers.get("sec-fetch-mode") == "navigate"


def _configured_host(host: str) -> str:
    name = host.lower().strip("[]").removesuffix(".")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if host_name(name) != name:
            raise Invalid(
                f"{host!r} is not a host: write each name or address by itself, without scheme and port"
            ) from None
    return name


def _configured(origin: str) -> tuple[str, str, str | None]:
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None or "*" in match[2]:
        raise Invalid(
            f"{origin!r} is not a web origin: write each as https://name or https://name:port "
            "(port * for any); '*' alone would let every web page use this node"
        )
    return (match[1], match[2], match[3])
