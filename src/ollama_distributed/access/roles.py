"""Which role may do what: one table, verb by resource, deny by default.

Every surface asks here: REST, Ollama, OpenAI, Anthropic, and the hop between nodes. What a role
may do, a policy can take away (`access/policies.py`); nothing adds to it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

import msgspec

from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.identity import ROLES, Identity, Role

Verb = Literal["inference", "read", "models", "admin"]
"""inference: generate, embed, rerank · read: lists, health, metrics · models: create, copy,
delete, upload · admin: everything that changes who may do what, or the node itself."""

Resource = Literal[
    "inference", "files", "batches", "models", "transfers", "placement", "disk", "queue", "decisions",
    "node", "docs", "metrics", "nodes", "members", "cluster", "tokens", "config",
    "account", "keys", "policies", "users", "usage", "audit", "hop",
]  # fmt: skip
"""`node`: this one's health and version · `nodes`: draining and labels · `members`, `tokens`: who is
in the cluster · `decisions`: where requests went and why · `account`: one's own."""

TABLE = """
            admin operator user viewer local plugin node
inference   irma  irma     ir   r      irm   ir     -
files       irma  irma     irm  r      irm   -      -
batches     irma  irma     irm  r      irm   -      -
models      irma  irma     r    r      irm   r      -
transfers   irma  irma     -    r      irm   -      -
placement   irma  irma     -    r      irm   -      -
disk        irma  irma     -    r      irm   -      -
queue       irma  irma     r    r      r     r      -
decisions   irma  irma     -    r      ir    -      -
node        irma  irma     r    r      r     r      -
docs        irma  r        r    r      r     r      -
metrics     irma  r        -    r      r     r      -
nodes       irma  irma     -    r      r     -      -
members     irma  r        -    r      r     -      -
cluster     irma  r        -    r      r     -      -
tokens      irma  r        -    -      r     -      -
config      irma  r        -    r      r     -      -
account     irma  irma     irma irma   irma  r      -
keys        irma  -        -    -      -     -      -
policies    irma  r        -    -      -     -      -
users       irma  -        -    -      -     -      -
usage       irma  r        r    r      r     -      -
audit       irma  r        -    -      -     -      -
hop         -     -        -    -      -     -      irma
"""
"""i: inference, r: read, m: models, a: admin, -: nothing. Of `usage` a user sees the own only."""

_LETTERS: Mapping[str, Verb] = {"i": "inference", "r": "read", "m": "models", "a": "admin"}
_NAMES_MODELS = frozenset(
    {"transfers", "placement", "disk", "decisions", "metrics", "queue", "usage", "audit"}
)
"""Resources that tell of models whoever asks: closed to those for whom some models do not exist."""


class Right(msgspec.Struct, frozen=True):
    """What a route asks for."""

    verb: Verb
    resource: Resource


INFERENCE = Right("inference", "inference")


def _read(table: str) -> Mapping[Role, frozenset[Right]]:
    head, *rows = table.strip().splitlines()
    roles: list[str] = head.split()
    assert sorted(roles) == sorted(ROLES)
    found: dict[str, set[Right]] = {role: set() for role in roles}
    seen: list[str] = []
    for row in rows:
        resource, *cells = row.split()
        assert resource in get_args(Resource), row
        seen.append(resource)
        for role, cell in zip(roles, cells, strict=True):
            letters = cell.strip("-")
            found[role] |= {Right(_LETTERS[one], resource) for one in letters}  # type: ignore[arg-type]  # asserted
    assert sorted(seen) == sorted(get_args(Resource)), "a row for each resource"
    return {role: frozenset(found[role]) for role in ROLES}


MAY: Mapping[Role, frozenset[Right]] = _read(TABLE)


def may(identity: Identity, right: Right) -> bool:
    """Whether the role has the right; a policy may still take it away."""
    return right in MAY[identity.role]


def demand(identity: Identity, right: Right, path: str = "") -> None:
    """The seed's `Authorize(user, resource, action)`; `path`: of the route, for policies.

    Raises:
        Forbidden: the identity's role or its policy does not allow it.
    """
    if right not in MAY[identity.role]:
        raise Forbidden(
            f"the role {identity.role!r} may not do this ({right.verb} {right.resource}); use a key "
            "that may, an admin's for instance"
        )
    policy = identity.policy
    if policy is None:
        return
    if policy.read_only and right.verb != "read":
        raise Forbidden(f"the policy {policy.name!r} of this key allows reading only")
    if path and not _on_route(policy.routes, path):
        raise Forbidden(f"the policy {policy.name!r} of this key does not allow this route")
    if right.resource in _NAMES_MODELS and not policy.all_models:
        raise Forbidden(f"the policy {policy.name!r} of this key allows some models only, and so not this")


@functools.lru_cache(maxsize=4096)
def _on_route(globs: tuple[str, ...], path: str) -> bool:
    return "*" in globs or any(fnmatchcase(path, glob) for glob in globs)
