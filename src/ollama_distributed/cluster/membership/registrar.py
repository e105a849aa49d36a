"""The leader's part of membership: writes each node's record when its state changes.

Every server runs it and hears; only the one that holds the fence writes, in batches that the
fence protects: a replaced leader changes nobody's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, DeadlineExceeded
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.beats import Ears, beat_interval_s
from ollama_distributed.cluster.membership.plan import Moment, Seen, Standing, Transition, plan, settled
from ollama_distributed.cluster.membership.ports import Leadership, View
from ollama_distributed.cluster.ports import Coordination, Fence, Write
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Member

TICK_S = 0.25
"""The leader judges so often; a quarter of the interval where beats are slower."""
ALONE_S = 1.0
"""A node that hears only itself, and well."""
MAX_TRANSITIONS = 200
"""In one batch; the rest follows at the next tick."""
FORGET_EVERY_S = 60.0

MEMBER_CHANGED = "member.changed"
FENCED = "members.fenced"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class _Written(msgspec.Struct, frozen=True):
    """A record that the mirror may not show yet."""

    member: Member | None
    revision: int


class _Term(msgspec.Struct):
    """One time of leading; nothing of it outlives it."""

    fence: Fence
    since: float
    standing: dict[NodeId, Standing] = {}
    written: dict[NodeId, _Written] = {}
    doubtful: dict[NodeId, Transition] = {}
    """Perhaps written: the answer did not come."""


class Registrar:
    def __init__(
        self,
        coordination: Coordination,
        consensus: Leadership,
        mirror: View,
        ears: Ears,
        *,
        clock: Clock,
        removed: Callable[[NodeId], bool],
    ) -> None:
        self._coordination = coordination
        self._consensus = consensus
        self._mirror = mirror
        self._ears = ears
        self._clock = clock
        self._removed = removed
        self._term: _Term | None = None
        self._forgot_at = clock.monotonic()
        self._news = anyio.Event()
        self._alone = False

    def wake(self) -> None:
        """Something is to be written now."""
        self._news.set()

    async def step(self) -> None:
        """Wait for the next tick, then judge and write."""
        alone = self._alone and len(self._ears) <= 1
        tick_s = ALONE_S if alone else max(TICK_S, beat_interval_s(len(self._ears)) / 4)
        with anyio.move_on_after(tick_s):
            await self._news.wait()
        self._news = anyio.Event()
        now = self._clock.monotonic()
        await self._keep_records(now)

    async def _keep_records(self, now: float) -> None:
        state = self._mirror.state
        if now - self._forgot_at > FORGET_EVERY_S:
            self._ears.forget(state.nodes, now)
            self._forgot_at = now
        term = self._current_term(now)
        if term is None:
            return
        seen = list(self._seen(state, term, now))
        self._alone = not seen and len(state.nodes) <= 1
        transitions = plan(seen, self._moment(term, now))[:MAX_TRANSITIONS]
        if transitions:
            await self._write(term, transitions)

    def _current_term(self, now: float) -> _Term | None:
        fence = self._consensus.fence()
        if fence is None:
            self._term = None
        elif self._term is None or self._term.fence != fence:
            self._term = _Term(fence, now)
        return self._term

    def _moment(self, term: _Term, now: float) -> Moment:
        hears_since = self._ears.hears_since(now)
        return Moment(
            now=now,
            wall=self._clock.time(),
            hears_since=None if hears_since is None else max(hears_since, term.since),
            interval_s=beat_interval_s(len(self._ears)),
        )

    def _seen(self, state: ClusterState, term: _Term, now: float) -> Iterator[Seen]:
        """Every node that is in a record or was heard and may change; in the same order wherever
        the same is known."""
        for node, known in state.nodes.items():
            sure = node not in term.written and node not in term.doubtful and not self._removed(node)
            if sure and settled(known.member, self._ears.get(node), now):
                continue
            yield self._one(state, term, node, member=known.member, advertised=known.advert is not None)
        for node in self._ears:
            if node not in state.nodes:
                yield self._one(state, term, node, member=None, advertised=False)

    def _one(
        self, state: ClusterState, term: _Term, node: NodeId, *, member: Member | None, advertised: bool
    ) -> Seen:
        written = term.written.get(node)
        if written is not None:
            if state.revision < written.revision:
                member = written.member
            else:
                del term.written[node]
        doubtful = term.doubtful.get(node)
        if doubtful is not None and member is not None and member == doubtful.member:
            # It was written. Not to count it would let a flapping node change too soon.
            del term.doubtful[node]
            term.standing[node] = doubtful.standing
        return Seen(
            node=node,
            advertised=advertised,
            removed=self._removed(node),
            member=member,
            heard=self._ears.get(node),
            standing=term.standing.get(node, Standing()),
        )

    async def _write(self, term: _Term, transitions: list[Transition]) -> None:
        writes = [
            Write(keys.member(t.node), None if t.member is None else encode(t.member)) for t in transitions
        ]
        try:
            revisions = await self._coordination.batch(writes, fence=term.fence)
        except Conflict as exc:
            # Another leader's epoch began; consensus will say so soon.
            log.info(FENCED, transitions=len(transitions), error=exc.message)
            return
        except DeadlineExceeded:
            term.doubtful.update({transition.node: transition for transition in transitions})
            raise
        for transition, revision in zip(transitions, revisions, strict=True):
            node, member = transition.node, transition.member
            term.doubtful.pop(node, None)
            term.standing[node] = transition.standing
            term.written[node] = _Written(member, revision)
            if member is None:
                log.info(MEMBER_CHANGED, node=node, status=None)
            else:
                log.info(MEMBER_CHANGED, node=node, status=member.status, reason=member.reason)
