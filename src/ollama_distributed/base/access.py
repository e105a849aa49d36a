"""What the API says of keys and policies: `/api/v1/keys`, `/api/v1/policies`, `/api/v1/auth/whoami`.

Shared by the gateway, which writes it, and the SDK, which reads it. Fields are added with
defaults only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from ollama_distributed.base.identity import Role
from ollama_distributed.base.policies import UNLIMITED, Limits, Policy
from ollama_distributed.base.priority import Priority

KeyStatus = Literal["valid", "expired", "revoked"]


class KeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A key without its secret. Times in seconds since the Unix epoch."""

    id: str
    name: str
    role: Role
    status: KeyStatus
    team: str = "default"
    policy: str = ""
    """The one that it names."""
    holds: str = ""
    """The policy that holds: its own, or that of its role or team; empty: none does."""
    created_at: float = 0.0
    created_by: str = ""
    expires_at: float | None = None
    revoked_at: float | None = None
    rotated_at: float | None = None
    old_until: float | None = None
    """Until then the secret before the last rotation is good too."""
    last_used_at: float | None = None
    """As far as the node that answers knows: told between nodes some seconds later."""
    admin_of: str = ""
    """The node whose `admin.json` holds it."""


class KeysAnswer(msgspec.Struct, frozen=True):
    keys: tuple[KeyRow, ...]


class KeyAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = ""
    role: Role = "user"
    team: str = "default"
    policy: str = ""
    ttl_s: float | None = None
    """Good so long; None: until it is revoked."""


class RotateAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    overlap_s: float = 86_400.0
    """The old secret stays good so long: time to bring the new one to where it is used."""


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    """Shown this once."""
    row: KeyRow


class PolicyAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy as it is to be; see `base.policies.Policy`. What is not given has no limit."""

    name: str = ""
    """Of a new one."""
    models: tuple[str, ...] = ("*",)
    routes: tuple[str, ...] = ("*",)
    read_only: bool = False
    max_context: int | None = None
    max_output: int | None = None
    priority: Priority = "interactive"
    nodes: Mapping[str, str] = {}
    cache_group: str = ""
    limits: Limits = UNLIMITED
    roles: tuple[str, ...] = ()
    teams: tuple[str, ...] = ()
    comment: str = ""
    version: int | None = None
    """The one that is changed: refused where it is another by now. None: whichever."""


class PoliciesAnswer(msgspec.Struct, frozen=True):
    policies: tuple[Policy, ...]


class ExplainAsk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may a key do, or somebody with this role and team?"""

    key: str = ""
    """Its id, never the key itself."""
    role: Role = "user"
    team: str = "default"
    model: str = ""
    path: str = ""
    """Of the route."""
    method: str = "POST"


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    allowed: bool
    reasons: tuple[str, ...]
    """One sentence for each rule that was asked, in order."""
    role: Role
    team: str
    policy: Policy | None = None
    """The one that holds."""
    by: Literal["key", "role", "team", "none"] = "none"
    """Where it comes from."""


class WhoAmI(msgspec.Struct, frozen=True, kw_only=True):
    role: Role
    team: str
    key_id: str = ""
    key_name: str = ""
    user: str = ""
    expires_at: float | None = None
    policy: Policy | None = None
    may: Mapping[str, tuple[str, ...]] = {}
    """Resource -> verbs, by role; the policy may take some away."""
