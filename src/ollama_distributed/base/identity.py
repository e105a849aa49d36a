"""Who asks. Made once per request by `access/`, carried to every decision about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from ollama_distributed.base.ids import KeyId
from ollama_distributed.base.policies import UNLIMITED, Limits, Policy
from ollama_distributed.base.priority import Priority

Role = Literal["admin", "operator", "user", "viewer", "local", "node", "plugin"]
"""`local`: a person at this machine without a key; `node`: a member of the cluster, on its hop."""
ROLES: tuple[Role, ...] = get_args(Role)

_GROUP = "\x1f"
"""In no team's name, which is printable."""


class Identity(msgspec.Struct, frozen=True):
    """A caller whose key (or loopback address) was checked."""

    role: Role
    key_id: KeyId | None = None
    """None for the role `local`, which has no key."""
    team: str = "default"
    user: str = ""
    """The name of a person who signed in; empty: a key speaks for itself."""
    policy: Policy | None = None
    """The one that holds: the key's own, else its role's, else its team's. None: no limits."""

    @property
    def limits(self) -> Limits:
        return UNLIMITED if self.policy is None else self.policy.limits

    @property
    def priority(self) -> Priority:
        """The highest class that its requests may have."""
        return "interactive" if self.policy is None else self.policy.priority

    @property
    def node_labels(self) -> Mapping[str, str]:
        """What a node must have to serve it; empty: any node may."""
        return {} if self.policy is None else self.policy.nodes

    @property
    def tenant(self) -> str:
        """Who finds what its prompts left in caches: its team, or the group that its policy names."""
        if self.policy is not None and self.policy.cache_group:
            return _GROUP + self.policy.cache_group
        return self.team

    @property
    def owner(self) -> tuple[str, str, str]:
        """Who its objects belong to; the same after its policy changed."""
        return self.team, self.user, self.key_id or self.role
