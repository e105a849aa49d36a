"""Who is joining, online, suspect, offline: every row of the table, and flapping."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from time import thread_time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.beats import Beat, Ears, decode_beat, encode_beat, offline_after_s
from ollama_distributed.cluster.membership.plan import (
    BACK,
    JOINED,
    MAX_HOLD_S,
    MISSED,
    RESTARTED,
    SILENT,
    SPACING_S,
    STOPPED,
    UNSTEADY,
    Moment,
    Seen,
    Standing,
    hold_s,
    plan,
    settled,
)
from ollama_distributed.state.records import Member

ME, B = NodeId("me"), NodeId("b")
TICK_S = 0.25


class Leader:
    """Runs the plan as the registrar does, against records that are written at once."""

    def __init__(self, *nodes: NodeId) -> None:
        self.nodes = nodes or (B,)
        self.now = 0.0
        self.leads_since = 0.0
        self.ears = Ears(ME)
        self.members: dict[NodeId, Member] = {}
        self.standing: dict[NodeId, Standing] = {}
        self.advertised: set[NodeId] = set(self.nodes)
        self.removed: set[NodeId] = set()
        self.hears_itself = True
        self.log: list[tuple[float, NodeId, str, str]] = []
        self._seq = 0

    def beat(self, node: NodeId = B, boot: str = "one", *, stopping: bool = False) -> None:
        self._seq += 1
        self.ears.hear(node, Beat(boot=boot, seq=self._seq, stopping=stopping), self.now)

    def tick(self) -> None:
        if self.hears_itself:
            self.beat(ME, "mine")
        hears_since = self.ears.hears_since(self.now)
        moment = Moment(
            now=self.now,
            wall=1000.0 + self.now,
            hears_since=None if hears_since is None else max(hears_since, self.leads_since),
        )
        for one in plan([self.seen(node) for node in self.nodes], moment):
            if one.member is None:
                del self.members[one.node]
                self.log.append((self.now, one.node, "removed", ""))
            else:
                self.members[one.node] = one.member
                self.standing[one.node] = one.standing
                self.log.append((self.now, one.node, one.member.status, one.member.reason))

    def seen(self, node: NodeId) -> Seen:
        return Seen(
            node=node,
            advertised=node in self.advertised,
            removed=node in self.removed,
            member=self.members.get(node),
            heard=self.ears.get(node),
            standing=self.standing.get(node, Standing()),
        )

    def run(self, for_s: float, *, beats: bool | Sequence[NodeId] = False, boot: str = "one") -> None:
        """Tick for so long; the nodes named beat once a second."""
        speakers: Iterable[NodeId] = self.nodes if beats is True else beats or ()
        for tick in range(round(for_s / TICK_S)):
            if tick % 4 == 0:
                for node in speakers:
                    self.beat(node, boot)
            self.tick()
            self.now += TICK_S

    def take_over(self) -> None:
        """Another leader, that heard all along."""
        self.leads_since = self.now
        self.standing = {}

    @property
    def story(self) -> list[tuple[float, str, str]]:
        return [(at, status, reason) for at, _, status, reason in self.log]

    def status(self, node: NodeId = B) -> str:
        return self.members[node].status


def online() -> Leader:
    leader = Leader()
    leader.run(200.0, beats=True)
    leader.log.clear()
    assert leader.status() == "online"
    leader.now = 0.0 + leader.now
    return leader


def story_from(leader: Leader, start: float) -> list[tuple[float, str, str]]:
    return [(at - start, status, reason) for at, status, reason in leader.story]


def test_joins_and_is_online_once_it_beats() -> None:
    leader = Leader()
    leader.run(3.0)
    assert leader.story == [(0.0, "joining", "")]  # its advert is there, it was not heard
    leader.run(5.0, beats=True)
    assert leader.story[1:] == [(4.0, "online", JOINED)]
    member = leader.members[B]
    assert (member.since, member.boot) == (1004.0, "one")


def test_heard_before_its_advert_it_waits_for_it() -> None:
    leader = Leader()
    leader.advertised.clear()
    leader.run(5.0, beats=True)
    assert leader.story == [(0.0, "joining", "")]
    leader.advertised.add(B)
    leader.run(1.0, beats=True)
    assert leader.status() == "online"


def test_nothing_is_written_of_a_node_without_advert_that_was_not_heard() -> None:
    leader = Leader()
    leader.advertised.clear()
    leader.run(20.0)
    assert not leader.log


def test_never_heard_it_is_offline() -> None:
    leader = Leader()
    leader.run(20.0)
    assert leader.story == [(0.0, "joining", ""), (8.0, "offline", SILENT)]


def test_suspect_after_three_beats_offline_after_eight_seconds() -> None:
    leader = online()
    last = leader.ears.get(B).at  # type: ignore[union-attr]
    leader.run(30.0)
    assert story_from(leader, last) == [(3.0, "suspect", MISSED), (8.0, "offline", SILENT)]


def test_one_fault_heals_after_two_steady_seconds() -> None:
    leader = online()
    leader.run(5.0)
    assert leader.status() == "suspect"
    back = leader.now
    leader.run(10.0, beats=True)
    assert story_from(leader, back)[1:] == [(2.0, "online", BACK)]


def test_offline_it_comes_back_as_soon() -> None:
    leader = online()
    leader.run(60.0)
    back = leader.now
    leader.run(10.0, beats=True)
    assert story_from(leader, back)[2:] == [(2.0, "online", BACK)]


def test_a_single_beat_is_not_steady() -> None:
    leader = online()
    leader.run(60.0)
    leader.beat()
    leader.run(2.75)
    assert leader.status() == "offline"


def test_a_goodbye_counts_at_once_and_once() -> None:
    leader = online()
    start = leader.now
    leader.beat(stopping=True)
    leader.run(60.0)
    assert story_from(leader, start) == [(0.0, "offline", STOPPED)]


def test_after_a_clean_stop_it_is_soon_back() -> None:
    leader = online()
    leader.beat(stopping=True)
    leader.run(5.0)
    start = leader.now
    leader.run(20.0, beats=True, boot="two")
    assert story_from(leader, start)[1:] == [(1.0, "online", RESTARTED)]
    assert leader.members[B].boot == "two"


def test_a_leader_that_missed_the_goodbye_believes_the_record() -> None:
    leader = online()
    before = leader.ears.get(B)
    leader.beat(stopping=True)
    leader.run(1.0)
    assert before is not None
    leader.ears._heard[B] = before
    leader.take_over()
    leader.run(2.0)
    assert leader.status() == "offline"


def test_a_restart_that_nobody_missed_is_recorded() -> None:
    leader = online()
    start = leader.now
    leader.run(20.0, beats=True, boot="two")
    assert story_from(leader, start) == [(0.0, "online", RESTARTED)]
    assert (leader.members[B].boot, leader.members[B].since) == ("two", 1000.0 + start)


def test_killed_nodes_that_lived_long_return_at_once_each_time() -> None:
    leader = online()
    for life in range(5):
        leader.run(9.0)
        back = leader.now
        leader.run(20.0, beats=True, boot=f"life {life}")
        assert (leader.log[-1][0] - back, *leader.log[-1][2:]) == (2.0, "online", RESTARTED)


def test_a_crash_loop_is_damped() -> None:
    leader = online()
    for life in range(60):
        leader.run(2.0, beats=True, boot=f"life {life}")
    # The first restart ended a long life, so the second one is the first that counts.
    changes = [at for at, *_ in leader.story][1:]
    assert changes
    assert all(b - a >= SPACING_S for a, b in itertools.pairwise(changes))
    assert leader.status() == "suspect"
    assert leader.log[-1][3] == UNSTEADY
    leader.run(MAX_HOLD_S + SPACING_S, beats=True, boot="life 59")
    assert leader.status() == "online"


def test_a_new_leader_gives_everyone_a_full_grace() -> None:
    leader = online()
    leader.run(1.75)
    leader.take_over()
    start = leader.now
    leader.run(20.0)
    assert story_from(leader, start) == [(3.0, "suspect", MISSED), (8.0, "offline", SILENT)]


def test_a_deaf_leader_accuses_nobody() -> None:
    leader = online()
    leader.hears_itself = False
    leader.run(60.0)
    assert not leader.log
    leader.hears_itself = True
    start = leader.now
    leader.run(2.75)
    assert not leader.log
    leader.run(0.5)
    assert story_from(leader, start) == [(3.0, "suspect", MISSED)]


def test_a_removed_node_has_no_record_however_much_it_beats() -> None:
    leader = online()
    leader.removed.add(B)
    leader.run(10.0, beats=True)
    assert [one[2] for one in leader.log] == ["removed"]
    assert B not in leader.members


@pytest.mark.parametrize(("on_s", "off_s"), [(3, 4), (5, 5), (12, 4), (12, 9), (30, 10), (2, 20)])
def test_a_flapping_node_changes_at_most_once_in_ten_seconds(on_s: int, off_s: int) -> None:
    leader = online()
    while leader.now < 1500.0:
        leader.run(float(off_s))
        leader.run(float(on_s), beats=True)
    # The first fault and its recovery are recorded as they come; from then on it flaps.
    first_return = next(i for i, (_, status, _) in enumerate(leader.story) if status == "online")
    changes = [at for at, *_ in leader.story][first_return:]
    assert all(b - a >= SPACING_S for a, b in itertools.pairwise(changes)), leader.story
    # The hold grows: the second half of the time has no more changes than the first.
    half = (leader.now + 200.0) / 2
    assert sum(at >= half for at in changes) <= sum(at < half for at in changes) + 1


def test_a_flapping_node_that_dies_is_offline_soon() -> None:
    leader = online()
    for _ in range(4):
        leader.run(4.0)
        leader.run(12.0, beats=True)
    last = leader.ears.get(B).at  # type: ignore[union-attr]
    leader.run(40.0)
    assert leader.log[-1][2:] == ("offline", SILENT)
    assert leader.log[-1][0] - last <= offline_after_s(1.0) + SPACING_S


def test_what_was_steady_is_forgiven() -> None:
    leader = online()
    for _ in range(3):
        leader.run(4.0)
        leader.run(25.0, beats=True)
    leader.run(200.0, beats=True)
    assert leader.status() == "online"
    leader.log.clear()
    leader.run(5.0)
    back = leader.now
    leader.run(5.0, beats=True)
    assert story_from(leader, back)[-1] == (2.0, "online", BACK)


def test_the_hold_grows_and_is_bounded() -> None:
    holds = [hold_s(returns) for returns in range(40)]
    assert holds == sorted(holds)
    assert (holds[0], holds[1], holds[2], holds[-1]) == (2.0, 10.0, 20.0, MAX_HOLD_S)


Script = st.lists(st.tuples(st.sampled_from(["beat", "quiet", "stop", "restart", "deaf", "leader"]),
                            st.integers(1, 60)), max_size=30)  # fmt: skip


@given(Script)
def test_whatever_happens_in_the_end_the_record_is_true(script: list[tuple[str, int]]) -> None:
    leader, lives = Leader(), 0
    for what, quarters in script:
        leader.hears_itself = what != "deaf"
        if what == "stop":
            leader.beat(boot=f"{lives}", stopping=True)
            lives += 1
        elif what == "restart":
            lives += 1
        elif what == "leader":
            leader.take_over()
        leader.run(quarters * TICK_S, beats=what in ("beat", "restart"), boot=f"{lives}")
    for (_, _, before, _), (_, _, after, reason) in zip(leader.log, leader.log[1:], strict=False):
        # No write says what was said before, but for a restart.
        assert before != after or reason in (RESTARTED, STOPPED)
        assert (before, after) != ("offline", "suspect")
    leader.hears_itself = True
    leader.run(150.0, beats=True, boot=f"{lives}")
    assert (leader.status(), leader.members[B].boot) == ("online", f"{lives}")
    leader.run(30.0)
    assert leader.status() == "offline"


@given(Script)
def test_a_settled_node_never_changes(script: list[tuple[str, int]]) -> None:
    leader, lives = Leader(), 0
    for what, quarters in script:
        leader.hears_itself = what != "deaf"
        lives += what == "restart"
        leader.run(quarters * TICK_S, beats=what in ("beat", "restart"), boot=f"{lives}")
        if what == "stop":
            leader.beat(boot=f"{lives}", stopping=True)
            lives += 1
        seen = leader.seen(B)
        if settled(seen.member, seen.heard, leader.now):
            assert plan([seen], Moment(now=leader.now, wall=0.0, hears_since=0.0)) == []


def test_the_order_of_the_nodes_never_matters() -> None:
    nodes = [NodeId(f"n{i}") for i in range(20)]
    chance = random.Random(5)
    leader = Leader(*nodes)
    for _ in range(40):
        leader.run(1.0, beats=chance.sample(nodes, 15))
    seen = [leader.seen(node) for node in nodes]
    moment = Moment(now=leader.now + 3.0, wall=0.0, hears_since=0.0)
    forwards, backwards = plan(seen, moment), plan(seen[::-1], moment)
    assert forwards
    assert forwards == backwards[::-1]


def test_a_thousand_beats_and_a_judgement_cost_a_few_times_their_decoding() -> None:
    """Ten times; a ratio, since machines differ and coverage slows Python down."""
    nodes = [NodeId(f"n{i:04}") for i in range(1000)]
    leader = Leader(*nodes)
    leader.run(10.0, beats=True)
    wire = [(node, encode_beat(Beat(boot="one", seq=10_000 + i))) for i, node in enumerate(nodes)]
    costs: list[float] = []
    decodings: list[float] = []
    for attempt in range(7):
        now = leader.now + attempt / 100
        again = [
            (node, encode_beat(msgspec.structs.replace(decode_beat(data), seq=10_000 * (attempt + 2))))
            for node, data in wire
        ]
        began = thread_time()
        for _, data in again:
            decode_beat(data)
        decodings.append(thread_time() - began)
        began = thread_time()
        for node, data in again:
            leader.ears.hear(node, decode_beat(data), now)
        transitions = plan([leader.seen(node) for node in nodes], Moment(now=now, wall=0.0, hears_since=0.0))
        costs.append(thread_time() - began)
        assert transitions == []
    print(f"1,000 beats heard and judged: {min(costs) * 1000:.2f} ms")
    assert min(costs) < 40 * min(decodings)
