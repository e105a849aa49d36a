"""What the API says of people: users, sign-in, sessions. Shared by the gateway and the SDK.

Fields are added with defaults only. No answer holds a password or its hash; a session's token
is in the one answer that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import msgspec

UserRole: TypeAlias = Literal["admin", "operator", "user", "viewer"]
"""Roles that a person may have."""


class UserRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: UserRole
    team: str = "default"
    disabled: bool = False
    source: Literal["password", "oidc"] = "password"
    """Who proves the person: this cluster by a password, or the OIDC provider."""
    created_at: float = 0.0
    """Seconds since the Unix epoch, as all times here."""
    created_by: str = ""
    sessions: int = 0
    """Signed in so often now."""


class UsersAnswer(msgspec.Struct, frozen=True):
    users: tuple[UserRow, ...]


class NewUserAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/users`."""

    name: str
    password: str
    role: UserRole = "user"
    team: str = "default"

    def __repr__(self) -> str:
        return f"NewUserAsk({self.name})"


class UserAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PATCH /api/v1/users/{name}`: what is not given stays."""

    role: UserRole | None = None
    team: str | None = None
    disabled: bool | None = None


class PasswordAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PUT /api/v1/users/{name}/password`, and one's own at `/api/v1/auth/password`."""

    password: str
    current: str = ""
    """Of one's own password; an administrator needs none for others."""

    def __repr__(self) -> str:
        return "PasswordAsk()"


class LoginAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /api/v1/auth/login`: name and password, or the code that a sign-in in the browser gave."""

    name: str = ""
    password: str = ""
    code: str = ""
    verifier: str = ""
    """That the code was asked for with (RFC 7636)."""
    cookie: bool = False
    """For a browser: the session comes as an HttpOnly cookie, not in the answer."""

    def __repr__(self) -> str:
        return f"LoginAsk({self.name})"


class LoginAnswer(msgspec.Struct, frozen=True, kw_only=True):
    user: UserRow
    session: str
    """Its id."""
    token: str = ""
    """To be sent as `Authorization: Bearer ods_…`; empty where it went into a cookie."""
    csrf: str = ""
    """With a cookie: to be sent as `X-CSRF-Token` with all that changes something."""
    expires_at: float
    """In any case; earlier where it is not used for `idle_s`."""
    idle_s: float

    def __repr__(self) -> str:
        return f"LoginAnswer({self.user.name}, {self.session})"


class TokenAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/v1/auth/token`: a JWT of short life, in place of the key or session that asked."""

    access_token: str
    token_type: str = "Bearer"  # noqa: S105  # RFC 6750
    expires_in: int
    """Seconds."""

    def __repr__(self) -> str:
        return "TokenAnswer()"


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    user: str
    created_at: float
    seen_at: float
    """To some minutes."""
    expires_at: float
    address: str = ""
    agent: str = ""
    this: bool = False
    """The one that asks."""


class SessionsAnswer(msgspec.Struct, frozen=True):
    sessions: tuple[SessionRow, ...]


class JwksAnswer(msgspec.Struct, frozen=True):
    """The public keys that sign JWTs now, and those whose JWTs still hold (RFC 7517)."""

    keys: tuple[Mapping[str, Any], ...]
