"""Which servers vote: 1 → 3 → 5 as servers join, a dead one replaced when an operator says so, one
that leaves by whoever can take its place.

Each change is run by one voter, with the machines that it concerns asked over the hop
(`VoterHost`). The servers' own formation is the truth; `cluster.voters` in the state follows
it, so a crash in between is made good by whoever runs the duty next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog

from ollama_distributed.adapters.coordination.nats.seat import Formation, Place
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.base.errors import Conflict, Forbidden, NotFound, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.state.changes import SetDrain, SetVoters
from ollama_distributed.state.cluster import ClusterState

if TYPE_CHECKING:
    from ollama_distributed.adapters.coordination.nats.voter import VoterHost
    from ollama_distributed.node.cluster.bus import Bus
    from ollama_distributed.node.cluster.keeper import Keeper
    from ollama_distributed.node.cluster.life import Life
    from ollama_distributed.node.cluster.link import Link

log = structlog.get_logger("cluster.voters")

PREPARE, TAKE, STAND_DOWN, REPLACE = "voters/prepare", "voters/take", "voters/leave", "voters/replace"
HAND_OVER = "voters/hand-over"
PREPARE_S, TAKE_S, REPLACE_S = 5.0, 30.0, 120.0
"""A server starts in a tenth of a second with an empty store, in some seconds with a large one."""
SETTLED_S = 5.0
"""Servers are online for so long before they are made voters: who comes and goes stays out."""
LOOK_S = 2.0
SEEN_S = 2.0
"""For this node to see what another one did."""
HANDED_S = 10.0
"""Its own coordination server is gone then: it connects to another one first."""
AGAIN_S = 30.0
"""After a growth that did not work; everything is as before then."""


class Nothing(msgspec.Struct, frozen=True):
    """An empty question, or "done"."""


class ReplaceAsk(msgspec.Struct, frozen=True, kw_only=True):
    dead: NodeId
    new: NodeId


class RemoteVoter:
    """Another server machine, over the hop; a `VoterHost`."""

    def __init__(self, keeper: Keeper, node: NodeId) -> None:
        self._pool = keeper.parts.pool
        self._node = node

    @property
    def node(self) -> NodeId:
        return self._node

    async def prepare(self) -> Place:
        return await self._pool.ask(self._node, PREPARE, Nothing(), Place, deadline_s=PREPARE_S)

    async def take(self, formation: Formation) -> None:
        await self._pool.ask(self._node, TAKE, formation, Nothing, deadline_s=TAKE_S)

    async def leave(self) -> None:
        await self._pool.ask(self._node, STAND_DOWN, Nothing(), Nothing, deadline_s=TAKE_S)


class VoterRoutes:
    """What other servers may ask of this one while voters change."""

    def __init__(self, keeper: Keeper, door: PeerDoor) -> None:
        self._keeper = keeper
        door.add(PREPARE, self._prepare, Nothing)
        door.add(TAKE, self._take, Formation)
        door.add(STAND_DOWN, self._leave, Nothing)
        door.add(REPLACE, self._replace, ReplaceAsk)
        door.add(HAND_OVER, self._hand_over, Nothing)

    async def _prepare(self, _peer: Peer, _ask: Nothing) -> Place:
        return await self._bus().voter.prepare()

    async def _take(self, peer: Peer, formation: Formation) -> Nothing:
        log.info("voters.asked_to_vote", by=peer.node, voters=len(formation.places))
        await self._bus().voter.take(formation)
        self._told()
        return Nothing()

    async def _leave(self, peer: Peer, _ask: Nothing) -> Nothing:
        log.info("voters.asked_to_stand_down", by=peer.node)
        await self._bus().voter.leave()
        self._told()
        return Nothing()

    async def _replace(self, _peer: Peer, ask: ReplaceAsk) -> Nothing:
        await replace(self._keeper, ask.dead, ask.new, actor=_peer.node)
        return Nothing()

    async def _hand_over(self, peer: Peer, _ask: Nothing) -> Nothing:
        await hand_over(self._keeper, peer.node)
        return Nothing()

    def _told(self) -> None:
        life = self._keeper.need_life()
        if life.link is not None:
            life.link.coordination.update_servers(life.bus_urls())
        life.changed()

    def _bus(self) -> Bus:
        bus = self._keeper.need_life().bus
        if bus is None:
            raise Unavailable("this node's coordination side is not up")
        return bus


# ── growing ─────────────────────────────────────────────────────────────────────────


async def grow_step(keeper: Keeper, life: Life, link: Link) -> None:
    """Make the voters 3 or 5 where there are servers enough; to be repeated. Runs on every
    server, acts on one: the only voter, or the leader, or the first voter that lives."""
    bus = life.bus
    assert bus is not None, "a server's duty"
    await anyio.sleep(LOOK_S)
    if not link.mirror.synced or not bus.voters or not _acts(link, bus, keeper.parts.node):
        return
    await record_voters(link, bus, actor=keeper.parts.node)
    now, is_server = keeper.parts.clock.time(), life.roster.is_server
    chosen = next_voters(link.mirror.state, bus.voters, now=now, is_server=is_server)
    if not chosen or not bus.growth.settled:
        return
    hosts = [RemoteVoter(keeper, node) for node in chosen]
    try:
        if bus.alone:
            await bus.growth.to_three(hosts)
        else:
            old = [RemoteVoter(keeper, node) for node in bus.voters if node != keeper.parts.node]
            await bus.growth.to_five(old, hosts)
    except OllamaDistributedError as failure:
        log.warning("voters.growth_failed", reason=failure.message, again_in_s=AGAIN_S)
        await anyio.sleep(AGAIN_S)
        return
    life.changed()


def next_voters(
    state: ClusterState, voters: Sequence[NodeId], *, now: float, is_server: Callable[[NodeId], bool]
) -> tuple[NodeId, ...]:
    """The servers that are to vote beside `voters`: two more where that makes 3 or 5, else none.

    The ones that have been online longest; all present voters must be online too, because a
    group that changes while one of it is away cannot bear another loss. `is_server`: who was
    admitted as one; what a node says of itself makes it none.
    """
    if len(voters) not in (1, 3):
        return ()

    def steady(node: NodeId) -> bool:
        known = state.nodes.get(node)
        return known is not None and known.status == "online" and now - known.since >= SETTLED_S

    others = [n for n in state.servers if n not in voters and is_server(n) and steady(n)]
    if len(others) < 2 or not all(steady(node) for node in voters):
        return ()
    first, second, *_ = sorted(others, key=lambda node: (state.nodes[node].since, node))
    return first, second


def _acts(link: Link, bus: Bus, me: NodeId) -> bool:
    if bus.alone:
        return True
    leader = link.consensus.get_leader()
    if leader in bus.voters:
        return leader == me
    state = link.mirror.state
    living = [node for node in sorted(bus.voters) if node in state.nodes and state.nodes[node].alive]
    return bool(living) and living[0] == me


async def record_voters(link: Link, bus: Bus, *, actor: str) -> None:
    """Let the state say what the formation is."""
    wanted = tuple(sorted(bus.voters))

    def told(state: ClusterState) -> bool:
        return state.voters is not None and tuple(sorted(state.voters.nodes)) == wanted

    state = link.mirror.state
    if told(state):
        return
    before = state.voters.nodes if state.voters is not None else ()
    try:
        await link.consensus.propose_change(SetVoters(nodes=wanted, before=before), actor=actor)
    except Conflict:
        # Another was faster, who says the same: the duty and who changed the voters both do this.
        with anyio.move_on_after(SEEN_S) as seen:
            await link.mirror.wait_for(told)
        if seen.cancelled_caught:
            raise


# ── replacing ───────────────────────────────────────────────────────────────────────


async def replace_voter(keeper: Keeper, dead: str, new: str | None, *, actor: str) -> None:
    """Give the vote of a dead server to a living one, here or at a voter that lives.

    Raises:
        Conflict: `dead` lives or does not vote, `new` cannot vote, or there is none.
        Unavailable: the other voters have no majority, or none can be asked.
    """
    life = keeper.need_life()
    state, me = life.state, keeper.parts.node
    gone = state.resolve(dead)
    voters = state.voters.nodes if state.voters else ()
    if gone not in voters:
        raise Conflict(f"node {dead} does not vote")
    if state.nodes[gone].alive:
        raise Conflict(
            f"node {dead} is {state.nodes[gone].status}: only a dead voter is replaced; "
            "one that comes back takes its place again by itself. To take a living one out: "
            "ollama-distributed cluster leave, on that machine"
        )
    chosen = _successor(state, voters, new, life.roster.is_server)
    if me in voters:
        await replace(keeper, gone, chosen, actor=actor)
    else:
        await _ask_a_voter(keeper, life, ReplaceAsk(dead=gone, new=chosen))
    if life.link is not None:
        with anyio.move_on_after(SEEN_S):
            await life.link.mirror.wait_for(lambda now: now.voters is None or gone not in now.voters.nodes)


async def _ask_a_voter(keeper: Keeper, life: Life, ask: ReplaceAsk) -> None:
    state = life.state
    failure: OllamaDistributedError = Unavailable("no voter can be asked")
    for voter in state.voters.nodes if state.voters else ():
        if voter != ask.dead and state.nodes[voter].alive:
            try:
                await keeper.parts.pool.ask(voter, REPLACE, ask, Nothing, deadline_s=REPLACE_S)
                return
            except (Unavailable, Forbidden) as refused:
                failure = refused
    raise failure


async def replace(keeper: Keeper, dead: NodeId, new: NodeId, *, actor: str) -> None:
    """On a voter that lives."""
    life = keeper.need_life()
    link, bus = life.need_link(), life.bus
    if bus is None or keeper.parts.node not in bus.voters:
        raise Conflict("this node does not vote")
    others = [RemoteVoter(keeper, node) for node in bus.voters if node not in (dead, new, keeper.parts.node)]
    log.warning("voters.replacing", dead=dead, new=new, actor=actor)
    host: VoterHost = bus.voter if new == keeper.parts.node else RemoteVoter(keeper, new)
    await bus.growth.replace(dead, host, others)
    await record_voters(link, bus, actor=actor)
    life.changed()


# ── leaving ─────────────────────────────────────────────────────────────────────────


async def give_up_vote(keeper: Keeper, *, actor: str) -> None:
    """Before this node, a voter, leaves: another voter has a server take its place, or goes on
    alone where there is none. Safe to repeat.

    Raises:
        Conflict: this node is the only voter, or another one is away.
        Unavailable: it is not complete; ask again.
    """
    life, link = await keeper.linked()
    state, me = life.state, keeper.parts.node
    voters = state.voters.nodes if state.voters else ()
    if me not in voters:
        return
    if len(voters) == 1:
        raise Conflict(
            "this node runs the cluster's only coordination server; there must be three servers before it "
            "can leave: make a token with --role server and join more machines"
        )
    away = [node for node in voters if node not in state.nodes or not state.nodes[node].alive]
    if away:
        raise Conflict(
            f"{', '.join(state.nodes[node].name if node in state.nodes else node for node in away)} is "
            "offline and votes: with this node gone too there may be no majority; start it again, or first: "
            "ollama-distributed cluster voter replace"
        )
    leader = link.consensus.get_leader()
    # A node that is drained is not made a voter again while it goes.
    await link.consensus.propose_change(SetDrain(node=me, drain=True), actor=actor)
    asked = heir(voters, me, leader, life.damaged)
    await keeper.parts.pool.ask(asked, HAND_OVER, Nothing(), Nothing, deadline_s=REPLACE_S)
    with anyio.move_on_after(HANDED_S) as seen:
        await link.mirror.wait_for(lambda now: now.voters is not None and me not in now.voters.nodes)
    if seen.cancelled_caught:
        raise Unavailable("the vote was given up, but that is not to be seen here yet; ask again")


def heir(voters: Sequence[NodeId], me: NodeId, leader: NodeId | None, damaged: Sequence[NodeId]) -> NodeId:
    """The voter that sees to it that `me` votes no more. Where no other server takes the place it goes
    on alone, with what its own server holds: so none of those that lost records, if there is another."""
    others = [node for node in voters if node != me]
    return min(others, key=lambda node: (node in damaged, node != leader, node))


async def hand_over(keeper: Keeper, leaver: NodeId) -> None:
    """On another voter."""
    life = keeper.need_life()
    link, bus, me = life.need_link(), life.bus, keeper.parts.node
    if bus is None or me not in bus.voters:
        raise Conflict("this node does not vote")
    if leaver in bus.voters:
        spare = _able(link.mirror.state, bus.voters, life.roster.is_server)
        log.warning("voters.handing_over", leaver=leaver, new=spare)
        if spare is not None:
            # Its server ends first: from then on it is as one that died, and stays so if the rest
            # fails. To let it vote again with an empty store could lose what it had acknowledged.
            await RemoteVoter(keeper, leaver).leave()
            await replace(keeper, leaver, spare, actor=leaver)
        else:
            await bus.growth.to_one([RemoteVoter(keeper, node) for node in bus.voters if node != me])
            link.coordination.update_servers(life.bus_urls())
            life.changed()
    await record_voters(link, bus, actor=leaver)


# ── who can vote ────────────────────────────────────────────────────────────────────


def _able(
    state: ClusterState, voters: Sequence[NodeId], is_server: Callable[[NodeId], bool]
) -> NodeId | None:
    """The server that has been online longest, of those that do not vote."""
    able = [
        node
        for node in state.servers
        if node not in voters and is_server(node) and state.nodes[node].status == "online"
    ]
    return min(able, key=lambda node: (state.nodes[node].since, node), default=None)


def _successor(
    state: ClusterState, voters: Sequence[NodeId], new: str | None, is_server: Callable[[NodeId], bool]
) -> NodeId:
    if new is None:
        able = _able(state, voters, is_server)
        if able is None:
            raise Conflict(
                "there is no other server that lives; make a token with --role server and join a machine"
            )
        return able
    try:
        chosen = state.resolve(new)
    except NotFound as unknown:
        raise Conflict(unknown.message) from unknown
    if chosen in voters:
        raise Conflict(f"node {new} votes already")
    if chosen not in state.servers or not is_server(chosen):
        raise Conflict(f"node {new} is no server; only servers vote")
    if not state.nodes[chosen].alive:
        raise Conflict(f"node {new} is offline")
    return chosen
