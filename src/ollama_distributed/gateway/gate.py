"""What every request passes before anything else looks at it, hot or cold.

Host and origin, who asks, what that identity may do, and how large the body may be. Knows
no sockets: a `Head` in, an `Admission` or an error out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

import msgspec

from ollama_distributed.access.keys import PREFIX
from ollama_distributed.access.roles import Right, demand
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.base.errors import BodyTooLarge, Invalid, Unauthenticated
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.cookies import SESSION, check_csrf, read_cookie
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy, check_encoding, check_type, is_loopback

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}", re.ASCII)
_PROXY_HEADERS = frozenset({"forwarded", "via", "x-real-ip"})
"""And all that begin with `x-forwarded-`: whoever sends one may speak for somebody elsewhere."""
_PROXIED = "this one came through a proxy, which must send one even on the node's own machine"


class Head(msgspec.Struct, frozen=True):
    """Request line and headers."""

    method: str
    path: str
    """Decoded, without the query."""
    headers: dict[str, str]
    """Lower-case names; of equal names the last."""
    host_fields: int = 1
    peer: str | None = None
    """Address of the other end; None for a UNIX socket."""
    secure: bool = False
    """It came by TLS, to a listener that other machines reach."""


class Admission(msgspec.Struct, frozen=True):
    identity: Identity
    origin: str | None
    """Web origin to allow in the answer."""


def read_head(
    method: str, path: str, fields: list[tuple[bytes, bytes]], peer: str | None, scheme: str
) -> Head:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in fields}
    hosts = 1
    if len(headers) != len(fields):  # some name came twice
        hosts = sum(name == b"host" for name, _ in fields)
    return Head(method, path, headers, hosts, peer, scheme == "https")


_AT_A_TIME = 64
_ids: list[str] = []


def _new_id() -> str:
    """64 random bits; the system is asked for many at a time."""
    if not _ids:
        many = os.urandom(8 * _AT_A_TIME).hex()
        _ids.extend(many[at : at + 16] for at in range(0, len(many), 16))
    return _ids.pop()


def request_id(headers: Mapping[str, str]) -> RequestId:
    """The client's id where it is well-formed, else a new one."""
    own = headers.get("x-request-id")
    if own is not None and _REQUEST_ID.fullmatch(own):
        return RequestId(own)
    return RequestId(_new_id())


def credential(headers: Mapping[str, str]) -> str:
    """Bearer token, or Anthropic's `x-api-key`; empty when there is none."""
    authorization = headers.get("authorization")
    if authorization is not None:
        scheme, _, token = authorization.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else authorization
    return headers.get("x-api-key", "")


def sent_credential(head: Head) -> str:
    """What the caller sent to prove itself; a browser's session comes as a cookie."""
    return credential(head.headers) or read_cookie(head.headers, SESSION, secure=head.secure)


class Gate:
    """The checks, with their policy bound once."""

    def __init__(self, authenticator: Authenticator, policy: SitePolicy, limits: Limits) -> None:
        self.limits = limits
        self.refused: Callable[[Head], None] = _nobody_to_tell
        """Hears of each caller whose key was wrong."""
        self._authenticator = authenticator
        self._policy = policy

    def use(self, policy: SitePolicy) -> None:
        """Other names and origins from now on."""
        self._policy = policy

    def admit_site(self, head: Head) -> tuple[bool, str | None]:
        """Host and origin only: whether the Host is loopback, and the origin to allow.

        Raises:
            Invalid, ForeignHost, Forbidden
        """
        loopback = self._policy.check_host(head.headers, head.host_fields)
        return loopback, self._policy.check_browser(head.method, head.headers)

    def admit(self, head: Head, right: Right | None) -> Admission:
        """All checks of the head, in the order in which they leak least. `right` None: which one is
        needed is not known yet, and asked for later.

        Raises:
            Invalid, ForeignHost, Forbidden, Unauthenticated
        """
        host_is_loopback, origin = self.admit_site(head)
        try:
            identity = self._identify(head, host_is_loopback=host_is_loopback)
        except Unauthenticated as exc:
            sent = credential(head.headers)
            if sent:
                self.refused(head)
            if not sent.startswith(PREFIX) and _came_by_proxy(head.headers):
                raise Unauthenticated(f"{exc.message}; {_PROXIED}") from None
            raise
        if right is not None:
            demand(identity, right, head.path)
        return Admission(identity, origin)

    def _identify(self, head: Head, *, host_is_loopback: bool) -> Identity:
        text = credential(head.headers)
        # A key of ours says who asks, wherever that is.
        here = host_is_loopback and not text.startswith(PREFIX) and _is_here(head)
        if text or "cookie" not in head.headers:
            return self._authenticator.identify(Caller(text, here))
        session = read_cookie(head.headers, SESSION, secure=head.secure)
        if session:
            try:
                identity = self._authenticator.identify(Caller(session, at_this_machine=False))
            except Unauthenticated:  # a browser sends the cookie of a session that is over, too
                return self._authenticator.identify(Caller("", here))
            check_csrf(head.method, head.headers, session)
            return identity
        return self._authenticator.identify(Caller("", here))


def _nobody_to_tell(_: Head) -> None:
    """Where nothing is recorded."""


def _is_here(head: Head) -> bool:
    """Whether the other end is this machine itself, and speaks for nobody else."""
    return (
        not head.secure
        and head.peer is not None
        and is_loopback(head.peer)
        and not _came_by_proxy(head.headers)
    )


def _came_by_proxy(headers: Mapping[str, str]) -> bool:
    if not _PROXY_HEADERS.isdisjoint(headers):
        return True
    for name in headers:  # noqa: SIM110 - half the time of any(), for each request
        if name.startswith("x-forwarded-"):
            return True
    return False


def check_body(headers: Mapping[str, str], limit: int | None) -> None:
    """Refuses by the head alone, before a byte of the body is read. `limit` None: streamed.

    Raises:
        UnsupportedMedia, BodyTooLarge, Invalid
    """
    check_encoding(headers)
    if limit is not None:
        check_type(headers)
    declared = headers.get("content-length")
    if declared is None:
        return
    if not declared.isascii() or not declared.isdigit():
        raise Invalid("the Content-Length is not a number")
    if limit is not None and int(declared) > limit:
        raise BodyTooLarge(too_large_text(limit))


def too_large_text(limit: int) -> str:
    return f"the request body is larger than {limit} bytes"
