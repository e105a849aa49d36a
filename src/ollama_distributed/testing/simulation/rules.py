"""What must hold at every moment, checked as it happens. Pure but for the trace.

It sees every commit at the engine with the true identity of its writer, which no node can
forge, and every state that a mirror shows. A rule that breaks stops the simulation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.plan import BACK, RESTARTED, SPACING_S, STOPPED, UNSTEADY
from ollama_distributed.cluster.ports import Entry, Fence, Removed, Resync, WatchEvent, Write
from ollama_distributed.state import keys
from ollama_distributed.state.changes import Change
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import decode
from ollama_distributed.state.records import Applied, Lease, Member, Term
from ollama_distributed.testing.simulation.comparing import Stored, differing, follows
from ollama_distributed.testing.simulation.trace import Trace

LEADERS_ONLY = ("members.", "intents.", "config.", "changes.", "cluster.")
"""Keys that only the leader writes, under its fence."""
RECENT_S = 100.0
"""A return is surely not forgiven yet (`membership.plan.FORGIVE_S` is more)."""
SPACING_TOLERANCE_S = 1.0
"""What is spaced are the leader's decisions, by its clock; seen here are commits, after a way
through a slow network."""
HELD_RETURNS = 3
FULL_LOOK_EVERY = 256
"""So many changes of one mirror pass between two comparisons of all it shows."""


class _Flaps(msgspec.Struct):
    """Changes of one node under one leader."""

    epoch: int = 0
    changed_at: float = float("-inf")
    returned_at: float = float("-inf")
    returns: int = 0
    status: NodeStatus = "joining"
    orderly: bool = False


class Rules:
    def __init__(self, trace: Trace, now: Callable[[], float]) -> None:
        self.broken: list[str] = []
        self.on_broken: Callable[[], None] = lambda: None
        self.journal: dict[int, tuple[str, bytes | None]] = {}
        """Every change by its revision."""
        self.made: dict[str, list[int]] = {}
        """By actor: the revisions at which its proposals applied."""
        self.proposed: dict[str, Change | None] = {}
        """By actor; each actor of the workload proposes once. None: it is not known what."""
        self.arrived: Counter[tuple[str, bytes]] = Counter()
        """How often a node got a message."""
        self.counts: Counter[str] = Counter()
        """What the run came across: a run without faults proves little."""
        self.epoch = 0
        self.leading: Callable[[], Sequence[str]] = tuple
        """Who leads at this moment, each by itself."""
        self._trace = trace
        self._now = now
        self._term: Term | None = None
        self._term_revision = 0
        self._lease: Lease | None = None
        self._flaps: dict[NodeId, _Flaps] = {}
        self._looks: Counter[str] = Counter()

    def break_(self, what: str) -> None:
        self._trace.note("BROKEN", rule=what)
        self.broken.append(what)
        self.on_broken()

    # ── commits ─────────────────────────────────────────────────────────────────────

    def preloaded(self, write: Write, revision: int) -> None:
        self.journal[revision] = (write.key, write.value)

    def refused(self, by: str, fence: Fence | None) -> None:
        """A batch met a conflict."""
        stale = fence is not None and fence.revision != self._term_revision
        self.counts["fence_refused" if stale else "conflict"] += 1
        if stale:
            self._trace.note("fence.refused", by=by)

    def committed(
        self,
        by: str,
        writes: Sequence[Write],
        fence: Fence | None,
        revisions: Sequence[int],
        before: Mapping[str, Entry | None],
    ) -> None:
        self._trace.note("commit", by=by, at=revisions[-1], what=_digest(writes))
        self.counts["commit"] += 1
        for write, revision in zip(writes, revisions, strict=True):
            if revision in self.journal:
                self.break_(f"revision {revision} was given twice")
            self.journal[revision] = (write.key, write.value)
        taken = any(write.key == keys.FENCE for write in writes)
        for write, revision in zip(writes, revisions, strict=True):
            match write.key:
                case keys.LEASE:
                    self._lease_written(by, write, taken=taken)
                case keys.FENCE:
                    self._term_written(by, write, revision)
                case key if key.startswith(LEADERS_ONLY):
                    self._leader_wrote(by, write, fence)
                case key if key.startswith("nodes.") and write.value is not None and f".{by}." not in key:
                    self.break_(f"{by} wrote {key}, which is another node's")
        self._applied(writes, before, revisions)

    def _lease_written(self, by: str, write: Write, *, taken: bool) -> None:
        before = self._lease
        if write.value is None:
            if before is None or before.node != by:
                self.break_(f"{by} gave back a lease that is not its own")
            self._lease = None
            return
        self._lease = lease = decode(write.value, Lease)
        if lease.node != by:
            self.break_(f"{by} wrote a lease for {lease.node}")
        if taken:
            if lease.epoch != self.epoch + 1:
                self.break_(f"{by} took the lease with epoch {lease.epoch} after {self.epoch}")
        elif before is None or (before.node, before.epoch) != (lease.node, lease.epoch):
            self.break_(f"{by} took the lease without a new term")
        elif lease.renewals <= before.renewals:
            self.break_(f"{by} renewed its lease {before.renewals} to {lease.renewals}")

    def _term_written(self, by: str, write: Write, revision: int) -> None:
        if write.value is None:
            self.break_(f"{by} deleted the fence")
            return
        term = decode(write.value, Term)
        if term.node != by or term.epoch != self.epoch + 1:
            self.break_(f"{by} wrote term {term.epoch} of {term.node} after epoch {self.epoch}")
        self._term, self._term_revision, self.epoch = term, revision, max(self.epoch, term.epoch)
        self.counts["term"] += 1
        self._trace.note("term", node=term.node, epoch=term.epoch)

    def _leader_wrote(self, by: str, write: Write, fence: Fence | None) -> None:
        if fence is None or fence.key != keys.FENCE:
            self.break_(f"{by} wrote {write.key} without a fence")
        elif fence.revision != self._term_revision:
            self.break_(f"a stale fence let {by} write {write.key}")
        elif self._term is None or self._term.node != by:
            self.break_(f"{by} wrote {write.key} under the term of {self._term and self._term.node}")
        elif write.key.startswith("members."):
            self._member_written(NodeId(write.key.removeprefix("members.")), write)

    # ── members ─────────────────────────────────────────────────────────────────────

    def _member_written(self, node: NodeId, write: Write) -> None:
        if write.value is None:
            self._flaps.pop(node, None)
            self._trace.note("member", node=node, status="removed")
            return
        member = decode(write.value, Member)
        now = self._now()
        self.counts[f"member_{member.status}"] += 1
        self._trace.note("member", node=node, status=member.status, reason=repr(member.reason))
        flaps = self._flaps.get(node)
        if flaps is None or flaps.epoch != self.epoch:
            flaps = self._flaps[node] = _Flaps(epoch=self.epoch)
        orderly = member.reason == STOPPED or flaps.orderly
        flapping = now - flaps.returned_at < RECENT_S and member.status != flaps.status
        if flapping and not orderly and now - flaps.changed_at < SPACING_S - SPACING_TOLERANCE_S:
            self.break_(f"{node} flaps and changed again after {now - flaps.changed_at:.2f} s")
        if member.status == "online" and member.reason == BACK:
            flaps.returned_at = now
        flaps.returns += member.status == "online" and member.reason in (BACK, RESTARTED)
        if member.reason == UNSTEADY:
            self.counts["damped"] += 1
        if member.status != flaps.status:
            flaps.changed_at = now
        flaps.status, flaps.orderly = member.status, member.reason == STOPPED

    def began_to_lead(self, node: str) -> None:
        """With clocks that run nearly alike two never lead at once."""
        if others := [other for other in self.leading() if other != node]:
            self.break_(f"{node} began to lead while {', '.join(others)} leads")

    def held(self, node: NodeId) -> bool:
        """Whether the leader may hold a node back for more than 20 s (`membership.plan.hold_s`)."""
        flaps = self._flaps.get(node)
        return flaps is not None and flaps.epoch == self.epoch and flaps.returns >= HELD_RETURNS

    # ── changes of operators ────────────────────────────────────────────────────────

    def _applied(
        self, writes: Sequence[Write], before: Mapping[str, Entry | None], revisions: Sequence[int]
    ) -> None:
        for write in writes:
            if not write.key.startswith("changes.") or write.value is None:
                continue
            actor = decode(write.value, Applied).by
            self.made.setdefault(actor, []).append(revisions[-1])
            if len(self.made[actor]) > 1:
                self.break_(f"the change of {actor} was made twice")
            if actor not in self.proposed:
                self.break_(f"a change of {actor} was made that nobody proposed")
            elif (change := self.proposed[actor]) is not None and not follows(
                change, {w.key: w.value for w in writes}, before
            ):
                self.break_(f"{change} of {actor} was not what was made")

    # ── messages ────────────────────────────────────────────────────────────────────

    def heard(self, node: str, sender: str, body: bytes) -> None:
        """A message arrived; each has a body of its own, `<actor>@<sender>`."""
        self.counts["message"] += 1
        self.arrived[node, body] += 1
        if self.arrived[node, body] > 1:
            self.break_(f"{node} got {body!r} twice")
        if not body.endswith(f"@{sender}".encode()):
            self.break_(f"{node} got {body!r} as from {sender}")

    def acknowledged(self, node: str, body: bytes) -> None:
        """The sender was told that `node` handled it."""
        if not self.arrived[node, body]:
            self.break_(f"{node} never got {body!r}, which was acknowledged")

    # ── what nodes see ──────────────────────────────────────────────────────────────

    def mirrored(self, node: str, before: ClusterState, after: ClusterState, engine: Stored) -> None:
        """A mirror shows a new state."""
        if after.revision < before.revision:
            self.break_(f"the mirror of {node} went back from {before.revision} to {after.revision}")
            return
        key, value = self.journal.get(after.revision, (None, None))
        if key is not None and keys.subject(key) is not None:
            stored = after.raw.get(key)
            if stored != (None if value is None else (value, after.revision)):
                self.break_(f"the mirror of {node} at {after.revision} shows another {key}")
        self._looks[node] += 1
        if after.revision == engine.revision and self._looks[node] % FULL_LOOK_EVERY == 0:
            self.look(node, after, engine)

    def look(self, node: str, state: ClusterState, engine: Stored) -> None:
        """Compare all that a mirror shows with the engine; both at the same revision."""
        if (wrong := differing(state, engine)) is not None:
            self.break_(f"the mirror of {node} at {state.revision} shows another {wrong}")

    def watched(self, node: str, last: int, event: WatchEvent) -> int:
        """A watch of all keys gave `event` after revision `last`; the new last one."""
        match event:
            case Resync(revision=revision):
                self.counts["resync"] += 1
                if revision < last:
                    self.break_(f"a watch on {node} went back from {last} to {revision}")
            case Entry(key, value, revision):
                self._check_event(node, last, revision, (key, value))
            case Removed(key, revision):
                self._check_event(node, last, revision, (key, None))
        return event.revision

    def _check_event(self, node: str, last: int, revision: int, change: tuple[str, bytes | None]) -> None:
        if revision != last + 1:
            self.break_(f"a watch on {node} showed {revision} after {last}")
        if self.journal.get(revision) != change:
            self.break_(f"a watch on {node} showed {change[0]} at {revision}, which it is not")


def _digest(writes: Sequence[Write]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for write in writes:
        digest.update(write.key.encode() + b"\0" + (b"-" if write.value is None else b"+" + write.value))
    return f"{','.join(write.key for write in writes[:3])}{'…' * (len(writes) > 3)}:{digest.hexdigest()}"
