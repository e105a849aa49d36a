"""Where an engine listens."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence

import msgspec


class UnixAddress(msgspec.Struct, frozen=True):
    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpAddress(msgspec.Struct, frozen=True):
    host: str
    port: int
    tls: ssl.SSLContext | None = None
    """Set: TLS, the certificate checked against `host` as the context says."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"


Address = UnixAddress | TcpAddress
Headers = Mapping[str, str]
"""Names in lower case; of a repeated header the values joined by a comma."""


def headers_of(fields: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """As `Headers`, of those that were read."""
    found: dict[str, str] = {}
    for name, value in fields:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found
