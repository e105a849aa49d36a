"""What a node does for its cluster while it is linked. Each duty is a step that is repeated:
it waits for its next occasion, and whatever it raises is logged and tried again.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog

from ollama_distributed.base.errors import Conflict
from ollama_distributed.cluster.identity import nats_jwt
from ollama_distributed.cluster.identity.roster import TOKENS
from ollama_distributed.cluster.identity.tokens import TokenRecord
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.node.cluster.replicas import Comparison
from ollama_distributed.node.cluster.voters import grow_step
from ollama_distributed.state.changes import RemoveNode, SetVoters
from ollama_distributed.state.cluster import ClusterState

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.keeper import Keeper
    from ollama_distributed.node.cluster.life import Duty, Life
    from ollama_distributed.node.cluster.link import Link

log = structlog.get_logger("cluster.duties")

REVOKED = "cluster.revocations_pushed"
LOOK_S = 30.0
TIDY_S = 2.0
FORGET_S = 600.0
TOKENS_KEPT_S = 7 * 86_400.0
"""An expired token is listed for a week: who used it, and when."""
PAUSE_PER_NODE_S = 0.005
"""A state of 10,000 nodes, some 30 MB, is written once a minute at most."""
SETTLE_S = 0.5
SECOND_S = 1.0
"""JWTs are ordered by whole seconds."""


def duties_of(keeper: Keeper, life: Life, link: Link) -> list[tuple[str, Duty]]:
    duties: list[tuple[str, Duty]] = [
        ("remember", partial(_remember, life, link)),
        ("config", partial(_configure, life, link)),
        ("clean", partial(_clean, life, link)),
    ]
    if life.is_server:
        duties += [
            ("found", partial(_found, life, link)),
            ("revoke", _Revocations(life, link).step),
            ("tidy", partial(_tidy, life, link)),
            ("tokens", partial(_forget_tokens, life, link)),
            ("grow", partial(grow_step, keeper, life, link)),
            ("compare", Comparison(life).step),
        ]
    return duties


async def _configure(life: Life, link: Link) -> None:
    """Apply the config that holds, once it is known: no version yet is an answer too."""
    await link.mirror.wait_ready()
    life.parts.apply_config(link.config.current)
    await anyio.sleep_forever()


async def _remember(life: Life, link: Link) -> None:
    """Keep where the cluster is found and what is known of it, for the next start."""
    state = link.mirror.state
    if link.mirror.ready and state.nodes:
        facts, bus = life.facts(), life.bus_addresses()
        await life.seats.change(
            servers=tuple(map(str, facts.servers)),
            nats=bus,
            members=max(len(state.nodes), len(life.roster), 1),
        )
        link.coordination.update_servers(life.bus_urls())
        await life.remember()
    with anyio.move_on_after(LOOK_S):
        await link.mirror.wait_for(lambda now: _differ(now, state))
    await anyio.sleep(SETTLE_S + len(state.nodes) * PAUSE_PER_NODE_S)


def _differ(now: ClusterState, before: ClusterState) -> bool:
    return now.nodes is not before.nodes or now.voters is not before.voters or now.config is not before.config


async def _clean(life: Life, link: Link) -> None:
    """What was deleted in the whole cluster goes from this node too, also if it was away then."""
    state = await link.mirror.wait_ready()
    record = life.roster.record(life.parts.node)
    if (
        record is None or not life.roster.current
    ):  # it comes with the other news: before it nobody knows what was brought along
        await anyio.sleep(SETTLE_S)
        return
    await life.parts.clean(state.deleted, record.admitted_at)
    with anyio.move_on_after(LOOK_S):
        await link.mirror.wait_for(
            lambda now: now.deleted is not state.deleted or now.leftovers is not state.leftovers
        )


async def _found(life: Life, link: Link) -> None:
    """The first node enters itself into the roster and as the first voter."""
    if life.bus is None or not life.bus.alone:
        await anyio.sleep_forever()
    state = await link.mirror.wait_ready()
    me = life.parts.node
    if state.voters is not None:
        await anyio.sleep_forever()
    await life.admission.register(life.identity.record(life.parts.clock.time(), life.front.hosts()))
    await link.mirror.wait_for(lambda now: me in now.nodes and now.nodes[me].advert is not None)
    await link.consensus.propose_change(SetVoters(nodes=(me,), before=()), actor=me)


async def _tidy(life: Life, link: Link) -> None:
    """The leader takes the records of removed nodes out of the state, where whoever removed them
    did not get so far."""
    await anyio.sleep(TIDY_S)
    if not link.consensus.is_leader():
        return
    for node in [node for node in link.mirror.state.nodes if life.roster.removed(node)]:
        await link.consensus.propose_change(RemoveNode(node=node, force=True), actor=life.parts.node)


async def _forget_tokens(life: Life, link: Link) -> None:
    await anyio.sleep(FORGET_S)
    if link.consensus.is_leader():
        await forget_tokens(link.coordination, life.parts.clock.time())


async def forget_tokens(coordination: Coordination, now: float) -> None:
    """Delete the records of tokens that expired long ago: every join makes one, and every node
    keeps all of the state in memory."""
    for entry in (await coordination.scan(TOKENS)).entries:
        record = msgspec.json.decode(entry.value, type=TokenRecord)
        if record.expires_at + TOKENS_KEPT_S < now:
            with contextlib.suppress(Conflict):  # it was revoked in this moment, or is gone
                await coordination.delete(entry.key, revision=entry.revision)


class _Revocations:
    """Removed nodes lose the bus: a server tells the coordination servers whose users are void."""

    def __init__(self, life: Life, link: Link) -> None:
        self._life = life
        self._link = link
        self._pushed: dict[str, float] = {}

    async def step(self) -> None:
        life, link = self._life, self._link
        changed = life.roster_changed
        revoked = life.roster.revoked_users()
        if revoked != self._pushed and link.coordination.connected:
            keys = life.keys().nats
            account = nats_jwt.account_jwt(keys, life.parts.clock.time(), revoked=revoked)
            assert life.bus is not None, "a server's duty"
            servers = await life.bus.system(life.bus_urls()).push_account(account)
            self._pushed = revoked
            log.info(REVOKED, users=len(revoked), servers=servers)
            await anyio.sleep(SECOND_S)
        with anyio.move_on_after(LOOK_S):
            await changed.wait()
