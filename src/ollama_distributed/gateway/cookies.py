"""The cookies of a browser's session, and what must come beside them.

A session's cookie is HttpOnly (no script reads it), SameSite=Strict (no other site's page sends it)
and, over TLS, `__Host-` (RFC 6265bis 4.1.3: no other host of the domain can set it). What changes
something also needs the session's CSRF token in a header, which a page can only know that read it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from ollama_distributed.access.people import csrf_of
from ollama_distributed.base.errors import Forbidden

SESSION, FLOW = "od_session", "od_oidc"
CSRF_HEADER = "x-csrf-token"
FLOW_S = 600
"""For the way to the provider and back, passwords and second factors included."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_MOST = 8192


def read_cookie(headers: Mapping[str, str], name: str, *, secure: bool) -> str:
    """Its value; empty: it is not there, or there twice, so that somebody else may have set one."""
    header = headers.get("cookie", "")
    if not header or len(header) > _MOST:
        return ""
    wanted = _full(name, secure=secure)
    found = [
        value.strip()
        for own, sign, value in (part.partition("=") for part in header.split(";"))
        if sign and own.strip() == wanted
    ]
    return found[0] if len(found) == 1 else ""


def check_csrf(method: str, headers: Mapping[str, str], session: str) -> None:
    """
    Raises:
        Forbidden: a change without the token that belongs to the session.
    """
    if method in _SAFE:
        return
    given = headers.get(CSRF_HEADER, "")
    if not hmac.compare_digest(given.encode("latin-1"), csrf_of(session).encode("ascii")):
        raise Forbidden(
            "a change by a browser's session needs its CSRF token in the header X-CSRF-Token; sign-in and "
            "GET /api/v1/auth/session tell it"
        )


def session_cookie(token: str, *, secure: bool, max_age_s: int) -> str:
    return _cookie(SESSION, token, secure=secure, max_age_s=max_age_s, site="Strict")


def flow_cookie(value: str, *, secure: bool) -> str:
    """Lax: the provider's page leads back here."""
    return _cookie(FLOW, value, secure=secure, max_age_s=FLOW_S, site="Lax")


def no_cookie(name: str, *, secure: bool) -> str:
    return _cookie(name, "", secure=secure, max_age_s=0, site="Strict" if name == SESSION else "Lax")


def _cookie(name: str, value: str, *, secure: bool, max_age_s: int, site: str) -> str:
    end = "; Secure" if secure else ""
    return (
        f"{_full(name, secure=secure)}={value}; Path=/; Max-Age={max_age_s}; HttpOnly; SameSite={site}{end}"
    )


def _full(name: str, *, secure: bool) -> str:
    return f"__Host-{name}" if secure else name
