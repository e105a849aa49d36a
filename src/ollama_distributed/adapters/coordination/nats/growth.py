"""Changes which servers vote: 1 → 3 → 5 as machines join, a dead one replaced, back to 1.

Run by one server machine at a time, the cluster's leader or the one that stays. Two ways:

- *Moving* (1 → 3): freeze the stream, copy it out, begin a new formation with empty stores,
  copy it in, check every replica, thaw. Revisions stay as they are, so that those held by
  others stay valid. Writes are refused meanwhile (`Unavailable`), mirrors answer. A journal
  takes a crash at any step back or on (`journal`). It has to be so: a standalone store that is
  restarted with a `cluster` block loses its streams as orphans after 30 s. The other way round
  (to 1) the store can stay: the stream is frozen and drawn together on the server that stays.
- *In place* (3 → 5, replacing): servers come and go in the Raft group while writes go on. Every
  step may be repeated, so a crash needs no journal: call it again.

Membership never changes by itself: each call is an operator's or the leader's decision, and a
server that still answers is never taken for dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import msgspec
import structlog

from ollama_distributed.adapters.coordination.nats.journal import Journal, Move
from ollama_distributed.adapters.coordination.nats.patience import (
    POLL_S,
    RETRY_S,
    all_of,
    in_time,
    patiently,
    until,
)
from ollama_distributed.adapters.coordination.nats.seat import Formation
from ollama_distributed.adapters.coordination.nats.session import Address, Login
from ollama_distributed.adapters.coordination.nats.streams import Snapshot, Stream
from ollama_distributed.adapters.coordination.nats.system import peer_id
from ollama_distributed.adapters.coordination.nats.voter import LocalVoter, VoterHost
from ollama_distributed.base.errors import Conflict, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId, random_id
from ollama_distributed.cluster.tasks import end

log = structlog.get_logger()

MOVING = "coordination.moving"
MOVED = "coordination.moved"
MOVED_BACK = "coordination.moved_back"
EXPANDED = "coordination.expanded"
REPLACED = "coordination.voter_replaced"
NOT_WHOLE = "coordination.replicas_missing"
HOST_FAILED = "coordination.voter_host_failed"

FORM_S = 30.0
"""For a new formation to have a leader, and then to hold the state: both take 1 s with 4,000
keys; with 20,000 the followers' catching up stalls once, for 5 s (measured)."""
REMOVE_S = 30.0
"""For the group to forget a dead server; refused while it elects, so tried again."""


class Growth:
    """This machine's part in the cluster's voters. Enter it to run its server; leave it to stop.

    Entering first finishes or undoes what a crash interrupted. `login` is the node's own.
    """

    def __init__(self, voter: LocalVoter, *, cluster: str, login: Login, bucket: str = "cfg") -> None:
        self._voter = voter
        self._server = voter.server
        self._cluster = cluster
        self._login = login
        self._bucket = bucket
        self._journal = Journal(voter.server.folder)
        self._busy = asyncio.Lock()
        self._settling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Growth:
        """
        Raises:
            Unavailable: the server does not start.
        """
        await asyncio.to_thread(self._resume)
        await self._voter.start()
        if self._journal.read() is not None:
            self._begin_settling()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._settling is not None:
            await end([self._settling])
        await self._voter.stop()

    @property
    def formation(self) -> Formation | None:
        """The voters, if this machine runs one of several."""
        return self._voter.seat.formation

    @property
    def settled(self) -> bool:
        """False while an interrupted move is being finished."""
        return self._settling is None or self._settling.done()

    # ── moving ──────────────────────────────────────────────────────────────────────

    async def to_three(self, hosts: Sequence[VoterHost]) -> Formation:
        """From this machine's standalone server to three, with those of two `hosts`.

        Raises:
            Conflict: this machine's server is not the only one, or another change is under way.
            Unavailable: it did not work, and everything is as before.
        """
        if len(hosts) != 2 or not self._voter.seat.alone:
            raise Conflict("three voters are made of one that runs alone and two more machines")
        async with self._alone():
            places = [await self._voter.prepare(), *[await host.prepare() for host in hosts]]
            target = Formation(id=random_id(), cluster=self._cluster, places=tuple(places))
            await self._move(target, hosts)
            return target

    async def to_one(self, hosts: Sequence[VoterHost]) -> None:
        """Back to this machine's server alone; those of `hosts`, the other voters, are stopped.

        Keeps the store: copying into a standalone server costs an fsync per key.

        Raises:
            Conflict: this machine runs no voter, or another change is under way.
            Unavailable: it is not done, and writes go on; call it again.
        """
        if self.formation is None:
            raise Conflict("this machine's server is not one of several")
        async with self._alone():
            move = Move(step="copying", source=self._voter.seat, target=None)
            log.info(MOVING, voters=1)
            await self._note(move)
            try:
                async with in_time(FORM_S):
                    await self._gather_here()
                await self._note(msgspec.structs.replace(move, step="settled"))
                await self._server.stop()
                await asyncio.to_thread(self._voter.sit, alone=True)
            finally:
                with anyio.CancelScope(shield=True):
                    if not self._server.running:
                        await self._server.start()
                    self._begin_settling()
            await self._dismiss(hosts)
            async with in_time(FORM_S):
                await asyncio.wait([self._begin_settling()])
            log.info(MOVED, voters=1)

    async def _gather_here(self) -> None:
        """Freeze the stream and let this machine's server be the only one that holds it."""
        stream, here = self._stream(), self._voter.node
        frozen = await patiently(stream.freeze)
        while frozen.leader != here:
            await patiently(lambda: stream.lead(here))
            await anyio.sleep(RETRY_S)
            frozen = await patiently(stream.freeze)
        await patiently(lambda: stream.update(num_replicas=1))
        wanted = (frozen.state.messages, frozen.state.last_seq)

        async def drawn_together() -> bool:
            found = await stream.info()
            return found is not None and found.only(here)

        await until(drawn_together)
        if await self._count(here) != wanted:
            raise Unavailable(f"the server of node {here} does not hold the whole state")

    async def _move(self, target: Formation, hosts: Sequence[VoterHost]) -> None:
        move = Move(step="copying", source=self._voter.seat, target=target)
        log.info(MOVING, voters=len(target.places))
        await self._note(move)
        try:
            snapshot = await self._copy()
            await self._note(msgspec.structs.replace(move, step="forming"))
            await self._server.stop()
            await asyncio.to_thread(self._journal.set_aside)
            await self._form(target, hosts)
            with anyio.fail_after(FORM_S):
                await self._fill(snapshot, target)
            await self._note(msgspec.structs.replace(move, step="settled"))
        except (OllamaDistributedError, OSError, TimeoutError) as exc:
            with anyio.CancelScope(shield=True):
                await self._undo(hosts)
            if isinstance(exc, Unavailable):
                raise
            raise Unavailable(f"the voters stay as they were: {exc or 'out of time'}") from exc
        await self._settle()
        log.info(MOVED, voters=len(target.places), last=snapshot.last_seq)

    async def _copy(self) -> Snapshot:
        stream = self._stream()
        frozen = await stream.freeze()
        snapshot = await stream.copy_out(self._journal.copy)
        if snapshot.last_seq != frozen.state.last_seq:
            raise Unavailable("the state went on while it was copied")
        return snapshot

    async def _form(self, target: Formation, hosts: Sequence[VoterHost]) -> None:
        await asyncio.to_thread(self._voter.sit, formation=target)
        await all_of(self._server.start(), *(host.take(target) for host in hosts))
        with anyio.fail_after(FORM_S):
            await self._gathered(target)
            await patiently(self._server.share_accounts)

    async def _fill(self, snapshot: Snapshot, target: Formation) -> None:
        stream = self._stream()
        while True:
            try:
                await stream.copy_in(self._journal.copy, snapshot, replicas=len(target.places))
                break
            except Unavailable:  # the group still elects, or it was half done
                await anyio.sleep(RETRY_S)
                await patiently(stream.delete)

        async def same_everywhere() -> bool:
            counts = {await self._count(node) for node in target.nodes}
            return counts == {(snapshot.messages, snapshot.last_seq)}

        await until(same_everywhere)

    async def _count(self, server: str) -> tuple[int, int] | None:
        replica = (await self._server.system.jetstream(server)).replica(self._stream().name)
        return None if replica is None else (replica.messages, replica.last_seq)

    async def _undo(self, hosts: Sequence[VoterHost]) -> None:
        await self._server.stop()
        await asyncio.to_thread(self._resume)
        await self._voter.start()
        settling = self._begin_settling()
        await self._dismiss(hosts)
        await asyncio.wait([settling], timeout=FORM_S)
        log.warning(MOVED_BACK)

    def _resume(self) -> None:
        """Make seat and store agree with the journal; on disk, while the server is stopped."""
        move = self._journal.read()
        if move is None:
            return
        if move.step == "settled":
            self._voter.sit(alone=move.target is None, formation=move.target)
        else:
            self._journal.put_back()
            self._voter.sit(alone=move.source.alone, formation=move.source.formation)

    def _begin_settling(self) -> asyncio.Task[None]:
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle(), name="settle the voters")
        return self._settling

    async def _settle(self) -> None:
        """Thaw the stream, however long that takes; then the move is over. Every voter holds
        the state again, also after a way to one server that was broken off."""
        stream = self._stream()
        await patiently(stream.thaw)
        await asyncio.to_thread(self._journal.close)
        formation = self.formation
        replicas = len(formation.places) if formation is not None else 1
        try:
            async with in_time(FORM_S):
                await patiently(lambda: stream.update(num_replicas=replicas))
        except Unavailable as exc:
            log.warning(NOT_WHOLE, replicas=replicas, reason=exc.message)

    async def _note(self, move: Move) -> None:
        await asyncio.to_thread(self._journal.write, move)

    # ── in place ────────────────────────────────────────────────────────────────────

    async def to_five(self, old: Sequence[VoterHost], new: Sequence[VoterHost]) -> Formation:
        """From three voters to five: `old` are the other two voters, `new` the two to come.

        Raises:
            Conflict: there are not three voters, or another change is under way.
            Unavailable: it is not complete; call it again.
        """
        formation = self.formation
        if formation is None or len(formation.places) + len(new) != 5:
            raise Conflict("five voters are made of three and two more machines")
        async with self._alone(), in_time(FORM_S * 2):
            places = (*formation.places, *[await host.prepare() for host in new])
            target = msgspec.structs.replace(formation, places=places)
            await self._clear(target)
            await self._admit(target, new)
            await self._tell(target, old)
            log.info(EXPANDED, voters=len(places))
            return target

    async def replace(self, dead: NodeId, new: VoterHost, others: Sequence[VoterHost]) -> Formation:
        """Let `new` vote in place of `dead`, whose server is gone for good. `others` are the
        voters that live, beside this machine.

        Raises:
            Conflict: `dead` is no voter, or its server answers.
            Unavailable: the others have no majority; or it is not complete: call it again.
        """
        formation = self.formation
        if formation is None or dead not in formation.nodes or dead == self._voter.node:
            raise Conflict(f"node {dead} is not one of the other voters")
        async with self._alone(), in_time(FORM_S * 2 + REMOVE_S):
            await self._check_dead(formation, dead)
            places = [place for place in formation.places if place.node not in (dead, new.node)]
            places.append(await new.prepare())
            target = msgspec.structs.replace(formation, places=tuple(places))
            await self._clear(target)
            await self._admit(target, [new])
            await self._tell(target, others)
            log.info(REPLACED, dead=dead, new=new.node)
            return target

    async def _check_dead(self, formation: Formation, dead: NodeId) -> None:
        system = self._server.system
        if await system.answers(dead):
            raise Conflict(f"the server of node {dead} answers: it is not dead")
        alive = [node for node in formation.nodes if node != dead and await system.answers(node)]
        if len(alive) < formation.majority:
            raise Unavailable(
                f"only {len(alive)} of {len(formation.nodes)} voters answer: no majority, no change"
            )

    async def _clear(self, target: Formation) -> None:
        """Take dead servers that are no part of `target` out of the group, before one comes in:
        the other order lost the quorum at the next death."""
        system = self._server.system
        kept = set(map(peer_id, target.nodes))
        for known in (await patiently(system.meta)).replicas:
            if known.peer not in kept and not await system.answers(known.name):
                while known.peer in {one.peer for one in (await patiently(system.meta)).replicas}:
                    # Refused while they elect: the dead one may have led.
                    await patiently(partial(system.remove, known.peer))
                    await anyio.sleep(POLL_S)

    async def _admit(self, target: Formation, new: Sequence[VoterHost]) -> None:
        for host in new:
            await host.take(target)
        await self._gathered(target)
        await patiently(self._server.share_accounts)
        stream = self._stream()
        # Refused while the newcomers' stores are not known yet.
        await patiently(lambda: stream.update(num_replicas=len(target.places)))
        await self._complete()

    async def _tell(self, target: Formation, others: Sequence[VoterHost]) -> None:
        """Let the voters that stay know all places for their next starts. It comes last: until
        then the formation is the old one, and the change can be asked for again."""
        await self._voter.take(target)
        for host in others:
            await self._try(host.take(target), host)

    # ── both ────────────────────────────────────────────────────────────────────────

    async def _gathered(self, formation: Formation) -> None:
        """Until all servers of the formation vote, and no others."""

        async def gathered() -> bool:
            meta = await self._server.system.meta()
            present = {meta.leader, *(peer.name for peer in meta.replicas if not peer.offline)}
            return present == set(formation.nodes) and meta.cluster_size == len(present)

        await until(gathered)

    async def _complete(self) -> None:
        """Until all replicas hold the whole state."""

        async def complete() -> bool:
            found = await self._stream().info()
            return found is not None and found.complete

        await until(complete)

    async def _dismiss(self, hosts: Sequence[VoterHost]) -> None:
        for host in hosts:
            await self._try(host.leave(), host)

    async def _try(self, call: Awaitable[None], host: VoterHost) -> None:
        """What the machine can also learn later: it holds nothing up."""
        try:
            await call
        except (OllamaDistributedError, OSError) as exc:
            log.warning(HOST_FAILED, node=host.node, reason=str(exc))

    def _stream(self) -> Stream:
        address = Address(urls=(self._server.url,), login=self._login)
        return Stream(address, name=self._voter.node, bucket=self._bucket)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._busy.locked() or not self.settled:
            raise Conflict("the voters are being changed already")
        async with self._busy:
            yield
