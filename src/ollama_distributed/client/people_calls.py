"""The calls of `client.auth` and `client.users` as data.

Pure. Their answers are the structs of `base/users.py`, which the server writes too.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base import users as wire
from ollama_distributed.base.users import UserRole
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call
from ollama_distributed.client.cluster_calls import named_path

_decode_login = decoder_of(wire.LoginAnswer)
_decode_token = decoder_of(wire.TokenAnswer)
_decode_sessions = decoder_of(wire.SessionsAnswer)
_decode_users = decoder_of(wire.UsersAnswer)
_decode_user = decoder_of(wire.UserRow)
_decode_jwks = decoder_of(wire.JwksAnswer)
_encode = msgspec.json.Encoder().encode


def _nothing(_: bytes) -> None:
    return None


# ── signing in ──────────────────────────────────────────────────────────────────────


def login(name: str, password: str) -> Call[wire.LoginAnswer]:
    """Sign in. The answer's `token` is the key of clients from then on: `Client(url, token)`."""
    ask = wire.LoginAsk(name=name, password=password)
    return Call(method="POST", path="/api/v1/auth/login", body=_encode(ask), decode=_decode_login)


def redeem(code: str, verifier: str) -> Call[wire.LoginAnswer]:
    """As `login`, by the code that a sign-in in the browser handed over."""
    ask = wire.LoginAsk(code=code, verifier=verifier)
    return Call(method="POST", path="/api/v1/auth/login", body=_encode(ask), decode=_decode_login)


def logout() -> Call[None]:
    """End the session whose token this client has."""
    return Call(method="POST", path="/api/v1/auth/logout", decode=_nothing)


def refresh() -> Call[wire.LoginAnswer]:
    """Another token for the same session; the old one ends within a minute."""
    return Call(method="POST", path="/api/v1/auth/refresh", decode=_decode_login)


def token() -> Call[wire.TokenAnswer]:
    """A JWT of short life that stands for this client's key or session."""
    return Call(method="POST", path="/api/v1/auth/token", decode=_decode_token, repeat="always")


def session() -> Call[wire.LoginAnswer]:
    """The session whose token this client has."""
    return Call(method="GET", path="/api/v1/auth/session", decode=_decode_login, repeat="always")


def sessions() -> Call[list[wire.SessionRow]]:
    """Where one is signed in oneself."""
    return Call(
        method="GET",
        path="/api/v1/auth/sessions",
        decode=lambda body: [*_decode_sessions(body).sessions],
        repeat="always",
    )


def end_session(session_id: str) -> Call[None]:
    """End one of one's own sessions."""
    path = named_path("/api/v1/auth/sessions/", session_id, "a session's id")
    return Call(method="DELETE", path=path, decode=_nothing)


def change_password(current: str, password: str) -> Call[None]:
    """Change one's own password. Every session of one's own ends."""
    ask = wire.PasswordAsk(current=current, password=password)
    return Call(method="PUT", path="/api/v1/auth/password", body=_encode(ask), decode=_nothing)


def jwks() -> Call[wire.JwksAnswer]:
    """The public keys that the cluster's JWTs are signed by."""
    return Call(method="GET", path="/api/v1/auth/jwks", decode=_decode_jwks, repeat="always")


# ── users ───────────────────────────────────────────────────────────────────────────


def list_users() -> Call[list[wire.UserRow]]:
    """All users, sorted by name."""
    return Call(
        method="GET",
        path="/api/v1/users",
        decode=lambda body: [*_decode_users(body).users],
        repeat="always",
    )


def get_user(name: str) -> Call[wire.UserRow]:
    """One user."""
    return Call(method="GET", path=_user(name), decode=_decode_user, repeat="always")


def create_user(
    name: str, password: str, *, role: UserRole = "user", team: str = "default"
) -> Call[wire.UserRow]:
    """A new user who signs in by password."""
    ask = wire.NewUserAsk(name=name, password=password, role=role, team=team)
    return Call(method="POST", path="/api/v1/users", body=_encode(ask), decode=_decode_user)


def change_user(
    name: str, *, role: UserRole | None = None, team: str | None = None, disabled: bool | None = None
) -> Call[wire.UserRow]:
    """Change what is given. A role holds at once; `disabled` also ends all sessions."""
    ask = wire.UserAsk(role=role, team=team, disabled=disabled)
    return Call(method="PATCH", path=_user(name), body=_encode(ask), decode=_decode_user, repeat="always")


def set_password(name: str, password: str) -> Call[wire.UserRow]:
    """Set somebody's password. Every session of theirs ends."""
    body = _encode(wire.PasswordAsk(password=password))
    return Call(method="PUT", path=_user(name) + "/password", body=body, decode=_decode_user)


def delete_user(name: str) -> Call[None]:
    """Delete a user. Sessions and tokens end."""
    return Call(method="DELETE", path=_user(name), decode=_nothing)


def user_sessions(name: str) -> Call[list[wire.SessionRow]]:
    """Where somebody is signed in."""
    return Call(
        method="GET",
        path=_user(name) + "/sessions",
        decode=lambda body: [*_decode_sessions(body).sessions],
        repeat="always",
    )


def end_user_sessions(name: str) -> Call[None]:
    """Sign somebody out everywhere."""
    return Call(method="DELETE", path=_user(name) + "/sessions", decode=_nothing, repeat="always")


def _user(name: str) -> str:
    return named_path("/api/v1/users/", name, "a user's name")
