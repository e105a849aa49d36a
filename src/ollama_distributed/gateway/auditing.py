"""Which requests are recorded before they are served, and what is said of them.

One place for all routes: a route that changes who may do what, the cluster or its models is recorded
because of the right that it asks for, not because somebody thought of it. If it cannot be recorded it
is not done. Bodies are looked at for names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from ollama_distributed.access.roles import Right, Verb
from ollama_distributed.base.audit import AuditEntry, AuditFilter, AuditPage, VerifyAnswer
from ollama_distributed.base.codec import UNREADABLE
from ollama_distributed.base.identity import Identity
from ollama_distributed.gateway.gate import Head

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_PRIVILEGED: frozenset[Verb] = frozenset({"admin", "models"})
_UNRECORDED = ("/api/blobs/",)
"""Bytes that no model names yet change nothing; the `create` that names them is recorded."""
SIGN_IN = frozenset({"/api/v1/auth/login", "/api/v1/auth/oidc/callback"})
"""Public routes whose success is recorded before it is told, and whose failure is after."""
_NAMED = ("model", "name", "source", "from", "destination", "node", "user", "role", "dead", "new")
"""Fields of bodies that say what is meant. A secret is never among them."""
_MOST_VALUE = 200


class Auditing(Protocol):
    """`access.audit.cluster.ClusterAudit`."""

    async def write(self, entry: AuditEntry) -> None:
        """On the disk when it returns.

        Raises:
            DiskFull, Unavailable: it is not; what it is about must not be done.
        """
        ...

    def note(self, entry: AuditEntry) -> None:
        """Write it soon; it has happened."""
        ...

    def refused(self, entry: AuditEntry) -> None:
        """As `note`, of who was not let in; of a flood only some."""
        ...

    async def page(self, wanted: AuditFilter) -> AuditPage: ...

    async def verify(self) -> VerifyAnswer: ...


def is_privileged(method: str, path: str, right: Right | None) -> bool:
    """Whether a request of this right is recorded before it is served. `path`: the route's."""
    if right is None or method in _READING or path.startswith(_UNRECORDED):
        return False
    return right.verb in _PRIVILEGED


def entry_of(
    head: Head, route: str, request_id: str, identity: Identity | None, result: str, about: str = ""
) -> AuditEntry:
    return AuditEntry(
        action=f"{head.method} {route}",
        result=result,
        object=about,
        actor=(identity.user or identity.key_id or identity.role) if identity else "",
        role=identity.role if identity else "",
        team=identity.team if identity else "",
        request_id=request_id,
        source=head.peer or "",
    )


def refused_entry(head: Head, request_id: str, code: str, identity: Identity | None = None) -> AuditEntry:
    """Who was not let in. The path is left out: whoever has no key may write what they like there."""
    action = "sign-in" if identity is None else f"{head.method} {head.path[:_MOST_VALUE]}"
    return msgspec.structs.replace(entry_of(head, "", request_id, identity, code), action=action)


def about(parameters: Mapping[str, object], body: bytes) -> str:
    """What a request is about: the parameters of its path, and the names in its body."""
    said = {name: str(value)[:_MOST_VALUE] for name, value in parameters.items()}
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw]) if body else {}
        for name in _NAMED:
            if name in fields and name not in said:
                value = msgspec.json.decode(fields[name])
                if isinstance(value, str) and value:
                    said[name] = value[:_MOST_VALUE]
    except UNREADABLE:
        pass  # no object with names: the route says what is wrong with it
    return " ".join(f"{name}={value}" for name, value in said.items())
