"""Voters 1 → 3 → 5 → 1 and a dead one replaced, under writers: nothing acknowledged is lost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from tests.limits import SOON_S, limit_s
from tests.voters import Voters, again, filled, ready, refused, voters, written
from tests.writers import writing

from ollama_distributed.adapters.coordination.nats.seat import Formation, Place
from ollama_distributed.adapters.coordination.nats.voter import LocalVoter
from ollama_distributed.base.errors import Conflict, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity import nats_jwt
from ollama_distributed.cluster.identity.roster import REVOKED_FOR_S
from ollama_distributed.cluster.ports import Entry, Resync, Write

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

BACK_S = limit_s(9.5)
"""Until writes are acknowledged again, whatever is changed."""


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Voters]:
    async with voters(tmp_path) as made:
        yield made


@pytest.mark.slow
async def test_one_three_five_and_back_under_writers(alone: Voters) -> None:
    async with writing(alone, create=True) as writers:
        keeper = writers.clients["one"]
        held = await written(keeper, "held", b"1")
        await filled(keeper, [Write(f"k.{i}", b"x" * 300) for i in range(400)])

        async def changed() -> None:
            for client in writers.clients.values():
                client.update_servers(alone.urls)
            await writers.more(20)
            assert writers.longest_gap_s < BACK_S
            await ready(*writers.clients.values())
            writers.forget_gap()

        await again(lambda: alone.growth.to_three(alone.hosts("n2", "n3")))
        await changed()
        assert await keeper.get("held") == Entry("held", b"1", held), "revisions stay as they are"
        held = await written(keeper, "held", b"2", revision=held)

        await again(lambda: alone.growth.to_five(alone.hosts("n2", "n3"), alone.hosts("n4", "n5")))
        await changed()
        assert len(await alone.voting()) == 5

        dead = await alone.lose(leader if (leader := await alone.leader()) != "n1" else "n2")
        others = [node for node in alone.formation.nodes if node not in (dead, "n1")]
        await again(lambda: alone.growth.replace(dead, alone["n6"], alone.hosts(*others)))
        await changed()
        assert set(alone.formation.nodes) == {"n1", *others, "n6"}
        assert await alone.voting() == set(alone.formation.nodes)

        await again(lambda: alone.growth.to_one(alone.hosts(*others, "n6")))
        await changed()
        assert await keeper.get("held") == Entry("held", b"2", held)
        assert not any(alone.server(name).running for name in (*others, "n6"))


async def test_every_replica_holds_the_state_after_growth(tmp_path: Path) -> None:
    async with voters(tmp_path) as grown:
        async with grown.client("one", create=True) as one:
            for part in range(5):
                await filled(one, [Write(f"k{part}.{i}", b"x") for i in range(200)])
            await again(lambda: grown.growth.to_three(grown.hosts("n2", "n3")))
            last = await written(one, "after", b"")
        await grown.agree(["n1", "n2", "n3"])
        assert await grown.counts(["n1"]) == [(1001, last)]
        # They come back from their seats alone, all at once.
        for name in ("n2", "n3"):
            await grown[name].stop()
        await grown.restart()
        for name in ("n2", "n3"):
            await grown[name].start()
        await grown.agree(["n1", "n2", "n3"])
        async with grown.client("two") as two:
            async with two.watch() as events:
                with anyio.fail_after(SOON_S):
                    first = await anext(events)
            assert isinstance(first, Resync)
            assert (len(first.entries), first.revision) == (1001, last)


class Broken:
    """A machine that goes away as soon as it is needed."""

    def __init__(self, host: LocalVoter) -> None:
        self._host = host
        self.node = host.node
        self.left = False

    async def prepare(self) -> Place:
        return await self._host.prepare()

    async def take(self, formation: Formation) -> None:
        raise Unavailable("the machine went away")

    async def leave(self) -> None:
        self.left = True


async def test_growth_that_fails_leaves_everything_as_it_was(alone: Voters) -> None:
    async with writing(alone, create=True) as writers:
        broken = Broken(alone["n3"])
        with pytest.raises(Unavailable, match="went away"):
            await alone.growth.to_three([alone["n2"], broken])
        assert alone.growth.formation is None
        assert broken.left
        assert not alone.server("n2").running
        await writers.more(20)
        # And it can be tried again.
        formation = await again(lambda: alone.growth.to_three(alone.hosts("n2", "n3")))
        for client in writers.clients.values():
            client.update_servers(formation.urls)
        await writers.more(20)


async def test_a_change_that_failed_is_asked_for_again(tmp_path: Path) -> None:
    async with voters(tmp_path, size=3) as three:
        old = three.hosts("n2", "n3")
        with pytest.raises(Unavailable, match="went away"):
            await three.growth.to_five(old, [three["n4"], Broken(three["n5"])])
        assert len(three.formation.places) == 3
        # One of the two candidates is in the group already; it dies, and others are chosen.
        with anyio.fail_after(SOON_S):
            while "n4" not in await three.voting():
                await anyio.sleep(0.05)
        await three.lose("n4")
        await again(lambda: three.growth.to_five(old, three.hosts("n6", "n7")))
        assert await three.voting() == {"n1", "n2", "n3", "n6", "n7"}
        await three.agree(three.formation.nodes)


async def test_only_the_dead_are_replaced_and_only_by_a_majority(tmp_path: Path) -> None:
    async with voters(tmp_path, size=3) as three:
        with pytest.raises(Conflict, match="not dead"):
            await three.growth.replace(NodeId("n2"), three["n4"], three.hosts("n3"))
        with pytest.raises(Conflict, match="not one of"):
            await three.growth.replace(NodeId("n9"), three["n4"], three.hosts("n2", "n3"))
        with pytest.raises(Conflict, match="runs alone"):
            await three.growth.to_three(three.hosts("n4", "n5"))
        assert not three.server("n4").running

        kept = three.server("n3").folder
        dead = await three.lose("n3")
        for name in ("n1", "n2"):  # they start again without it: its name is not known any more
            await three[name].stop()
        for name in ("n1", "n2"):
            await three[name].start()
        await three.leader()
        await again(lambda: three.growth.replace(dead, three["n4"], three.hosts("n2")))
        await three.agree(["n1", "n2", "n4"])
        # The dead one's machine comes back: it learns that it has no seat any more.
        back = three["n3"]
        assert back.server.folder == kept
        assert back.seat.formation is not None
        await back.start()
        assert not back.server.running
        assert back.seat.formation is None

        await three.lose("n2")
        await three.lose("n4")
        with pytest.raises(Unavailable):
            await three.growth.replace(NodeId("n2"), three["n5"], [])
        assert not three.server("n5").running


async def test_a_voter_does_not_throw_away_what_it_alone_holds(alone: Voters) -> None:
    async with voters(alone.trust.folder / "other", size=3) as others:
        with pytest.raises(Conflict, match="runs alone"):
            await alone["n1"].take(others.formation)
    assert alone.server("n1").running


async def test_the_revoked_are_refused_by_new_voters_and_by_those_that_were_away(alone: Voters) -> None:
    trust = alone.trust

    async def revoke(*users: str) -> None:
        now = time.time() + len(users)  # a later second than the last account's
        revoked = {trust.files(user).node_keys().nats.public: now + REVOKED_FOR_S for user in users}
        await alone.system.push_account(nats_jwt.account_jwt(trust.keys.nats, now, revoked=revoked))

    async def lets_in(server: str, user: str) -> bool:
        address = trust.address(alone.server(server), node=user, role="node")
        return not await refused(address, user, "uthorization")

    async with alone.client("n1", create=True):
        await revoke("evil")
    await again(lambda: alone.growth.to_three(alone.hosts("n2", "n3")))
    assert [await lets_in(server, "evil") for server in ("n1", "n2", "n3")] == [False, False, False]
    assert await lets_in("n3", "late")

    await alone["n3"].stop()
    await revoke("evil", "late")
    await alone["n3"].start()
    with anyio.fail_after(SOON_S):
        while await lets_in("n3", "late"):
            await anyio.sleep(0.1)
