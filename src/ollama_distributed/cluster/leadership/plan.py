"""Who may lead, and what to do about it next. Pure: what was seen, and the time, as arguments.

One lease, renewed by compare-and-set about every second. A candidate that saw it unchanged
for `TAKEOVER_S` of its own monotonic clock takes it, in one batch with the fence's next
epoch. A holder counts from before its last good renewal was sent, and stops after `LEASE_S`,
which is shorter: with clocks that run at nearly the same rate two never lead at once. That is
for liveness and good manners. What makes it safe is the fence: a leader that slept through
its own end is refused (Jepsen: a lease alone is no lock).

| leads | lease as seen                    | then                                              |
|-------|----------------------------------|---------------------------------------------------|
| yes   | a later epoch                    | step down                                         |
| yes   | not renewed for `LEASE_S`        | step down                                         |
| yes   | renewal is due                   | renew                                             |
| no    | none                             | take it                                           |
| no    | this node's own, of a former life or lost hold | take it                             |
| no    | another's, for `TAKEOVER_S` the same | take it                                       |
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.records import Lease, Term

RENEW_S = 1.0
LEASE_S = 2.5
"""Two lost renewals, and time for the third."""
TAKEOVER_S = 3.0
"""A fifth longer than `LEASE_S`: no two clocks of working machines run so far apart."""
SPREAD_S = 0.3
"""Candidates come up to so much later than they may, each by chance: mostly one comes first."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """The lease and the fence as this node saw them last."""

    lease: Lease | None = None
    lease_revision: int = 0
    term: Term | None = None
    term_revision: int = 0
    at: float = 0.0
    """Monotonic: when the lease was first seen at this revision."""

    @property
    def epoch(self) -> int:
        return max(self.lease.epoch if self.lease else 0, self.term.epoch if self.term else 0)


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """This node leads."""

    lease: Lease
    lease_revision: int
    fence_revision: int
    confirmed_at: float
    """Monotonic, from before the last renewal that succeeded was sent."""
    next_at: float
    """When the next renewal is due."""

    @property
    def epoch(self) -> int:
        return self.lease.epoch

    @property
    def until(self) -> float:
        return self.confirmed_at + LEASE_S


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What one node decides on."""

    node: NodeId
    candidate: bool
    """Only servers lead."""
    seen: Seen | None = None
    """None: the state was not loaded yet."""
    hold: Hold | None = None
    spread_s: float = 0.0
    """This node's own share of `SPREAD_S`, drawn anew for each lease that it sees."""
    not_before: float = 0.0
    """No new attempt before, after one that failed."""


class Wait(msgspec.Struct, frozen=True):
    until: float | None
    """Monotonic; None: until something is seen."""


class Take(msgspec.Struct, frozen=True):
    """Take the lease, if it and the fence still stand as they were seen."""

    lease: Lease
    term: Term
    seen: Seen


class Renew(msgspec.Struct, frozen=True):
    lease: Lease
    revision: int


class StepDown(msgspec.Struct, frozen=True):
    reason: str


Decision: TypeAlias = Wait | Take | Renew | StepDown


def leads(standing: Standing, now: float) -> bool:
    """Whether the node may act as the leader at this moment."""
    hold = standing.hold
    return hold is not None and now < hold.until and not _replaced(hold, standing.seen)


def leader(standing: Standing, now: float) -> NodeId | None:
    """Who leads, as far as this node knows; None: nobody, or it cannot know."""
    lease = valid_lease(standing, now)
    return lease.node if lease is not None else None


def valid_lease(standing: Standing, now: float) -> Lease | None:
    """The lease by which somebody leads, as far as this node knows; None: nobody does, or it
    cannot know. This node's own is known here before its own news of it comes back."""
    if standing.hold is not None and leads(standing, now):
        return standing.hold.lease
    seen = standing.seen
    if seen is None or seen.lease is None or seen.lease.node == standing.node:
        return None
    return seen.lease if now < seen.at + TAKEOVER_S else None


def decide(standing: Standing, now: float, *, since: float) -> Decision:
    """What to do now. `since`: the wall clock, for the record of a new lease."""
    hold, seen = standing.hold, standing.seen
    if hold is not None:
        if _replaced(hold, seen):
            return StepDown("another node leads")
        if now >= hold.until:
            return StepDown("the lease was not renewed in time")
        if now < hold.next_at:
            return Wait(min(hold.next_at, hold.until))
        renewed = msgspec.structs.replace(hold.lease, renewals=hold.lease.renewals + 1)
        return Renew(renewed, hold.lease_revision)
    if seen is None or not standing.candidate:
        return Wait(None)
    due = max(_free_at(standing, seen), standing.not_before)
    if now < due:
        return Wait(due)
    epoch = seen.epoch + 1
    lease = Lease(node=standing.node, epoch=epoch, since=since)
    return Take(lease, Term(node=standing.node, epoch=epoch), seen)


def _replaced(hold: Hold, seen: Seen | None) -> bool:
    return seen is not None and seen.epoch > hold.epoch


def _free_at(standing: Standing, seen: Seen) -> float:
    if seen.lease is None:
        return seen.at + standing.spread_s
    if seen.lease.node == standing.node:
        return seen.at
    return seen.at + TAKEOVER_S + standing.spread_s
