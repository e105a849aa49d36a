"""What may be asked of the server that changes people, by its own gateway or over the hop.

Who asks is proved again there by the credential that the person sent: another node's word is not
enough to become an administrator (ADR 12, ADR 25).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ollama_distributed.access.people import SessionRecord, UserRecord
from ollama_distributed.base.users import NewUserAsk, PasswordAsk, UserAsk


class _Secret(msgspec.Struct, frozen=True, kw_only=True):
    """Holds what no log or error may show: it shows its kind only."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"


class SignIn(_Secret, frozen=True, kw_only=True, tag="sign_in"):
    name: str
    password: str
    address: str = ""
    agent: str = ""


class Redeem(_Secret, frozen=True, kw_only=True, tag="redeem"):
    """The code that a sign-in in the browser handed to a program of the same person."""

    code: str
    verifier: str
    address: str = ""
    agent: str = ""


class OidcName(msgspec.Struct, frozen=True, kw_only=True, tag="oidc_name"):
    """What people call the provider."""


class OidcStart(msgspec.Struct, frozen=True, kw_only=True, tag="oidc_start"):
    redirect_uri: str
    state: str
    nonce: str
    challenge: str


class OidcFinish(_Secret, frozen=True, kw_only=True, tag="oidc_finish"):
    code: str
    redirect_uri: str
    nonce: str
    verifier: str
    address: str = ""
    agent: str = ""
    program_challenge: str = ""
    """Of a program that waits for a code; empty: a session is made."""


class SignOut(_Secret, frozen=True, kw_only=True, tag="sign_out"):
    """One session; without an id the one that asks."""

    credential: str
    session: str = ""


class Renew(_Secret, frozen=True, kw_only=True, tag="renew"):
    credential: str


class Exchange(_Secret, frozen=True, kw_only=True, tag="exchange"):
    """A token of short life for a key or a session."""

    credential: str


class ChangeOwnPassword(_Secret, frozen=True, kw_only=True, tag="own_password"):
    credential: str
    ask: PasswordAsk
    address: str = ""


class CreateUser(_Secret, frozen=True, kw_only=True, tag="create_user"):
    credential: str
    ask: NewUserAsk


class ChangeUser(_Secret, frozen=True, kw_only=True, tag="change_user"):
    credential: str
    name: str
    ask: UserAsk


class SetPassword(_Secret, frozen=True, kw_only=True, tag="set_password"):
    credential: str
    name: str
    ask: PasswordAsk


class DeleteUser(_Secret, frozen=True, kw_only=True, tag="delete_user"):
    credential: str
    name: str


class EndSessions(_Secret, frozen=True, kw_only=True, tag="end_sessions"):
    """All of a user."""

    credential: str
    name: str


class Touch(msgspec.Struct, frozen=True, kw_only=True, tag="touch"):
    """Sessions that were used, and when: it only keeps them from ending for want of use."""

    seen: dict[str, float]


Op: TypeAlias = (
    SignIn
    | Redeem
    | OidcName
    | OidcStart
    | OidcFinish
    | SignOut
    | Renew
    | Exchange
    | ChangeOwnPassword
    | CreateUser
    | ChangeUser
    | SetPassword
    | DeleteUser
    | EndSessions
    | Touch
)


class Ask(msgspec.Struct, frozen=True):
    """The body on the hop."""

    op: Op


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. The records are learned by who asked, before the state brings them."""

    user: UserRecord | None = None
    session: SessionRecord | None = None
    token: str = ""
    """A session's, a JWT, a code, a URL or a name, as was asked for."""
    ended: tuple[str, ...] = ()
    """Sessions."""
    deleted: str = ""
    """A user."""
