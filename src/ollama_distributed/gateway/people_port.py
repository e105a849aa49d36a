"""What the routes of sign-in and users need of the node (`node/` connects it).

`credential` is what the person sent (key, session or token): a change is made by a server of the
cluster, which proves it again. Reads answer from this node's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from ollama_distributed.base.users import (
    NewUserAsk,
    PasswordAsk,
    SessionRow,
    UserAsk,
    UserRow,
)


class SignedIn(msgspec.Struct, frozen=True, kw_only=True):
    user: UserRow
    session: str
    token: str
    expires_at: float
    idle_s: float

    def __repr__(self) -> str:
        return f"SignedIn({self.user.name}, {self.session})"


class Visitor(msgspec.Struct, frozen=True):
    """From where somebody signs in."""

    address: str
    agent: str


class People(Protocol):
    @property
    def idle_s(self) -> float:
        """How long a session lives without being used."""
        ...

    def users(self) -> list[UserRow]:
        """Sorted by name."""
        ...

    def user(self, name: str) -> UserRow:
        """
        Raises:
            NotFound
        """
        ...

    def sessions(self, name: str) -> list[SessionRow]:
        """Of a user, newest first."""
        ...

    def session_of(self, credential: str) -> str:
        """The id of the session that it is of; empty: of none."""
        ...

    def jwks(self) -> Sequence[Mapping[str, Any]]: ...

    async def sign_in(self, name: str, password: str, visitor: Visitor) -> SignedIn:
        """
        Raises:
            Unauthenticated, TooManyAttempts, QueueFull, Unavailable
        """
        ...

    async def redeem(self, code: str, verifier: str, visitor: Visitor) -> SignedIn: ...

    async def sign_out(self, credential: str, session: str = "") -> None:
        """One session; without an id the one that asks."""
        ...

    async def renew(self, credential: str) -> SignedIn:
        """Another token for the session that asks; the old one ends within a minute."""
        ...

    async def exchange(self, credential: str) -> tuple[str, int]:
        """A JWT, and for how many seconds it holds."""
        ...

    async def change_own_password(self, credential: str, ask: PasswordAsk, visitor: Visitor) -> None:
        """All sessions of the person end."""
        ...

    async def oidc_name(self) -> str:
        """What people call the OIDC provider; empty: there is none, or no server says so now."""
        ...

    async def oidc_start(self, *, redirect_uri: str, state: str, nonce: str, challenge: str) -> str:
        """Where the browser is to go.

        Raises:
            NotOffered: no provider is configured.
            Unavailable: it does not answer.
        """
        ...

    async def oidc_finish(
        self, *, code: str, redirect_uri: str, nonce: str, verifier: str, visitor: Visitor
    ) -> SignedIn: ...

    async def oidc_finish_for_program(
        self,
        *,
        code: str,
        redirect_uri: str,
        nonce: str,
        verifier: str,
        challenge: str,
        visitor: Visitor,
    ) -> str:
        """A code for the program that knows the verifier of `challenge`."""
        ...

    async def create(self, credential: str, ask: NewUserAsk) -> UserRow:
        """
        Raises:
            Conflict, Invalid, Forbidden, Unavailable
        """
        ...

    async def change(self, credential: str, name: str, ask: UserAsk) -> UserRow: ...

    async def set_password(self, credential: str, name: str, ask: PasswordAsk) -> UserRow: ...

    async def delete(self, credential: str, name: str) -> None: ...

    async def end_sessions(self, credential: str, name: str) -> int:
        """How many ended."""
        ...
