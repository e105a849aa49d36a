"""Which policy holds for whom, and what it says of one request. Pure.

By key, else by role, else by team. The verdict on models is kept per policy and name, so a
request pays for a look-up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase

from ollama_distributed.base.errors import Forbidden, Invalid, InvalidName
from ollama_distributed.base.identity import ROLES, Identity, Role
from ollama_distributed.base.labels import check_node_label
from ollama_distributed.base.policies import Limits as Limits
from ollama_distributed.base.policies import Policy as Policy
from ollama_distributed.models.names import ModelName, name_key
from ollama_distributed.state.access import POLICY_NAME

MAX_GLOBS = 64
MAX_GLOB = 256
MAX_LABELS = 16
NEVER_BOUND: tuple[Role, ...] = ("admin", "node")
"""Roles that no policy holds for by itself: it could lock out everyone who may change it."""


class Holding:
    """Which of these policies holds for whom: made once for all keys."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._named = policies
        self._roles: dict[str, Policy] = {}
        self._teams: dict[str, Policy] = {}
        for name in sorted(policies, reverse=True):  # where two claim one, the first name counts
            self._roles |= dict.fromkeys(policies[name].roles, policies[name])
            self._teams |= dict.fromkeys(policies[name].teams, policies[name])

    def of(self, role: Role, team: str, named: str) -> Policy | None:
        """The policy that holds; None: none does.

        Raises:
            Forbidden: the key names one that is not known here, so nothing is known to be allowed.
        """
        if named:
            policy = self._named.get(named)
            if policy is None:
                raise Forbidden(f"the policy {named!r} of this key is not known here")
            return policy
        if role in NEVER_BOUND:
            return None
        return self._roles.get(role) or self._teams.get(team)


def policy_of(policies: Mapping[str, Policy], role: Role, team: str, named: str) -> Policy | None:
    """As `Holding.of`."""
    return Holding(policies).of(role, team, named)


def allows_model(identity: Identity, name: str) -> bool:
    """Whether the model exists for this identity; `name` as a client or a list writes it."""
    policy = identity.policy
    return policy is None or policy.all_models or _fits(policy.models, name)


def demand_all_models(identity: Identity | None) -> None:
    """For what names files by their content: whose model they are of is not known, and who knows the
    digest of another's weights must get no model of them.

    Raises:
        Forbidden: some models do not exist for this identity.
    """
    policy = identity.policy if identity is not None else None
    if policy is not None and not policy.all_models:
        raise Forbidden(f"the policy {policy.name!r} allows some models only, and so not this")


@functools.lru_cache(maxsize=4096)
def _fits(globs: tuple[str, ...], name: str) -> bool:
    forms = _forms(name)
    return any(fnmatchcase(form, glob.lower()) for glob in globs for form in forms)


def _forms(name: str) -> tuple[str, ...]:
    """The spellings that a glob may mean: as shown, as shown without `:latest`, and in full."""
    try:
        parsed = ModelName.parse(name)
    except InvalidName:
        return (name_key(name),)
    shown = parsed.display.lower()
    return shown, shown.removesuffix(":latest"), parsed.key


def check_policy(policy: Policy) -> None:
    """Whether it can be meant.

    Raises:
        Invalid: says which field is at fault.
    """
    for globs, field in ((policy.models, "models"), (policy.routes, "routes")):
        if len(globs) > MAX_GLOBS or any(not 0 < len(glob) <= MAX_GLOB for glob in globs):
            raise Invalid(
                f"{field} has at most {MAX_GLOBS} patterns of 1 to {MAX_GLOB} characters", param=field
            )
    for number, field in ((policy.max_context, "max_context"), (policy.max_output, "max_output")):
        if number is not None and number < 1:
            raise Invalid(f"{field} is a number of tokens, 1 or more", param=field)
    if len(policy.nodes) > MAX_LABELS:
        raise Invalid(f"at most {MAX_LABELS} labels of nodes can be asked for", param="nodes")
    for label, value in policy.nodes.items():
        check_node_label(label, value)
    if policy.cache_group and not POLICY_NAME.fullmatch(policy.cache_group):
        raise Invalid(
            "a group's name is 1-40 of a-z, 0-9, _ and -, a letter or digit first", param="cache_group"
        )
    for role in policy.roles:
        if role not in ROLES or role in NEVER_BOUND:
            usable = ", ".join(role for role in ROLES if role not in NEVER_BOUND)
            raise Invalid(f"a policy can hold for the roles {usable}, not for {role[:40]!r}", param="roles")
    _check_limits(policy.limits)


def _check_limits(limits: Limits) -> None:
    for field in Limits.__struct_fields__:
        number = getattr(limits, field)
        if isinstance(number, (int, float)) and not 0 <= number < float("inf"):
            raise Invalid(f"{field} is a number, 0 or more", param=f"limits.{field}")
