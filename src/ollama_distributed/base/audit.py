"""What is kept of who changed what, and how the API says it.

Shared by the gateway, which writes it, and the SDK, which reads it. A record is part of a chain: its
shape is pinned by `hash`, so fields are added with defaults only and left out while they have them.
"""

from __future__ import annotations

import msgspec


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was done, tried or refused. Never a secret, a prompt or a body."""

    action: str
    """A route (`DELETE /api/v1/nodes/{id}`), or what happened (`node.admitted`, `sign-in`)."""
    result: str
    """`begun`: it is about to be done; `ok`; else the code of the error."""
    object: str = ""
    """What it was done to."""
    actor: str = ""
    """The user, else the key's id, else the role."""
    role: str = ""
    team: str = ""
    request_id: str = ""
    source: str = ""
    """Address it came from."""
    detail: str = ""
    count: int = 1
    """So many alike, of which only this one is kept."""
    alarm: bool = False
    """A person must look."""


class AuditRecord(AuditEntry, frozen=True, kw_only=True, omit_defaults=True):
    """An entry in its place in the chain of a node."""

    node: str
    seq: int
    """From 1."""
    at: float
    """Seconds since the Unix epoch; never less than in the record before."""
    prev: str
    """The hash of the record before."""
    hash: str = ""
    """SHA-256 over the canonical JSON of all the rest, hex."""


class AuditFilter(msgspec.Struct, frozen=True, kw_only=True):
    limit: int = 100
    before: str = ""
    """`next` of the page before."""
    since: float = 0.0
    actor: str = ""
    action: str = ""
    """A part of it; of `object` too."""
    object: str = ""
    result: str = ""
    node: str = ""
    """Its id."""
    request_id: str = ""


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/audit`: the newest first."""

    records: tuple[AuditRecord, ...]
    next: str | None = None
    """For `before`; None: there are no more."""
    away: tuple[str, ...] = ()
    """Names of nodes of whose chains nobody who answered has a copy."""


class ChainReport(msgspec.Struct, frozen=True, kw_only=True):
    """One chain, looked at from its first record to its last."""

    node: str
    name: str = ""
    at: str = ""
    """Name of the node on whose disk it is: a copy, unless it is `name`."""
    first: int = 1
    """Number of the first record that is kept; those before it were removed for their age."""
    records: int = 0
    """Number of the last."""
    head: str = ""
    """Its hash."""
    fault: str = ""
    """What is wrong; empty: it is whole."""
    fault_seq: int = 0
    """At which record."""


class VerifyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/audit/verify`."""

    ok: bool
    chains: tuple[ChainReport, ...]
    away: tuple[str, ...] = ()
    """Nodes that did not answer: what is on their disks was not looked at."""
