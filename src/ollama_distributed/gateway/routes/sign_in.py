"""Sign-in under `/api/v1/auth`: by password, by an OIDC provider, and what a session may do."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from urllib.parse import urlencode

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from ollama_distributed.access.people import csrf_of
from ollama_distributed.base.errors import Invalid, NotFound, Unauthenticated
from ollama_distributed.base.users import (
    JwksAnswer,
    LoginAnswer,
    LoginAsk,
    PasswordAsk,
    SessionRow,
    SessionsAnswer,
    TokenAnswer,
)
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.cookies import (
    FLOW,
    SESSION,
    flow_cookie,
    no_cookie,
    read_cookie,
    session_cookie,
)
from ollama_distributed.gateway.gate import Head, sent_credential
from ollama_distributed.gateway.pages import HOME, page_headers, to_program_page
from ollama_distributed.gateway.people_port import People, SignedIn, Visitor
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

TAG = "Sign-in"
CALLBACK = "/api/v1/auth/oidc/callback"

_LOGIN = msgspec.json.Decoder(LoginAsk)
_PASSWORD = msgspec.json.Decoder(PasswordAsk)
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_STATE = re.compile(r"[A-Za-z0-9_-]{16,128}", re.ASCII)


class _Program(msgspec.Struct, frozen=True, kw_only=True):
    """One that waits for a code on a port of the browser's own machine (RFC 8252 7.3)."""

    port: int
    challenge: str
    state: str


class _Flow(msgspec.Struct, frozen=True, kw_only=True):
    """What the browser keeps while it is at the provider."""

    state: str
    nonce: str
    verifier: str
    program: _Program | None = None


_FLOW = msgspec.json.Decoder(_Flow)


def sign_in_routes(people: People) -> list[ColdRoute]:
    handlers = _Handlers(people)
    return [
        ColdRoute(
            method="POST",
            path="/api/v1/auth/login",
            verb=None,
            run=handlers.login,
            tag=TAG,
            summary="Sign in with name and password; a session comes as a token, or as a cookie",
            body=LoginAsk,
            answer=LoginAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/auth/logout",
            verb="read",
            run=handlers.logout,
            tag=TAG,
            summary="End the session that asks",
            status=204,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/auth/refresh",
            verb="read",
            run=handlers.refresh,
            tag=TAG,
            summary="Another token for the session that asks; the old one ends within a minute",
            answer=LoginAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/auth/token",
            verb="read",
            run=handlers.token,
            tag=TAG,
            summary="A JWT of short life, in place of the key or session that asks",
            answer=TokenAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/auth/session",
            verb="read",
            run=handlers.session,
            tag=TAG,
            summary="The session that asks, and its CSRF token",
            answer=LoginAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/auth/sessions",
            verb="read",
            run=handlers.sessions,
            tag=TAG,
            summary="One's own sessions",
            answer=SessionsAnswer,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/auth/sessions/{id}",
            verb="read",
            run=handlers.end,
            tag=TAG,
            summary="End a session of one's own",
            status=204,
        ),
        ColdRoute(
            method="PUT",
            path="/api/v1/auth/password",
            verb="admin",
            run=handlers.password,
            tag=TAG,
            summary="Change one's own password; every session of the person ends",
            body=PasswordAsk,
            status=204,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/auth/jwks",
            verb="read",
            run=handlers.jwks,
            tag=TAG,
            summary="The public keys of this cluster's JWTs",
            answer=JwksAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/auth/oidc/start",
            verb=None,
            run=handlers.oidc_start,
            tag=TAG,
            summary="Leads the browser to the OIDC provider",
            words=("port", "challenge", "state"),
            status=303,
        ),
        ColdRoute(
            method="GET",
            path=CALLBACK,
            verb=None,
            run=handlers.oidc_callback,
            tag=TAG,
            summary="Where the OIDC provider leads the browser back to",
            words=("code", "state", "error"),
            media="text/html",
            other=(303,),
        ),
    ]


class _Handlers:
    def __init__(self, people: People) -> None:
        self._people = people

    # ── sessions ────────────────────────────────────────────────────────────────────

    async def login(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _LOGIN)
        visitor = _visitor(cold.head)
        if ask.code:
            signed_in = await self._people.redeem(ask.code, ask.verifier, visitor)
        elif ask.name and ask.password:
            signed_in = await self._people.sign_in(ask.name, ask.password, visitor)
        else:
            raise Invalid("send name and password, or code and verifier")
        return _with_session(cold.head, signed_in, cookie=ask.cookie)

    async def logout(self, cold: ColdRequest, _request: Request) -> Response:
        await self._people.sign_out(sent_credential(cold.head))
        response = Response(status_code=204)
        if read_cookie(cold.head.headers, SESSION, secure=cold.head.secure):
            response.headers["set-cookie"] = no_cookie(SESSION, secure=cold.head.secure)
        return response

    async def refresh(self, cold: ColdRequest, _request: Request) -> Response:
        credential = sent_credential(cold.head)
        signed_in = await self._people.renew(credential)
        return _with_session(cold.head, signed_in, cookie=credential == _own_cookie(cold.head))

    async def token(self, cold: ColdRequest, _request: Request) -> Response:
        token, holds_s = await self._people.exchange(sent_credential(cold.head))
        return _secret(json_response(TokenAnswer(access_token=token, expires_in=holds_s)))

    async def session(self, cold: ColdRequest, _request: Request) -> Response:
        credential = sent_credential(cold.head)
        assert cold.identity is not None
        found = self._own_session(cold, self._people.session_of(credential))
        return _secret(
            json_response(
                LoginAnswer(
                    user=self._people.user(cold.identity.user),
                    session=found.id,
                    csrf=csrf_of(credential) if credential == _own_cookie(cold.head) else "",
                    expires_at=found.expires_at,
                    idle_s=self._people.idle_s,
                )
            )
        )

    async def sessions(self, cold: ColdRequest, _request: Request) -> Response:
        assert cold.identity is not None
        mine = self._people.session_of(sent_credential(cold.head))
        rows = self._people.sessions(cold.identity.user)
        return json_response(
            SessionsAnswer(tuple(msgspec.structs.replace(row, this=row.id == mine) for row in rows))
        )

    async def end(self, cold: ColdRequest, request: Request) -> Response:
        session = self._own_session(cold, request.path_params["id"])
        await self._people.sign_out(sent_credential(cold.head), session.id)
        return Response(status_code=204)

    def _own_session(self, cold: ColdRequest, session: str) -> SessionRow:
        assert cold.identity is not None
        for row in self._people.sessions(cold.identity.user):
            if row.id == session:
                return row
        raise NotFound("there is no such session of yours")

    async def password(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _PASSWORD)
        await self._people.change_own_password(sent_credential(cold.head), ask, _visitor(cold.head))
        return Response(status_code=204)

    async def jwks(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(JwksAnswer(tuple(self._people.jwks())))

    # ── OIDC ────────────────────────────────────────────────────────────────────────

    async def oidc_start(self, cold: ColdRequest, request: Request) -> Response:
        flow = _Flow(
            state=secrets.token_urlsafe(32),
            nonce=secrets.token_urlsafe(32),
            verifier=secrets.token_urlsafe(48),
            program=_program(request),
        )
        digest = hashlib.sha256(flow.verifier.encode()).digest()
        url = await self._people.oidc_start(
            redirect_uri=_callback(cold.head),
            state=flow.state,
            nonce=flow.nonce,
            challenge=base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii"),
        )
        response = RedirectResponse(url, 303)
        value = base64.urlsafe_b64encode(msgspec.json.encode(flow)).rstrip(b"=").decode("ascii")
        response.headers["set-cookie"] = flow_cookie(value, secure=cold.head.secure)
        return _secret(response)

    async def oidc_callback(self, cold: ColdRequest, request: Request) -> Response:
        head = cold.head
        flow = _flow(read_cookie(head.headers, FLOW, secure=head.secure))
        given, code = request.query_params.get("state", ""), request.query_params.get("code", "")
        if flow is None or not hmac.compare_digest(given.encode(), flow.state.encode()):
            raise Unauthenticated("this sign-in was not begun in this browser, or too long ago; begin again")
        if not code:
            raise Unauthenticated("the OIDC provider did not sign you in; begin again")
        answer = {
            "code": code,
            "redirect_uri": _callback(head),
            "nonce": flow.nonce,
            "verifier": flow.verifier,
        }
        response: Response
        cookies: list[str] = []
        if (program := flow.program) is not None:
            theirs = await self._people.oidc_finish_for_program(
                challenge=program.challenge, visitor=_visitor(head), **answer
            )
            back = urlencode({"code": theirs, "state": program.state})
            page = to_program_page(f"http://127.0.0.1:{program.port}/?{back}")
            response = Response(page, headers=page_headers(), media_type="text/html")
        else:
            signed_in = await self._people.oidc_finish(visitor=_visitor(head), **answer)
            response, cookies = RedirectResponse(HOME, 303), [_session(head, signed_in)]
        for cookie in (*cookies, no_cookie(FLOW, secure=head.secure)):
            response.headers.append("set-cookie", cookie)
        return _secret(response)


def _with_session(head: Head, signed_in: SignedIn, *, cookie: bool) -> Response:
    answer = LoginAnswer(
        user=signed_in.user,
        session=signed_in.session,
        token="" if cookie else signed_in.token,
        csrf=csrf_of(signed_in.token) if cookie else "",
        expires_at=signed_in.expires_at,
        idle_s=signed_in.idle_s,
    )
    response = _secret(json_response(answer))
    if cookie:
        response.headers["set-cookie"] = _session(head, signed_in)
    return response


def _session(head: Head, signed_in: SignedIn) -> str:
    return session_cookie(signed_in.token, secure=head.secure, max_age_s=int(signed_in.idle_s))


def _own_cookie(head: Head) -> str:
    return read_cookie(head.headers, SESSION, secure=head.secure)


def _secret(response: Response) -> Response:
    response.headers["cache-control"] = "no-store"  # RFC 9111 5.2.2.5: it holds a secret
    return response


def _visitor(head: Head) -> Visitor:
    return Visitor(head.peer or "", head.headers.get("user-agent", ""))


def _callback(head: Head) -> str:
    """Here, as the browser came: the Host was checked to be a name of this node."""
    return f"{'https' if head.secure else 'http'}://{head.headers['host']}{CALLBACK}"


def _program(request: Request) -> _Program | None:
    """
    Raises:
        Invalid
    """
    port, challenge = request.query_params.get("port", ""), request.query_params.get("challenge", "")
    state = request.query_params.get("state", "")
    if not port and not challenge:
        return None
    if not (port.isascii() and port.isdigit() and 1024 <= int(port[:6]) <= 65535):
        raise Invalid("port is a number from 1024 to 65535", param="port")
    if not _CHALLENGE.fullmatch(challenge) or not _STATE.fullmatch(state):
        raise Invalid("challenge and state are those of RFC 7636 and RFC 6749", param="challenge")
    return _Program(port=int(port), challenge=challenge, state=state)


def _flow(cookie: str) -> _Flow | None:
    try:
        return _FLOW.decode(base64.urlsafe_b64decode(cookie + "=" * (-len(cookie) % 4))) if cookie else None
    except (ValueError, msgspec.MsgspecError):
        return None
