"""The OIDC provider that the settings name, and what they make of whom it vouches for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

from ollama_distributed.access.people import check_name
from ollama_distributed.adapters.oidc.provider import Client, OidcProvider
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Forbidden, Invalid
from ollama_distributed.base.users import UserRole
from ollama_distributed.node.oidc_settings import OidcSettings
from ollama_distributed.node.people.ports import Person

MIGHT: tuple[UserRole, ...] = get_args(UserRole)
"""The mightiest first."""


class ConfiguredProvider:
    """Implements `ports.Provider`."""

    def __init__(self, settings: OidcSettings, clock: Clock) -> None:
        self._settings = settings
        self._provider = OidcProvider(
            Client(
                issuer=settings.issuer,
                client_id=settings.client_id,
                client_secret=settings.client_secret.get_secret_value(),
                scopes=tuple(settings.scopes),
                hosts=tuple(settings.hosts),
                private=settings.private,
                ca=None if settings.ca is None else str(settings.ca.expanduser().absolute()),
            ),
            wall=clock.time,
            monotonic=clock.monotonic,
        )

    @property
    def name(self) -> str:
        return self._settings.title or urlsplit(self._settings.issuer).hostname or ""

    async def aclose(self) -> None:
        await self._provider.aclose()

    async def start(self, *, redirect_uri: str, state: str, nonce: str, challenge: str) -> str:
        return await self._provider.authorization_url(
            redirect_uri=self._public(redirect_uri), state=state, nonce=nonce, challenge=challenge
        )

    async def finish(self, *, code: str, redirect_uri: str, nonce: str, verifier: str) -> Person:
        claims = await self._provider.redeem(
            code=code, redirect_uri=self._public(redirect_uri), nonce=nonce, verifier=verifier
        )
        return person_of(claims, self._settings)

    def _public(self, url: str) -> str:
        """The same path where browsers reach it."""
        base = self._settings.public_url.rstrip("/")
        return base + urlsplit(url).path if base else url


def person_of(claims: Mapping[str, Any], settings: OidcSettings) -> Person:
    """Whom verified claims are about, here.

    Raises:
        Forbidden: in no group that may sign in, or without a usable name.
    """
    name = claims.get(settings.name_claim)
    try:
        name = check_name(name.lower() if isinstance(name, str) else "")
    except Invalid:
        raise Forbidden(
            f"the provider gives no name that can be used here (claim {settings.name_claim!r})"
        ) from None
    if settings.name_claim == "email" and claims.get("email_verified") is not True:
        raise Forbidden("the provider has not verified this e-mail address")
    given = claims.get(settings.groups_claim, [])
    groups = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    roles = [role for group, role in settings.roles.items() if group in groups]
    role = min(roles, key=MIGHT.index) if roles else settings.default_role
    if role is None:
        raise Forbidden("none of this person's groups may sign in here (the setting `oidc.roles`)")
    team = next((team for group, team in settings.teams.items() if group in groups), "default")
    return Person(subject=f"{settings.issuer}|{claims['sub']}", name=name, role=role, team=team)
