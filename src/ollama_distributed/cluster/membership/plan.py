"""Decides which node is joining, online, suspect or offline. Pure.

| is                   | becomes   | when                                                       |
|----------------------|-----------|------------------------------------------------------------|
| no record            | `joining` | it was heard, or has an advert                             |
| `joining`            | `online`  | it has an advert and beats for `READY_S`                   |
| `online`             | `suspect` | three beats are missed                                     |
| `online`             | `online`  | another boot beats: it restarted (a record with that boot) |
| `joining`, `suspect` | `offline` | silent for `offline_after_s`                               |
| `suspect`, `offline` | `online`  | it beats steadily for `hold_s`                             |
| any                  | `offline` | it said goodbye (reason `stopped`), at once                |
| any                  | no record | it was removed from the cluster                            |

Flapping: each return counts, until the node was steady or gone for `FORGIVE_S`. A node that
returned lately changes at most once in `SPACING_S` and must be steady for longer each time.
So a first fault is recorded and healed at once, and a bad link costs the cluster less and less.
`draining` is no state here but an operator's intent (`NodeState.status`).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.beats import Heard, offline_after_s, suspect_after_s
from ollama_distributed.state.records import Member

READY_S = 1.0
"""A node that joins, or starts after an orderly stop, beats so long before it gets work."""
STEADY_S = 2.0
"""So does a node that was away: one beat may be chance."""
SPACING_S = 10.0
"""Between two changes of a node that flaps."""
MAX_HOLD_S = 60.0
FORGIVE_S = 120.0
"""Twice the longest hold: else a node is forgiven for having been held."""
SHORT_LIFE_S = 10.0
"""A restart after a shorter life is one of a crash loop, and counts as a return."""

JOINED = "joined"
MISSED = "missed 3 heartbeats"
SILENT = "silent"
STOPPED = "stopped"
RESTARTED = "restarted"
BACK = "heard again"
UNSTEADY = "heartbeats come and go"


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader remembers of a node's changes. A new leader begins with none."""

    changed_at: float = float("-inf")
    returns: int = 0
    """Returns that are not forgiven."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one node at one moment."""

    node: NodeId
    advertised: bool = True
    removed: bool = False
    """From the cluster, by an operator."""
    member: Member | None = None
    heard: Heard | None = None
    standing: Standing = Standing()


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """`now` and `hears_since` are of the leader's monotonic clock, as are all arrivals."""

    now: float
    wall: float
    """Seconds since the Unix epoch, for the records only."""
    hears_since: float | None
    """Since when silence means something: the later of when this leader took over and when it
    last could not hear. None: it is deaf, and judges nobody by silence."""
    interval_s: float = 1.0
    """How often a node should beat that was never heard."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A record to write, and what to remember once it is written."""

    node: NodeId
    member: Member | None
    """None: delete the record."""
    standing: Standing = Standing()


def plan(nodes: Iterable[Seen], moment: Moment) -> list[Transition]:
    """What to write, in the order of `nodes`."""
    transitions = (_transition(seen, moment) for seen in nodes)
    return [transition for transition in transitions if transition is not None]


def settled(member: Member | None, heard: Heard | None, now: float) -> bool:
    """Whether nothing can change for a node that was not removed: it is online and beats. Almost
    all nodes are, almost always, and `plan` need not see them."""
    return (
        member is not None
        and heard is not None
        and member.status == "online"
        and member.boot == heard.boot
        and not heard.stopped
        and now - heard.at < suspect_after_s(heard.interval_s)
    )


def hold_s(returns: int) -> float:
    """How long a node must beat steadily to be online again, after so many returns."""
    return STEADY_S if returns == 0 else min(MAX_HOLD_S, SPACING_S * 2.0 ** min(returns - 1, 8))


def _transition(seen: Seen, moment: Moment) -> Transition | None:
    if seen.removed:
        return Transition(node=seen.node, member=None) if seen.member is not None else None
    returns = _returns(seen, moment.now)
    verdict = _judge(seen, moment, returns)
    if verdict is None:
        return None
    status, reason = verdict
    boot = seen.heard.boot if seen.heard is not None else seen.member.boot if seen.member else ""
    return Transition(
        node=seen.node,
        member=Member(node=seen.node, status=status, since=moment.wall, reason=reason, boot=boot),
        standing=Standing(changed_at=moment.now, returns=returns + (status == "online" and _counts(seen))),
    )


def _judge(seen: Seen, moment: Moment, returns: int) -> tuple[NodeStatus, str] | None:
    """The next status and why, or None: it stays."""
    heard, member = seen.heard, seen.member
    if heard is not None and heard.stopped:
        known = member is not None and member.boot == heard.boot and member.reason == STOPPED
        return None if known else ("offline", STOPPED)
    if member is None:
        return ("joining", "") if heard is not None or seen.advertised else None
    if returns and moment.now - seen.standing.changed_at < SPACING_S:
        return None
    interval_s = moment.interval_s if heard is None else heard.interval_s
    silence_s = _silence_s(heard, moment)
    gone, quiet = silence_s >= offline_after_s(interval_s), silence_s >= suspect_after_s(interval_s)
    steady_s = 0.0 if heard is None or quiet else _steady_s(heard, moment.now)
    match member.status:
        case "joining":
            if gone:
                return "offline", SILENT
            return ("online", JOINED) if seen.advertised and steady_s >= READY_S else None
        case "online" | "draining":
            if gone:
                return "offline", SILENT
            if quiet:
                return "suspect", UNSTEADY if returns else MISSED
            if not _restarted(seen):
                return None
            looping = returns > 0 and _counts(seen) and steady_s < STEADY_S
            return ("suspect", UNSTEADY) if looping else ("online", RESTARTED)
        case "suspect" | "offline":
            if gone:
                return ("offline", SILENT) if member.status == "suspect" else None
            orderly = member.reason == STOPPED
            if orderly and not _restarted(seen):
                return None  # a beat from before the goodbye, heard by a leader that missed it
            if steady_s < (READY_S if orderly else hold_s(returns)):
                return None
            return "online", RESTARTED if _restarted(seen) else BACK


def _silence_s(heard: Heard | None, moment: Moment) -> float:
    if moment.hears_since is None:
        return 0.0
    since = moment.hears_since if heard is None else max(heard.at, moment.hears_since)
    return moment.now - since


def _steady_s(heard: Heard, now: float) -> float:
    """A single beat is not steady, however long ago."""
    return now - heard.steady_since if heard.at > heard.steady_since else 0.0


def _restarted(seen: Seen) -> bool:
    heard, member = seen.heard, seen.member
    return heard is not None and member is not None and heard.boot != member.boot


def _counts(seen: Seen) -> bool:
    """Whether being online now is a return that speaks against the node. An orderly stop and a
    restart after a decent life do not."""
    heard, member = seen.heard, seen.member
    if heard is None or member is None or member.status == "joining" or member.reason == STOPPED:
        return False
    return not _restarted(seen) or 0.0 < heard.earlier_life_s < SHORT_LIFE_S


def _returns(seen: Seen, now: float) -> int:
    """Returns that count: none once the node was steady, or away, for long enough."""
    heard = seen.heard
    if heard is None:
        return seen.standing.returns
    forgiven = max(heard.at - heard.steady_since, now - heard.at) > FORGIVE_S
    return 0 if forgiven else seen.standing.returns
