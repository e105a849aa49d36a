"""What the desk needs of an OIDC provider."""

from __future__ import annotations

from typing import Protocol

import msgspec

from ollama_distributed.base.users import UserRole


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """Whom an OIDC provider vouches for, and what the settings make of it."""

    subject: str
    """`issuer|sub`."""
    name: str
    role: UserRole
    team: str


class Provider(Protocol):
    """An OIDC provider: `node.people.provider.ConfiguredProvider`."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    async def start(self, *, redirect_uri: str, state: str, nonce: str, challenge: str) -> str:
        """Where the browser is to go."""
        ...

    async def finish(self, *, code: str, redirect_uri: str, nonce: str, verifier: str) -> Person:
        """
        Raises:
            Unauthenticated, Forbidden, Unavailable
        """
        ...
