"""What a registry asks for in `WWW-Authenticate` (RFC 9110 11.6.1; distribution's token spec). Pure."""

from __future__ import annotations

import re

import msgspec

_SCHEME = re.compile(r"\s*([A-Za-z]+)\s+")
_PARAMETER = re.compile(r'\s*([A-Za-z_]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,|\Z)')
_MAX_CHALLENGE = 4096


class Challenge(msgspec.Struct, frozen=True):
    scheme: str
    """`bearer` or `basic`."""
    realm: str = ""
    service: str = ""
    scopes: tuple[str, ...] = ()


def parse_challenge(header: str) -> Challenge | None:
    """The first challenge that we can meet; None: there is none."""
    if len(header) > _MAX_CHALLENGE:
        return None
    match = _SCHEME.match(header)
    if match is None:
        return Challenge("basic") if header.strip().lower() == "basic" else None
    scheme = match[1].lower()
    if scheme not in ("bearer", "basic"):
        return None
    found: dict[str, str] = {}
    at = match.end()
    while parameter := _PARAMETER.match(header, at):
        value = parameter[3] if parameter[2] is None else re.sub(r"\\(.)", r"\1", parameter[2])
        found.setdefault(parameter[1].lower(), value)
        at = parameter.end()
    scopes = tuple(found.get("scope", "").split())
    return Challenge(scheme, found.get("realm", ""), found.get("service", ""), scopes)
