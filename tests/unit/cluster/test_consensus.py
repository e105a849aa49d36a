"""Leader, fence and proposals on a cluster in memory, in virtual time."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from tests.consensus_nodes import Cluster, Node, cluster, late_news, until

from ollama_distributed.base.errors import (
    Conflict,
    DeadlineExceeded,
    Forbidden,
    Invalid,
    NotFound,
    OllamaDistributedError,
    QueueFull,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.leadership.plan import LEASE_S, RENEW_S, SPREAD_S, TAKEOVER_S
from ollama_distributed.cluster.ports import ABSENT, Message, Write
from ollama_distributed.cluster.proposals import MAX_PROPOSAL_BYTES, MAX_WAITING, NotLeader, result
from ollama_distributed.state import keys
from ollama_distributed.state.changes import (
    Change,
    Proposal,
    RemoveNode,
    SetConfig,
    SetDrain,
    SetLabels,
    SetVoters,
)
from ollama_distributed.state.codec import encode
from ollama_distributed.testing.virtual_time import VirtualLoop

TAKEN_WITHIN_S = TAKEOVER_S + SPREAD_S + 0.1
REFUSED_WITHIN_S = 2.0


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


def drain(node: str, on: bool = True) -> SetDrain:
    return SetDrain(node=NodeId(node), drain=on)


async def refusal(node: Node, change: Change, *, proposal: str | None = None) -> OllamaDistributedError:
    """Of a proposal, which must come in time."""
    begun = anyio.current_time()
    with pytest.raises(OllamaDistributedError) as caught:
        await node.consensus.propose_change(change, proposal=proposal)
    assert anyio.current_time() - begun <= REFUSED_WITHIN_S
    return caught.value


async def one_leader_at_a_time(cluster: Cluster, for_s: float) -> list[NodeId]:
    """Who led, in turn."""
    led: list[NodeId] = []
    end = anyio.current_time() + for_s
    while anyio.current_time() < end:
        now = cluster.leaders()
        assert len(now) <= 1, now
        if now and led[-1:] != now:
            led += now
        await anyio.sleep(0.02)
    return led


# ── who leads ───────────────────────────────────────────────────────────────────────


async def test_a_first_node_leads_at_once_and_keeps_leading() -> None:
    async with cluster("a") as only:
        node = only.nodes["a"]
        assert await until(node.consensus.is_leader, 1.0) < 0.5
        assert await one_leader_at_a_time(only, 60.0) == ["a"]
        assert node.mirror.state.lease is not None
        assert node.mirror.state.lease.epoch == 1
        assert node.mirror.state.lease.renewals >= 55
        assert node.mirror.synced


@pytest.mark.parametrize("seed", range(20))
async def test_candidates_race_and_one_wins(seed: int) -> None:
    async with cluster(*"abcde", seed=seed) as five:
        leader = await five.leader(1.0)
        state = leader.consensus.get_state()
        assert state.term is not None
        assert state.lease is not None
        assert (state.term.epoch, state.term.node) == (1, leader.id)
        await one_leader_at_a_time(five, 10.0)
        assert leader.consensus.is_leader(), "a leader that does nothing wrong stays"


async def test_a_mere_node_never_leads_and_knows_who_does() -> None:
    async with cluster() as cut:
        mere = await cut.add("m", "node")
        await anyio.sleep(10)
        assert mere.consensus.get_leader() is None
        server = await cut.add("s")
        assert await cut.leader(1.0) is server
        assert mere.consensus.get_leader() == "s"
        await cut.kill(server)
        await anyio.sleep(10)
        assert not mere.consensus.is_leader()
        assert mere.consensus.get_leader() is None


@pytest.mark.parametrize("seed", range(10))
async def test_a_leader_that_dies_is_replaced_in_three_seconds(seed: int) -> None:
    async with cluster(*"abc", seed=seed) as three:
        leader = await three.leader()
        await anyio.sleep(5 + seed / 10)
        killed_at = anyio.current_time()
        await three.kill(leader)
        new = await three.leader()
        assert anyio.current_time() - killed_at < TAKEN_WITHIN_S
        assert new.consensus.get_state().lease is not None
        assert new.consensus.get_state().lease.epoch == 2  # type: ignore[union-attr]


async def test_a_leader_that_stops_hands_over_at_once() -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        del three.nodes[leader.id]
        await leader.stop()
        assert await until(lambda: len(three.leaders()) == 1, 2.0) < SPREAD_S + 0.1
        assert not leader.consensus.is_leader()
        await leader.consensus.stop()


async def test_a_leader_that_comes_back_takes_its_own_lease_at_once() -> None:
    async with cluster("a") as one:
        leader = await one.leader()
        await one.kill(leader)
        one.wires.heal()
        assert keys.LEASE in one.engine.entries
        again = await one.add("a")
        assert await until(again.consensus.is_leader, 2.0) < 0.5
        assert again.mirror.state.term is not None
        assert again.mirror.state.term.epoch == 2


@pytest.mark.parametrize(("sends", "hears"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("seed", range(5))
async def test_a_leader_that_is_cut_off_stops_before_the_next_begins(
    sends: bool, hears: bool, seed: int
) -> None:
    async with cluster(*"abc", seed=seed) as three:
        leader = await three.leader()
        told: list[bool] = []
        leader.consensus.on_leadership(told.append)
        await anyio.sleep(seed / 5)
        three.wires.cut(leader.id, sends=sends, hears=hears)
        begun = anyio.current_time()
        led = await one_leader_at_a_time(three, 4.0)
        if sends:
            assert len(led) == 2
            assert led[0] == leader.id
            assert leader.consensus.get_leader() in (None, led[1])
            assert told == [True, False]
        three.wires.heal()
        new = await three.leader()
        assert anyio.current_time() - begun < 4.0 + 6.0, "healed within the idle check of the link"
        await one_leader_at_a_time(three, 5.0)
        assert three.leaders() == [new.id]
        if sends:
            assert new is not leader


async def test_a_renewal_counts_from_when_it_was_sent_not_from_when_its_answer_came() -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        three.wires.slow["engine", leader.id] = 0.6
        await anyio.sleep(5)
        lease = three.engine.entries[keys.LEASE]
        await until(lambda: three.engine.entries[keys.LEASE] != lease)
        applied_at = anyio.current_time()
        await anyio.sleep(0.65)
        three.wires.cut(leader.id)
        await until(lambda: not leader.consensus.is_leader())
        assert anyio.current_time() - applied_at <= LEASE_S + 0.05


@pytest.mark.parametrize(("sends", "hears"), [(True, False), (False, True)])
async def test_a_renewal_or_its_answer_that_is_lost_costs_no_leader(sends: bool, hears: bool) -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        node = leader.mirror
        told: list[bool] = []
        leader.consensus.on_leadership(told.append)
        assert node.state.lease is not None
        renewals = node.state.lease.renewals
        await node.wait_for(lambda state: state.lease is not None and state.lease.renewals > renewals)
        await anyio.sleep(0.9)
        three.wires.cut(leader.id, sends=sends, hears=hears)
        await anyio.sleep(0.5)
        three.wires.heal()
        assert await one_leader_at_a_time(three, 10.0) == [leader.id]
        assert told == [True]
        assert node.state.lease.epoch == 1


async def test_a_leader_that_sees_its_successor_stops_at_once() -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        told: list[bool] = []
        leader.consensus.on_leadership(told.append)
        leader.clock.stop()
        three.wires.cut(leader.id, hears=False)  # it cannot speak, and hears all
        await until(lambda: any(node.consensus.is_leader() for node in three.others(leader)), 5.0)
        await until(lambda: not leader.consensus.is_leader(), 0.1)
        await anyio.sleep(1)
        assert told == [True, False]


async def test_a_candidate_with_old_news_asks_before_it_tries_again() -> None:
    async with cluster(*"ab") as two:
        leader = await two.leader()
        candidate = two.others(leader)[0]
        tries: list[float] = []
        batch = candidate.coordination.batch

        async def counted(*args: Any, **kwargs: Any) -> tuple[int, ...]:
            tries.append(anyio.current_time())
            return await batch(*args, **kwargs)

        candidate.coordination.batch = counted  # type: ignore[method-assign]
        with late_news(candidate):
            await anyio.sleep(12)
        assert 1 <= len(tries) <= 4, "once per takeover time, not ten times a second"
        assert two.leaders() == [leader.id]


async def test_everybody_survives_an_engine_that_is_away() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        await three.advertise()
        three.engine.available = False
        await anyio.sleep(LEASE_S + 0.1)
        assert three.leaders() == []
        for node in three.nodes.values():
            assert isinstance(await refusal(node, drain("a")), Unavailable)
            assert len(node.consensus.get_state().nodes) == 3, "reading goes on"
        await anyio.sleep(30)
        assert not any(node.mirror.synced for node in three.nodes.values())
        three.engine.available = True
        back = anyio.current_time()
        await three.leader()
        await three.nodes["b"].consensus.propose_change(drain("a"))
        assert anyio.current_time() - back < 1.0


async def test_clocks_that_run_apart_by_some_percent_change_nothing() -> None:
    async with cluster() as three:
        for name, drift in (("a", 0.04), ("b", -0.04), ("c", 0.0)):
            await three.add(name, drift=drift)
        leader = await three.leader()
        assert await one_leader_at_a_time(three, 120.0) == [leader.id]


async def test_a_lease_in_words_of_a_newer_version_is_nobodys_to_take() -> None:
    async with cluster() as one:
        await one.write(keys.LEASE, b'{"holders":["x"]}')
        node = await one.add("a")
        await anyio.sleep(20)
        assert not node.consensus.is_leader()
        assert one.engine.entries[keys.LEASE].value == b'{"holders":["x"]}'


async def test_listeners_hear_of_leadership_and_one_that_fails_harms_nobody() -> None:
    async with cluster("a") as one:
        node = one.nodes["a"]
        told: list[bool] = []

        def broken(leads: bool) -> None:
            raise RuntimeError("not mine")

        node.consensus.on_leadership(broken)
        forget = node.consensus.on_leadership(told.append)
        await one.leader()
        assert told == [True]
        late: list[bool] = []
        node.consensus.on_leadership(late.append)
        assert late == [True]
        forget()
        await node.consensus.stop()
        assert told == [True]
        assert late == [True, False]


# ── the fence ───────────────────────────────────────────────────────────────────────


async def test_a_leader_that_slept_is_refused_and_steps_down() -> None:
    async with cluster(*"abc") as three:
        sleeper = await three.leader()
        await sleeper.consensus.write([Write("members.x", b"1", ABSENT)])
        old = sleeper.consensus.fence()
        assert old is not None
        sleeper.clock.stop()
        three.wires.cut(sleeper.id)
        await until(lambda: len(three.leaders()) == 2, 5.0)  # it believes that no time has passed
        three.wires.heal()
        told: list[bool] = []
        sleeper.consensus.on_leadership(told.append)
        assert sleeper.consensus.fence() == old
        with pytest.raises(Unavailable):
            await sleeper.consensus.write([Write("members.x", b"2")])
        assert told == [True, False]
        assert not sleeper.consensus.is_leader()
        assert sleeper.consensus.fence() is None
        assert three.engine.entries["members.x"].value == b"1"
        with pytest.raises(Conflict):
            await sleeper.coordination.batch([Write("members.x", b"2")], fence=old)


async def test_a_refused_leader_is_not_brought_back_by_a_renewal_on_its_way() -> None:
    async with cluster(*"abc") as three:
        sleeper = await three.leader()
        told: list[bool] = []
        sleeper.consensus.on_leadership(told.append)
        sleeper.clock.stop()
        three.wires.cut(sleeper.id)
        await until(lambda: len(three.leaders()) == 2, 5.0)
        renewing = anyio.Event()

        async def hang(*args: object, **kwargs: object) -> int:
            renewing.set()
            await anyio.sleep(0.5)
            raise Unavailable("lost")

        sleeper.coordination.put = hang  # type: ignore[method-assign]
        with late_news(sleeper):
            sleeper.clock.step(RENEW_S)
            await renewing.wait()
            three.wires.heal()
            with pytest.raises(Unavailable):
                await sleeper.consensus.write([Write("members.x", b"2")])
            assert told == [True, False]
            await anyio.sleep(1)
            assert not sleeper.consensus.is_leader()
            assert told == [True, False]


async def test_a_conflict_of_another_kind_leaves_the_leader_in_place() -> None:
    async with cluster("a") as one:
        leader = await one.leader()
        with pytest.raises(Conflict):
            await leader.consensus.write([Write("members.x", b"1", 77)])
        assert leader.consensus.is_leader()


async def test_who_does_not_lead_does_not_write() -> None:
    async with cluster(*"ab") as two:
        follower = two.others(await two.leader())[0]
        assert follower.consensus.fence() is None
        with pytest.raises(Unavailable):
            await follower.consensus.write([Write("members.x", b"1")])


# ── proposals ───────────────────────────────────────────────────────────────────────


async def test_any_node_proposes_and_sees_its_change() -> None:
    async with cluster(*"abc") as four:
        mere = await four.add("m", "node")
        await four.leader()
        await four.advertise()
        for on, node in enumerate([mere, *four.others(mere)]):
            revision = await node.consensus.propose_change(drain("a", bool(on % 2)), actor="key1")
            state = node.consensus.get_state()
            assert state.revision >= revision
            assert state.nodes[NodeId("a")].draining == bool(on % 2)
            intent = state.nodes[NodeId("a")].intent
            assert intent is not None
            assert intent.by == "key1"


async def test_a_mere_node_drains_and_labels_but_removes_nobody_and_changes_no_voters() -> None:
    async with cluster("n1") as nodes:
        await nodes.add("n2", "node")
        await nodes.advertise()
        leader = await nodes.leader()
        mere = nodes.nodes["n2"]
        await mere.consensus.propose_change(SetDrain(node=leader.id, drain=True), actor="admin")
        voters = SetVoters(nodes=(leader.id,), before=())
        for change in (RemoveNode(node=leader.id, force=True), voters):
            with pytest.raises(Forbidden, match="only a server"):
                await mere.consensus.propose_change(change)
        await leader.consensus.propose_change(voters)
        assert leader.id in mere.mirror.state.nodes


async def test_refusals_come_back_as_they_were() -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        await three.advertise()
        for node in three.nodes.values():
            assert isinstance(await refusal(node, drain("nobody")), NotFound)
            labels = SetLabels(node=NodeId("a"), labels={"": "x"})
            assert isinstance(await refusal(node, labels), Invalid)
            conflict = await refusal(node, SetConfig(values={}, base=7))
            assert isinstance(conflict, Conflict)
            assert conflict.revision == 0
            assert isinstance(await refusal(node, drain("a"), proposal="no.key!"), Invalid)
        assert leader.consensus.is_leader()


async def test_without_a_leader_it_is_unavailable_in_time() -> None:
    async with cluster() as one:
        mere = await one.add("m", "node")
        assert isinstance(await refusal(mere, drain("m")), Unavailable)
        server = await one.add("s")
        await one.leader()
        await one.kill(server)
        error = await refusal(mere, drain("m"))  # it may still be in the dead leader's mailbox
        assert isinstance(error, Unavailable | DeadlineExceeded)
        await anyio.sleep(3)
        assert isinstance(await refusal(mere, drain("m")), Unavailable)


async def test_a_leader_in_the_act_of_losing_its_quorum_says_so() -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        await three.advertise()
        three.engine.available = False
        for node in (leader, *three.others(leader)):
            assert isinstance(await refusal(node, drain("a")), Unavailable)


async def test_a_proposal_waits_for_a_leader_that_is_about_to_be() -> None:
    async with cluster() as three:
        for name in "abc":
            await three.add(name)
        await three.engine.clients["a"].create(
            keys.advert("a"),
            b'{"node":"a","name":"a","role":"server","version":"1","boot":"","started_at":1}',
        )
        await three.nodes["a"].mirror.wait_ready()
        assert await three.nodes["a"].consensus.propose_change(drain("a"))
        leader = await three.leader()
        follower = three.others(leader)[0]
        del three.nodes[leader.id]
        async with anyio.create_task_group() as group:
            group.start_soon(leader.stop)
            await until(lambda: not leader.consensus.is_leader())
            await follower.consensus.propose_change(drain("a", False))


async def test_the_same_proposal_applies_once() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        change = SetConfig(values={"a": 1}, base=0)
        revisions = {
            await node.consensus.propose_change(change, proposal="p1") for node in three.nodes.values()
        }
        assert len(revisions) == 1
        assert three.nodes["a"].consensus.get_state().config.version == 1
        leader = await three.leader()
        await three.kill(leader)
        new = await three.leader()
        assert {await new.consensus.propose_change(change, proposal="p1")} == revisions


@pytest.mark.parametrize("cut", ["proposer", "leader"])
async def test_an_outcome_that_is_not_known_is_said_so_and_can_be_asked_again(cut: str) -> None:
    async with cluster(*"abc") as three:
        leader = await three.leader()
        proposer = three.others(leader)[0]
        three.wires.cut(proposer.id if cut == "proposer" else leader.id, sends=False)
        change = SetConfig(values={"a": 1}, base=0)
        error = await refusal(proposer, change, proposal="p1")
        assert isinstance(error, DeadlineExceeded)
        three.wires.heal()
        await three.leader()
        await proposer.consensus.propose_change(change, proposal="p1")
        await three.agree()
        state = proposer.consensus.get_state()
        assert state.config.version == 1
        assert [config.version for config in state.versions()] == [1]
        assert list(state.applied) == ["p1"]


async def test_a_leader_that_hears_no_answer_does_not_say_that_nothing_happened() -> None:
    async with cluster("a") as one:
        leader = await one.leader()
        one.wires.cut("a", sends=False)
        error = await refusal(leader, SetConfig(values={"a": 1}, base=0))
        assert isinstance(error, DeadlineExceeded)
        assert keys.CONFIG in one.engine.entries


async def test_a_leader_plans_on_nothing_older_than_its_own_last_write() -> None:
    """Else it would remove the node that it made a voter a moment ago: no key of the two
    changes is the same, so no revision would refuse it."""
    async with cluster(*"abc") as three:
        leader = await three.leader()
        await three.advertise()
        await three.agree()
        voters = SetVoters(nodes=(NodeId("b"),), before=())
        with late_news(leader):
            await leader.consensus.propose_change(voters)
            removal = RemoveNode(node=NodeId("b"), force=True)
            assert isinstance(await refusal(leader, removal), Unavailable)
        assert keys.advert("b") in three.engine.entries
        assert isinstance(await refusal(leader, removal), Conflict)


async def test_a_proposer_sees_its_own_change_when_it_is_told() -> None:
    async with cluster(*"ab") as two:
        leader = await two.leader()
        other = two.others(leader)[0]

        async def propose() -> None:
            revision = await other.consensus.propose_change(SetConfig(values={"a": 1}, base=0))
            assert other.consensus.get_state().revision >= revision
            assert other.config.current.values == {"a": 1}

        async with anyio.create_task_group() as group:
            with late_news(other):
                group.start_soon(propose)
                await leader.mirror.wait_for(lambda state: state.config.version == 1)
                await anyio.sleep(0.3)


async def test_changes_of_many_at_once_all_apply_one_by_one() -> None:
    async with cluster(*"abc") as three:
        await three.leader()
        await three.advertise()
        async with anyio.create_task_group() as group:
            for i in range(45):
                node = list(three.nodes.values())[i % 3]
                change = SetLabels(node=NodeId("a"), labels={f"l{i}": str(i)})
                group.start_soon(node.consensus.propose_change, change)
        await three.agree()
        for node in three.nodes.values():
            assert len(node.consensus.get_state().nodes[NodeId("a")].labels) == 45
            assert len(node.consensus.get_state().applied) == 45


async def test_too_many_at_once_are_refused() -> None:
    async with cluster("a") as one:
        leader = await one.leader()
        await one.advertise()
        refused: list[OllamaDistributedError] = []

        async def propose(i: int) -> None:
            try:
                await leader.consensus.propose_change(SetLabels(node=NodeId("a"), labels={"l": str(i)}))
            except OllamaDistributedError as exc:
                refused.append(exc)

        async with anyio.create_task_group() as group:
            for i in range(MAX_WAITING + 10):
                group.start_soon(propose, i)
        assert len(refused) == 10
        assert all(isinstance(error, QueueFull) for error in refused)


async def test_a_change_meets_a_write_that_the_leader_had_not_seen() -> None:
    """The leader's mirror lags: the batch is refused, and planned again on what is true."""
    async with cluster(*"ab") as two:
        leader = await two.leader()
        await two.advertise()
        other = two.others(leader)[0]
        await two.agree()
        two.wires.cut(leader.id, sends=False)  # no news for a while
        drained = b'{"node":"%s","drain":true}' % other.id.encode()
        await two.write(keys.intent(other.id), drained)
        two.wires.heal()
        labels = SetLabels(node=other.id, labels={"a": "1"})
        try:
            await leader.consensus.propose_change(labels)
        except Unavailable:  # it had not seen the truth in time, and said so
            await two.agree()
            await leader.consensus.propose_change(labels)
        await two.agree()
        assert leader.consensus.get_state().nodes[other.id].labels == {"a": "1"}
        assert leader.consensus.get_state().nodes[other.id].draining, "nobody's intent is overwritten"


async def test_what_is_no_proposal_is_answered_too() -> None:
    async with cluster(*"ab") as two:
        leader = await two.leader()
        follower = two.others(leader)[0]

        async def ask(data: bytes, node: Node = leader) -> bytes:
            return await follower.coordination.request(f"cmd.{node.id}.propose", data)

        for data in (
            b"",
            b"{}",
            b'{"id":"p","change":{"type":"from_the_future"}}',
            b"x" * (MAX_PROPOSAL_BYTES + 1),
        ):
            with pytest.raises(Invalid):
                result(await ask(data))
        with pytest.raises(Invalid):
            result(await ask(encode(Proposal(id="../etc", change=RemoveNode(node=NodeId("x"))))))
        with pytest.raises(DeadlineExceeded):
            result(b"gibberish")
        proposal = encode(Proposal(id="p", change=RemoveNode(node=NodeId("x"))))
        assert result(await ask(proposal, follower)) == NotLeader(leader.id)


async def test_a_message_on_the_wire_is_answered_by_the_node_it_names() -> None:
    async with cluster("a") as one:
        leader = await one.leader()
        answer = await leader.consensus._applier.answer(Message("cmd.a.propose", b"{}"))
        with pytest.raises(Invalid):
            result(answer)


# ── storms ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(15))
async def test_lossy_links_cost_time_but_no_change(seed: int) -> None:
    """Each acknowledged change is there at the end, none twice, and all nodes agree."""
    async with cluster(*"abc", seed=seed) as three:
        await three.advertise()
        await three.leader()
        three.wires.loss = 0.1
        acknowledged: dict[str, int] = {}

        async def propose(node: Node) -> None:
            for i in range(6):
                proposal = f"{node.id}{i}"
                change = SetLabels(node=node.id, labels={proposal: "1"})
                with anyio.move_on_after(30):
                    while proposal not in acknowledged:
                        try:
                            acknowledged[proposal] = await node.consensus.propose_change(
                                change, proposal=proposal
                            )
                        except (Unavailable, DeadlineExceeded):
                            await anyio.sleep(0.1)

        async with anyio.create_task_group() as group:
            for node in three.nodes.values():
                group.start_soon(propose, node)
        three.wires.loss = 0.0
        await three.leader()
        await three.agree()
        state = three.nodes["a"].consensus.get_state()
        assert len(acknowledged) > 9, "the storm let something through"
        labels = [label for node in state.nodes.values() for label in node.labels]
        assert set(acknowledged) <= set(labels)
        assert {keys.change(p): r for p, r in acknowledged.items()}.items() <= {
            key: raw[1] for key, raw in state.raw.items()
        }.items()
        assert len({bytes(str(dict(n.mirror.state.raw)), "utf8") for n in three.nodes.values()}) == 1
