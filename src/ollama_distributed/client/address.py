"""Where the server is: reads `OLLAMA_HOST` and base URLs in all the forms that Ollama takes.

Pure. The rules are those of ollama/ollama `envconfig.Host()`; one differs: an address that
means "every interface" (0.0.0.0, ::) is for listening, so a client is sent to loopback.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

DEFAULT_URL = "http://127.0.0.1:8080"
"""Our own default listener; used when nothing says otherwise."""
_OLLAMA_PORT = 11434
_OF_SOCKETS = {"ws": "http", "wss": "https"}
_SCHEME_PORTS = {"http": 80, "https": 443}


def base_url(text: str) -> str:
    """`scheme://host:port[/path]` without a final slash.

    Takes `host`, `host:port`, `:port`, a bare or bracketed IPv6 address, and `scheme://…`.
    Without a scheme it is http on Ollama's port; a port that is none becomes the default.

    Raises:
        ValueError: a scheme that is neither http nor https, or user:password in the URL.
    """
    text = text.strip().strip("\"'").strip()
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "http", text
        default_port = _OLLAMA_PORT
    else:
        scheme = scheme.lower()
        if scheme not in _SCHEME_PORTS:
            raise ValueError(f"{text!r}: the address must begin with http:// or https://")
        default_port = _SCHEME_PORTS[scheme]
    host_port, _, path = rest.partition("/")
    if "@" in host_port:
        raise ValueError("an address must not hold a user or password; give the key as api_key")
    host, port = _split(host_port, default_port)
    path = path.partition("?")[0].partition("#")[0].rstrip("/")
    return f"{scheme}://{host}:{port}" + (f"/{path}" if path else "")


def socket_base(text: str) -> str:
    """As `base_url`, of a server whose WebSocket is at `text`: `ws://host:port/api/v1/ws`."""
    scheme, found, rest = text.strip().partition("://")
    if found and scheme.lower() in _OF_SOCKETS:
        text = f"{_OF_SOCKETS[scheme.lower()]}://{rest}"
    from ollama_distributed.base.events import PATH  # the CLI's start imports this module, and no msgspec

    return base_url(text).removesuffix(PATH)


def is_everywhere(text: str) -> bool:
    """Whether `text`, in any form that `base_url` takes, means every interface: where a server listens,
    not where it is."""
    text = text.strip().strip("\"'").strip()
    host_port = text.rpartition("://")[2].partition("/")[0]
    bare = host_port.strip("[]")
    host = bare if _is_ip(bare) else host_port.rpartition(":")[0].strip("[]")
    return _is_ip(host) and ipaddress.ip_address(host).is_unspecified


def _split(host_port: str, default_port: int) -> tuple[str, int]:
    bare = host_port.strip("[]")
    if _is_ip(bare):
        return _client_host(bare), default_port
    host, colon, port = host_port.rpartition(":")
    if not colon:
        host, port = host_port, ""
    number = int(port) if port.isascii() and port.isdigit() else -1
    return _client_host(host.strip("[]")), number if 0 < number <= 65535 else default_port


def _client_host(host: str) -> str:
    if not host:
        return "127.0.0.1"
    if not _is_ip(host):
        return host
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified:
        return "127.0.0.1" if ip.version == 4 else "[::1]"
    return str(ip) if ip.version == 4 else f"[{ip}]"


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(url: str) -> bool:
    """The URL's host is this machine by its spelling; no name is looked up."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or (_is_ip(host) and ipaddress.ip_address(host).is_loopback)


def base_urls(given: str | Sequence[str] | None, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The URLs to try, in order: those given, else `OLLAMA_HOST`, else our default."""
    if given is None:
        named = environ.get("OLLAMA_HOST", "").strip()
        return (base_url(named),) if named else (DEFAULT_URL,)
    urls = (given,) if isinstance(given, str) else tuple(given)
    if not urls:
        raise ValueError("base_url: give at least one URL")
    return tuple(dict.fromkeys(base_url(url) for url in urls))


def api_key(given: str | None, environ: Mapping[str, str]) -> str | None:
    """The key that was given, else `OLLAMA_DISTRIBUTED_API_KEY`, else `OLLAMA_API_KEY`.

    An empty one (given or in the environment) means: send none.
    """
    if given is None:
        given = environ.get("OLLAMA_DISTRIBUTED_API_KEY") or environ.get("OLLAMA_API_KEY")
    key = (given or "").strip()
    if any(ord(c) < 33 or ord(c) > 126 for c in key):
        raise ValueError("the API key holds a space, a line break or a character outside ASCII")
    return key or None
