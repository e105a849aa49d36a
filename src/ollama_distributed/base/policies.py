"""What a policy grants and limits: the struct that is replicated, shown, and carried by an identity.

Deny by default holds before it: a policy takes away from what a role may do, it never adds.
`None` and an empty mapping always mean "no limit".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.priority import Priority

Scope: TypeAlias = Literal["key", "team"]
"""Whether each key has a policy's rates for itself, or all keys of one team share them."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How much in which time. Tokens are those of prompt and answer together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_per_month: int | None = None
    """Of the calendar, UTC."""
    tokens_per_month: int | None = None
    budget_per_month: float | None = None
    """Money, in the currency that prices are set in."""
    concurrency: int | None = None
    """Requests that run or wait at once."""
    shared_by: Scope = "key"


UNLIMITED = Limits()


class Policy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One named policy."""

    name: str
    version: int = 1
    """Counts its changes: (key, version) has one verdict."""
    models: tuple[str, ...] = ("*",)
    """Globs over names as people see them (`llama3*`, `team/*:latest`); any that fits allows. A model
    that none allows is as if it did not exist."""
    routes: tuple[str, ...] = ("*",)
    """Globs over paths (`/v1/*`)."""
    read_only: bool = False
    """Nothing but reading: no inference, no changes."""
    max_context: int | None = None
    """Tokens that a request may hold: prompt and what it may generate."""
    max_output: int | None = None
    """Tokens that a request may generate; one that asks for more is refused."""
    priority: Priority = "interactive"
    """The highest class that a request may have."""
    nodes: Mapping[str, str] = {}
    """Labels: requests run on nodes that have all of these, and data stays there."""
    cache_group: str = ""
    """Whoever's policy names the same group shares what runners keep of prompts, over all teams, and can
    tell by the time to the first token what another asked. Empty: shared within the team only."""
    limits: Limits = UNLIMITED
    roles: tuple[str, ...] = ()
    """Roles that it holds for, where a key names none of its own."""
    teams: tuple[str, ...] = ()
    """Teams that it holds for, where neither key nor role has one."""
    comment: str = ""
    by: str = ""
    """The key that changed it last."""
    at: float = 0.0
    """When, seconds since the Unix epoch."""

    @property
    def all_models(self) -> bool:
        return "*" in self.models
