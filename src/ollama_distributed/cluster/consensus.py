"""The one door to consensus: who leads, what the state is, and how to change it.

    async with ConsensusEngine(coordination, mirror, node=…, role=…, clock=…, random=…) as engine:
        await engine.propose_change(SetDrain(node=node, drain=True), actor=key_id)

Any node may propose: the change goes to the leader as a request, and is refused within two
seconds when there is no leader or no quorum. Nothing here is on the path of inference.
"""

from __future__ import annotations

import random as chance
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DeadlineExceeded, Unavailable
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.leadership.service import Leadership, Listener
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import REFUSAL_S, Coordination, Fence, Write
from ollama_distributed.cluster.proposals import IN_DOUBT, Applier, NotLeader, proposals_to, result
from ollama_distributed.state.changes import Change, Proposal
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Lease

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

PROPOSE_S = REFUSAL_S - 0.1
"""A proposal has an answer, or an error, after so long at most."""
AGAIN_S = 0.1
"""Before the next look for a leader."""
SEEN_S = 1.0
"""How long a proposer waits to see its own change here, once it is made."""
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 16
"""83 bits: no two of the proposals that are remembered are alike."""


class ConsensusEngine:
    """`start` and `stop`, or an async context manager. The mirror must be running."""

    def __init__(
        self,
        coordination: Coordination,
        mirror: Mirror,
        *,
        node: NodeId,
        role: NodeRole,
        clock: Clock,
        random: chance.Random,
    ) -> None:
        self._coordination = coordination
        self._mirror = mirror
        self._node = node
        self._role = role
        self._clock = clock
        self._random = random
        self._leadership = Leadership(
            coordination, mirror, node=node, candidate=role == "server", clock=clock, chance=random
        )
        self._applier = Applier(self._leadership, mirror)
        self._open = AsyncExitStack()

    async def start(self) -> None:
        """Take part. Returns at once; whether this node leads comes out later."""
        async with AsyncExitStack() as opening:
            await opening.enter_async_context(self._leadership)
            for subject in (proposals_to(self._node), f"{proposals_to(self._node)}.*"):
                await opening.enter_async_context(self._coordination.serve(subject, self._applier.answer))
            self._open = opening.pop_all()

    async def stop(self) -> None:
        """Give the lease back and take part no more. Idempotent."""
        await self._open.aclose()

    async def __aenter__(self) -> ConsensusEngine:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # ── who leads ───────────────────────────────────────────────────────────────────

    def is_leader(self) -> bool:
        """At this very moment, by this node's clock. What decides is the fence."""
        return self._leadership.leads

    def get_leader(self) -> NodeId | None:
        """None: nobody leads, or this node is cut off and cannot know."""
        return self._leadership.leader

    def get_lease(self) -> Lease | None:
        """The leader with its epoch. The state's own record may be of the leader before."""
        return self._leadership.lease

    def fence(self) -> Fence | None:
        """For batches of the leader's own; None: this node does not lead."""
        return self._leadership.fence()

    def on_leadership(self, callback: Listener) -> Callable[[], None]:
        """Call `callback(leads)`: now if this node leads, and at each change. On the loop; it
        must be quick. The result takes it away again."""
        return self._leadership.on_change(callback)

    async def write(self, writes: Sequence[Write]) -> tuple[int, ...]:
        """A batch of the leader's own, fenced; a refused fence ends this node's leadership.

        Raises:
            Unavailable: it did not happen, or this node does not lead.
            Conflict: a revision does not hold.
            DeadlineExceeded: it may have happened.
        """
        return await self._leadership.write(writes)

    # ── state ───────────────────────────────────────────────────────────────────────

    def get_state(self) -> ClusterState:
        """As this node knows it; always answers."""
        return self._mirror.state

    async def propose_change(self, change: Change, *, actor: str = "", proposal: str | None = None) -> int:
        """Have the leader make a change; the revision at which it applied. This node's state
        shows it already, unless it is cut off from the news.

        `proposal` is an id of letters and digits, for who wants to ask again after
        `DeadlineExceeded`: the same id applies once, however often it is proposed.

        Raises:
            NotFound, Conflict, Invalid: it cannot be made.
            Forbidden: only servers may propose it.
            Unavailable: it was not made: no leader, or no quorum. Within two seconds.
            DeadlineExceeded: it may have been made.
        """
        proposed = Proposal(
            id=proposal or "".join(self._random.choices(_ID_ALPHABET, k=_ID_LENGTH)),
            change=change,
            actor=actor,
            at=self._clock.time(),
        )
        asked: NodeId | None = None
        with anyio.move_on_after(PROPOSE_S) as limit:
            while True:
                asked = self.get_leader()
                if asked is not None:
                    revision = await self._ask(asked, proposed, limit.deadline - anyio.current_time())
                    if revision is not None:
                        break
                asked = None
                with anyio.move_on_after(AGAIN_S):
                    await self._leadership.changed()
        if limit.cancelled_caught:
            if asked is not None:
                raise DeadlineExceeded(IN_DOUBT)
            raise Unavailable("the cluster has no leader now; try again in a few seconds")
        assert revision is not None
        with anyio.move_on_after(SEEN_S):
            await self._mirror.reach(revision)
        return revision

    async def _ask(self, leader: NodeId, proposal: Proposal, remaining_s: float) -> int | None:
        """None: it was not made there; somebody else may lead now."""
        if leader == self._node:
            try:
                return await self._applier.apply(proposal)
            except Unavailable:
                if self.is_leader():
                    raise
                return None
        try:
            data = await self._coordination.request(
                proposals_to(leader, self._node if self._role == "node" else None),
                encode(proposal),
                timeout_s=max(remaining_s, 0.0),
            )
        except Unavailable:
            return None  # nobody serves it: that node is gone, or does not serve yet
        answer = result(data)
        return None if isinstance(answer, NotLeader) else answer
